"""Rules of one's own in one launch: the function is run once on symbols, and what it does to them is printed as C++ and
as Triton, compiled and stepped as the built-in rules are."""

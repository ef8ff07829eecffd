"""Command lines whose errors are one line that says what is known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UsageError(Exception):
    """One that a user can mend."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def known(option: str, names: Iterable[str] | None, registry: Iterable[str]) -> list[str]:
    """The names, all of the registry's if none were given, in its spelling. Raises UsageError for one it lacks."""
    spelling = {name.lower(): name for name in registry}
    for name in names or ():
        if name.lower() not in spelling:
            raise UsageError(f"{option} {name!r} is unknown: choose from {', '.join(map(repr, spelling.values()))}")
    return [spelling[n.lower()] for n in names] if names else list(spelling.values())


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a program; a UsageError becomes one line on stderr and the exit status 2."""
    try:
        status = main()
    except UsageError as error:
        print(error, file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        status = 1
    sys.exit(status)

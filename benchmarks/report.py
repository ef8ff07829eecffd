"""``python -m benchmarks.report --write README.md``: puts the tables of results files between their markers.

``--check README.md`` exits with 1 if a table in the README is not the one that its results file gives, so that no
number is ever typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .run import table

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- results: (?P<file>\S+) -->\n.*?<!-- end of results -->", re.S)


def section(name: str) -> str:
    """The table of a results file below the repository, with where it comes from."""
    content = json.loads((ROOT / name).read_text())
    e = content["environment"]
    source = (
        f"{e['cpu']}, {e['threads']} threads, {e['capability']}, torch {e['torch']}, Python {e['python']}, "
        f"{e['system']}; "
        f"commit {e['commit']}, {e['date'][:10]}; `{e['command']}`"
    )
    return f"<!-- results: {name} -->\n{table(content['results'])}\n\n{source}\n<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file whose marked tables to renew")
    parser.add_argument("--check", type=Path, help="a Markdown file whose marked tables to compare")
    args = parser.parse_args()
    path = args.write or args.check
    if path is None:
        parser.error("give --write or --check")
    text = path.read_text()
    renewed = MARKED.sub(lambda m: section(m["file"]), text)
    if args.write is not None:
        path.write_text(renewed)
    elif renewed != text or not MARKED.search(text):
        print(f"{path}: its tables are not those of the results files; run python -m benchmarks.report --write {path}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

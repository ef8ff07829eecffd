"""``python -m benchmarks.report FILE.json`` prints the README's tables of a results file.

``--write README.md`` puts them between their markers there, ``--check README.md`` exits with 1 if what is between the
markers is not what the results files give, so that no number is ever typed by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import arguments
from .environment import source
from .errors import UsageError
from .files import write_atomically
from .goals import GOALS
from .results import Results, load
from .tables import comparison, device_details, disturbed, header, line, reasons, scaling

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- results: (?P<file>\S+) -->\n.*?<!-- end of results -->", re.S)
#: Beyond the goals' rows: how the step behaves with other dtypes, gradients and caches.
OTHERS = (
    ("AdamW", "bf16+fp32", "gpt2-small", "kept"),
    ("AdamW", "fp32", "resnet50", "kept"),
    ("AdamW", "fp32", "vit-l16", "kept"),
    ("AdamW", "fp32", "5000-odd", "kept"),
    ("AdamW", "fp32", "2000x64", "recreated"),
    ("AdamW", "fp32", "2000x64", "warm"),
    ("SGD", "fp32", "2000x64", "warm"),
    ("AdamW", "fp32", "2000x1024", "recreated"),
    ("AdamW", "fp32", "2000x1024", "warm"),
    ("AdamW", "fp32", "465-groups", "warm"),
)


def tables(results: Results) -> str:
    """The README's choice of rows; all of them if it has none of the choice."""
    keys = [(*key, "kept") for key in GOALS[str(results.environment["device"])]] + list(OTHERS)
    by_key = {(r["optimizer"], r["dtype"], r["case"], r["condition"]): r for r in results.rows}
    rows = [by_key[k] for k in keys if k in by_key] or results.rows
    parts = [comparison(results, rows, narrow=True), disturbed(rows), device_details(rows), scaling(results)]
    if not results.finished:
        parts.append(f"(The run was interrupted: {len(results.rows)} of {results.planned} rows.)")
    return "\n\n".join([p for p in parts if p] + [source(results.environment)])


def unmeasured() -> str:
    """What a GPU is to reach, for a machine that there are no results of yet."""
    lines = header(["optimizer", "case", "goal", "measured"], 3)
    for (optimizer, dtype, case), goals in GOALS["cuda"].items():
        lines += [line([f"{optimizer} {dtype}", case, str(goal), "not measured"]) for goal in goals]
    return "\n".join(lines)


def section(name: str) -> str:
    text = tables(load(ROOT / name)) if (ROOT / name).exists() else unmeasured()
    return f"<!-- results: {name} -->\n{text}\n<!-- end of results -->"


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.report", description=__doc__)
    p.add_argument("file", type=Path, nargs="?", help="a results file whose tables to print")
    p.add_argument("--all", action="store_true", help="every row, and why peers are missing")
    p.add_argument("--write", type=Path, help="a Markdown file whose marked tables to renew")
    p.add_argument("--check", type=Path, help="a Markdown file whose marked tables to compare")
    args = p.parse_args(argv)
    if sum(given is not None for given in (args.file, args.write, args.check)) != 1:
        p.error("give one of FILE.json, --write and --check")
    if args.file is not None:
        results = load(args.file)
        if args.all:
            print(comparison(results, results.rows), reasons(results.rows), sep="\n\n")
        else:
            print(tables(results))
        return 0
    path = args.write or args.check
    text = read(path)
    if not MARKED.search(text):
        raise UsageError(f"{path} has no <!-- results: FILE --> ... <!-- end of results --> to fill")
    renewed = MARKED.sub(lambda m: section(m["file"]), text)
    if args.write is not None:
        write_atomically(path, lambda f: f.write(renewed.encode()))
    elif renewed != text:
        print(f"{path}: its tables are not those of the results files; run python -m benchmarks.report --write {path}")
        return 1
    return 0


if __name__ == "__main__":
    arguments.run(main)

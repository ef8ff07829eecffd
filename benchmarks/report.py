"""``python -m benchmarks.report FILE.json`` prints the tables of a results file.

``python -m benchmarks.report OUTDIR`` puts what a GPU check has measured into the results file of that GPU, where a row
takes the place of an older one, and renews the tables of README.md and benchmarks/README.md. ``--write FILE.md`` does
the second alone, for one file or several. ``--check FILE.md`` exits with 1 if a table is not what the results files
give, so that no number is ever typed by hand.

The mark ``<!-- results: FILE -->`` before a table names a results file, all of ``GPUs``, or ``storages`` everywhere.
With ``FILE short`` the table has a few rows and columns, with ``FILE all`` every row.
``<!-- end of results -->`` ends it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .common import arguments
from .common.arguments import UsageError
from .common.files import write_atomically
from .finetune.table import table as of_finetuning
from .lowprec.table import table as of_schemes
from .measure.environment import source
from .measure.goals import GOALS
from .measure.results import Result, Results, load
from .moe.table import model as of_model
from .moe.table import table as of_experts
from .rl.table import table as of_agents
from .tables import (
    comparison,
    device_details,
    disturbed,
    flat,
    other_commits,
    reasons,
    scaling,
    storages,
    summary,
    unmeasured,
)

#: The name of a section for the results of every GPU that there are.
GPUS = "GPUs"
#: And for steps in fewer bits on every machine.
STORAGES = "storages"
ROOT = Path(__file__).parent.parent
FOLDER = Path("benchmarks", "results")
#: Those with tables.
DOCUMENTS = (Path("README.md"), Path("benchmarks", "README.md"))
MARKED = re.compile(r"<!-- results: (?P<file>\S+)(?: (?P<how>short|all))? -->\n.*?<!-- end of results -->", re.S)
#: Beyond the goals' rows: how the step behaves with other dtypes, gradients and caches.
OTHERS = (
    ("AdamW", "bf16+fp32", "gpt2-small", "kept"),
    ("AdamW", "remainder+int8", "gpt2-small", "kept"),
    ("AdamW", "fp32", "resnet50", "kept"),
    ("AdamW", "fp32", "vit-l16", "kept"),
    ("AdamW", "fp32", "5000-odd", "kept"),
    ("AdamW", "fp32", "2000x64", "recreated"),
    ("AdamW", "fp32", "2000x64", "warm"),
    ("SGD", "fp32", "2000x64", "warm"),
    ("AdamW", "fp32", "2000x1024", "recreated"),
    ("AdamW", "fp32", "2000x1024", "warm"),
    ("AdamW", "fp32", "465-groups", "warm"),
    *(("AdamW", dtype, "embedding-95", "kept") for dtype in ("fp32", "bf16")),
)


#: The dtypes and cases of a short table: those that others have; a model, many small tensors, many groups.
SHORT_DTYPES = {"fp32", "bf16"}
SHORT = {"cpu": ("gpt2-small", "2000x64", "465-groups"), "cuda": ("gpt2-xl", "2000x1024", "465-groups")}
NO_GPU = "Nothing has run on a GPU yet."


def chosen(results: Results) -> list[Result]:
    """The rows with a goal and some others; all rows if there are none of these."""
    keys = [(*key, "kept") for key in GOALS[str(results.environment["device"])]] + list(OTHERS)
    by_key = {row_key(r): r for r in results.rows}
    return [by_key[k] for k in dict.fromkeys(keys) if k in by_key] or results.rows


def short_table(results: Results) -> str:
    """Of the chosen rows those of a few cases, case by case."""
    rows = [r for r in chosen(results) if r["condition"] == "kept" and SHORT_DTYPES >= set(r["dtype"].split("+"))]
    cases = SHORT[str(results.environment["device"])]
    rows = [r for case in cases for r in rows if r["case"] == case]
    return "\n\n".join(filter(None, [summary(rows), other_commits(results, rows), source(results.environment)]))


def tables(results: Results, every: bool = False) -> str:
    """Everything about the chosen rows, or about all, with a column for each peer."""
    rows = results.rows if every else chosen(results)
    parts = [comparison(results, rows, narrow=not every) if rows else ""]
    parts += [disturbed(rows), other_commits(results, rows)]
    if results.environment["device"] == "cuda":
        parts = [f"**{results.environment['gpu']}**", *parts, unmeasured("cuda", rows)]
    parts += [device_details(rows), flat(results.host), scaling(results)]
    parts += [of_schemes(results.runs)] if results.runs else []
    parts += [storages([results])] if results.storages else []
    parts += [of_finetuning(results.finetuning)] if results.finetuning else []
    parts += [of_agents(results.agents)] if results.agents else []
    parts += [of_experts(results.experts), of_model(results.experts)] if results.experts else []
    if not results.finished:
        made = sum(map(len, (results.rows, results.runs, results.finetuning, results.agents, results.experts)))
        parts.append(f"(The run was interrupted: {made} of {results.planned} rows.)")
    return "\n\n".join([p for p in parts if p] + [source(results.environment)])


def row_key(row: Result) -> tuple[str, str, str, str]:
    return row["optimizer"], row["dtype"], row["case"], row["condition"]


def section(name: str, how: str | None) -> str:
    """Of a file, of storages on all machines, or of all GPUs; where none has been measured yet, what they are to reach,
    or that none has."""
    paths = [ROOT / name] if name.endswith(".json") else sorted((ROOT / FOLDER).glob("*.json"))
    found = [r for r in map(load, paths) if name != GPUS or r.environment["device"] == "cuda"]
    if name == STORAGES:
        text = storages([r for r in found if r.storages])
        return f"<!-- results: {name} -->\n{text}\n<!-- end of results -->"
    parts = [short_table(r) if how == "short" else tables(r, how == "all") for r in found]
    text = "\n\n".join(parts) or (NO_GPU if how == "short" else unmeasured("cuda"))
    return f"<!-- results: {name}{f' {how}' if how else ''} -->\n{text}\n<!-- end of results -->"


def renewed(path: Path) -> tuple[str, str]:
    """A document as it is, and with the tables of the results files."""
    text = read(path)
    if not MARKED.search(text):
        raise UsageError(f"{path} has no <!-- results: FILE --> ... <!-- end of results --> to fill")
    return text, MARKED.sub(lambda m: section(m["file"], m["how"]), text)


def renew(path: Path) -> None:
    _, new = renewed(path)
    write_atomically(path, lambda f: f.write(new.encode()))


def file_of(gpu: str) -> Path:
    """NVIDIA H100 80GB HBM3 is h100."""
    short = re.search(r"\b[A-Z]{1,2}\d{2,4}\b", gpu)
    name = short[0] if short else re.sub(r"\W+", "-", gpu.removeprefix("NVIDIA "))
    return ROOT / FOLDER / f"{name.lower()}.json"


def merge(into: Results, new: Results) -> None:
    """Every row says at which commit it was measured, and a measured one is not replaced by one that was not."""
    rows = {row_key(r): r for r in into.rows}
    for row in new.rows:
        if "contenders" in row or row_key(row) not in rows:
            rows[row_key(row)] = {**row, "commit": new.environment["commit"]}
    into.rows, into.scaling, into.host = list(rows.values()), new.scaling or into.scaling, new.host or into.host
    into.storages = [{**row, "commit": new.environment["commit"]} for row in new.storages] or into.storages
    into.planned, into.finished = len(into.rows), True
    # Its files were somewhere else than here.
    command = re.sub(r"\S*/(\w+\.json)", r"\1", str(new.environment["command"]))
    if new.rows or not into.environment:
        into.environment = {**new.environment, "command": command}


def _flattened(row: Result) -> Result:
    """Without what is None; ``us: {median: 3.0}`` becomes ``us median: 3.0``."""
    flat_row: Result = {}
    for name, value in row.items():
        flat_row |= {f"{name} {n}": v for n, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat_row.items() if value is not None}


def take(folders: list[Path]) -> list[Path]:
    """Merges what is in the folders of a GPU check, in the order of time. The files that it has written."""
    found = []
    for folder in folders:
        for path in folder.glob("*.json"):
            if path.name == "host.json":
                content = json.loads(path.read_text())
                found.append(Results(content["environment"], 0, path))
                found[-1].host = [_flattened(row) for row in content["rows"]]
            elif path.name != "ab.json":
                found.append(load(path))
    targets: dict[Path, Results] = {}
    for new in sorted(found, key=lambda r: str(r.environment["date"])):
        if new.environment["device"] != "cuda":
            raise UsageError(f"{new.path} is of no GPU: its rows belong to no results file of one")
        path = file_of(str(new.environment["gpu"]))
        if path not in targets:
            targets[path] = load(path) if path.exists() else Results({}, 0, path)
        merge(targets[path], new)
    for results in targets.values():
        results.save()
    if not targets:
        raise UsageError(f"no results are in {', '.join(map(str, folders))}")
    return list(targets)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.report", description=__doc__)
    p.add_argument("file", type=Path, nargs="*", help="a results file whose tables to print, or folders of GPU checks")
    p.add_argument("--all", action="store_true", help="every row, and why peers are missing")
    p.add_argument("--write", type=Path, nargs="+", help="Markdown files whose marked tables to renew")
    p.add_argument("--check", type=Path, nargs="+", help="Markdown files whose marked tables to compare")
    args = p.parse_args(argv)
    if sum(map(bool, (args.file, args.write, args.check))) != 1:
        p.error("give one of FILE.json, OUTDIR, --write and --check")
    if args.file and all(path.is_dir() for path in args.file):
        print(*take(args.file), sep="\n")
        args.write = [ROOT / path for path in DOCUMENTS]
    elif args.file:
        if len(args.file) > 1:
            p.error("give one file, or folders")
        results = load(args.file[0])
        if args.all:
            print(comparison(results, results.rows), reasons(results.rows), sep="\n\n")
        else:
            print(tables(results))
    for path in args.write or ():
        renew(path)
    stale = [path for path in args.check or () for text, new in [renewed(path)] if text != new]
    for path in stale:
        print(f"{path}: its tables are not those of the results files; run python -m benchmarks.report --write {path}")
    return 1 if stale else 0


if __name__ == "__main__":
    arguments.run(main)

"""Results files: JSON, written after every row, so that an interrupted run keeps what it has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..common.arguments import UsageError
from ..common.files import write_atomically
from .environment import source

FORMAT = 2
Result = dict[str, Any]
#: Contenders that every row has; the others are peers.
OURS, COPY, STREAM = "fusedoptim", "copy", "stream"
#: Lists of rows that a file has only where there are any.
OPTIONAL = ("host", "runs", "storages", "finetuning", "agents", "experts")


class Results:
    """``planned`` is the number of rows that the run is to have; ``finished`` tells whether it got there."""

    def __init__(self, environment: dict[str, Any], planned: int, path: Path | None = None) -> None:
        self.environment, self.planned, self.path = environment, planned, path
        self.rows: list[Result] = []
        self.scaling: list[Result] = []
        #: Times on the host beside a GPU, if there are any: flat rows.
        self.host: list[Result] = []
        #: Trainings in fewer bits, if there are any: see lowprec.
        self.runs: list[Result] = []
        #: Steps with states in fewer bits, if there are any: see benchmarks.storages.
        self.storages: list[Result] = []
        #: Fine-tuning of a pretrained model, if there is any: see finetune.
        self.finetuning: list[Result] = []
        #: Agents that learned, if there are any: see rl.
        self.agents: list[Result] = []
        #: Trainings of a mixture of experts, if there are any: see moe.
        self.experts: list[Result] = []
        self.finished = False

    def save(self) -> None:
        if self.path is not None:
            text = self.text().encode()
            write_atomically(self.path, lambda f: f.write(text))

    def text(self) -> str:
        """A line per row, so that a change of results can be read."""
        head = {"format": FORMAT, "finished": self.finished, "planned": self.planned, "environment": self.environment}
        parts = [f' "{key}": {_dump(value)}' for key, value in head.items()]
        some = [(key, rows) for key in OPTIONAL if (rows := getattr(self, key))]
        for key, rows in (("rows", self.rows), ("scaling", self.scaling), *some):
            lines = ",\n".join(f"  {_dump(row)}" for row in rows)
            parts.append(f' "{key}": [\n{lines}\n ]' if rows else f' "{key}": []')
        return "{\n" + ",\n".join(parts) + "\n}\n"


def finish(results: Results, text: str) -> None:
    """At the end of a run: saves, and prints the tables with where they are from."""
    results.finished = True
    results.save()
    print(f"\n{text}\n\n{source(results.environment)}")


def key_of(row: Result) -> tuple[str, str, str, str]:
    return row["optimizer"], row["dtype"], row["case"], row["condition"]


def ratio_of(row: Result, name: str) -> float | None:
    """How many times as long as fusedoptim a contender took."""
    ratio = row.get("contenders", {}).get(name, {}).get("ratio")
    return None if ratio is None else float(ratio["median"])


def check_target(path: Path) -> None:
    """Raises UsageError for a file that exists and is no results file, so that none is overwritten by mistake."""
    if path.exists():
        load(path)


def load(path: Path) -> Results:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a results file: it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a results file of format {FORMAT}: make one with python -m benchmarks.run --out"
        )
    try:
        results = Results(content["environment"], content["planned"], path)
        results.rows, results.scaling, results.finished = content["rows"], content["scaling"], content["finished"]
        for name in OPTIONAL:
            setattr(results, name, content.get(name, []))
    except KeyError as error:
        raise UsageError(f"{path} is damaged: it has no {error}") from error
    return results


def _dump(value: Any) -> str:
    return json.dumps(rounded(value))


def rounded(value: Any) -> Any:
    """Five significant digits, which is more than any of the times has. Tables are of these, whether they are made
    before or after a file was written."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value

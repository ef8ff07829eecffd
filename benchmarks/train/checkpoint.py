"""Checkpoints of a training run."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.arguments import UsageError
from ..common.files import write_atomically

FORMAT = "fusedoptim-train-1"


@dataclass
class Progress:
    """What a run has done so far."""

    step: int = 0
    #: per step: loss, lr, gradient norm, seconds of the optimizer
    train: list[dict[str, float]] = field(default_factory=list)
    #: per evaluation: step, loss
    validation: list[dict[str, float]] = field(default_factory=list)


def save(path: Path, settings: dict[str, Any], progress: Progress, **states: Any) -> None:
    content = {"format": FORMAT, "settings": settings, "progress": vars(progress), **states}
    write_atomically(path, lambda f: torch.save(content, f))


def load(path: Path, settings: dict[str, Any]) -> tuple[Progress, dict[str, Any]]:
    """How far it came, and the states. Raises UsageError for a file that is no such checkpoint, or one of another
    run."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums that torch.save writes
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, weights_only=True)
    except Exception as error:  # an unpickler given arbitrary bytes raises anything
        first = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"--resume {path} cannot be read: {first}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"--resume {path} is not a checkpoint of python -m benchmarks.train")
    for key, value in settings.items():
        saved = content["settings"].get(key)
        if saved != value:
            raise UsageError(f"--resume {path} was made with {key}={saved!r}, this run has {key}={value!r}")
    return Progress(**content["progress"]), content


def carry_best(resumed: Path, folder: Path) -> None:
    """Copies the best checkpoint so far to the folder of a run that goes on elsewhere. It may never be beaten there."""
    source, target = resumed.parent / "best.pt", folder / "best.pt"
    if source.is_file() and not target.exists():
        with source.open("rb") as f:
            write_atomically(target, lambda out: shutil.copyfileobj(f, out))

"""Bytes to train on: by default the Python standard library's own sources, which every machine has."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .common.arguments import UsageError

MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Text:
    """uint8 tokens; a tenth, from the middle, is kept for validation."""

    train: Tensor
    validation: Tensor

    def checksum(self) -> int:
        return zlib.crc32(self.validation.numpy(), zlib.crc32(self.train.numpy()))

    def unigram_entropy(self) -> float:
        """Nats per byte that remain when only the bytes' frequencies are known: what a model has to beat."""
        counts = torch.bincount(self.train.long(), minlength=256).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())

    def batch(self, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Random stretches, determined by seed and step alone, so that training resumes without a state for data."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return _stretches(self.train, torch.randint(len(self.train) - context, (size,), generator=g), context)

    def validation_batches(self, size: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
        starts = torch.linspace(0, len(self.validation) - context - 1, size * count).long()
        return [_stretches(self.validation, s, context) for s in starts.split(size)]


def _stretches(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    x = data[starts[:, None] + torch.arange(context + 1)].long()
    return x[:, :-1], x[:, 1:]


def load_text(path: Path | None, context: int) -> Text:
    """Raises UsageError for a file that cannot be read or is too short."""
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        raw = b"".join(f.read_bytes() for f in files)
        name = f"the standard library's sources in {sysconfig.get_path('stdlib')}"
    else:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UsageError(f"--text {path} cannot be read: {error.strerror}") from error
        name = f"--text {path}"
    data = torch.frombuffer(bytearray(raw[:MAX_BYTES] or b"\0"), dtype=torch.uint8)
    middle, tenth = len(data) // 2, len(data) // 10
    if tenth < 2 * (context + 1):
        raise UsageError(f"{name}: {len(raw)} bytes are too few, at least {20 * (context + 1)} are needed")
    train = torch.cat([data[:middle], data[middle + tenth :]])
    return Text(train, data[middle : middle + tenth].clone())

"""States in 8 bits: which parameters can have them, and what they are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import reference
from ._distributed import sharded_by_fsdp1
from ._dtensor import alike, is_dtensor, local, wrapped
from ._rule import SQUARES, Rule
from ._shard_maps import cuts_no_block

#: What is added to the name of a state in blocks.
CODES, SCALES = "_q8", "_scale"
#: A parameter with fewer elements, or shorter rows, would save little and be worse off.
SMALLEST, SHORTEST_ROW = 4096, 64


def names_in_blocks(slot: str) -> tuple[str, str]:
    """The states that a state in blocks is made of."""
    return slot + CODES, slot + SCALES


def slot_of(name: str) -> str:
    """The state that this one is, or is a part of."""
    return name.removesuffix(CODES).removesuffix(SCALES)


def row_of(p: Tensor) -> int:
    """The number of elements in a row, of which blocks are cut: those with the same index of the first dimension. One
    dimension is one row."""
    return p.numel() if p.dim() < 2 else p.shape[1:].numel()


def can_be_in_blocks(p: Tensor) -> bool:
    """By the whole tensor's shape, so that all its shards are alike. FSDP1's parameters, which are shards of many in
    one dimension, have blocks of their own."""
    if p.dim() < 2:
        return p.numel() >= SMALLEST and sharded_by_fsdp1([p])
    return p.numel() >= SMALLEST and row_of(p) >= SHORTEST_ROW and p.dtype != torch.float64


def check_blocks(p: Tensor, who: str) -> None:
    """Raises ValueError, on all ranks alike, for a DTensor whose shards cut blocks."""
    if not is_dtensor(p) or not can_be_in_blocks(p):
        return
    try:
        whole = cuts_no_block(p, reference.BLOCK)
    except ValueError as error:
        raise ValueError(f"{who} {error}") from None
    if not whole:
        raise ValueError(
            f"{who} has shards ({p.placements}) that are not whole blocks of {reference.BLOCK} elements of "  # type: ignore[attr-defined]
            "a row, of which states in 8 bits are made: keep its states in more bits, by a group of its own with "
            "state_dtype=torch.bfloat16"
        )


class BlockPart(NamedTuple):
    """A state that one in blocks is made of."""

    shape: torch.Size
    dtype: torch.dtype


def format_in_blocks(name: str, p: Tensor, rule: Rule) -> BlockPart | None:
    """None if that is no part of a state in blocks."""
    slot = next((s for s in rule.states if name in names_in_blocks(s.name)), None)
    if slot is None:
        return None
    if name.endswith(CODES):
        return BlockPart(p.shape, torch.uint8 if slot.kind == SQUARES else torch.int8)
    return BlockPart(_shape_of_scales(p), torch.float32)


def _shape_of_scales(p: Tensor) -> torch.Size:
    blocks = -(-row_of(p) // reference.BLOCK)
    return torch.Size((1 if p.dim() < 2 else p.shape[0], blocks))


def new_in_blocks(name: str, p: Tensor, squares: bool, fill: float) -> Tensor:
    """One of the two, for a state with this number everywhere."""
    code, scale = _constant(squares, fill)
    if name.endswith(CODES):
        dtype = torch.uint8 if squares else torch.int8
        return torch.full_like(p, code, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    own = torch.full(_shape_of_scales(local(p)), scale, dtype=torch.float32, device=local(p).device)
    return wrapped(p, own, _shape_of_scales(p))


def _constant(squares: bool, fill: float) -> tuple[int, float]:
    """The code and the scale of a block that has one number. Fakes, which a mode makes, have no values."""
    if fill == 0:
        return 0, 0.0
    with _disable_current_modes():
        codes, scales = reference.encode(_storage(squares), torch.full((1, reference.BLOCK), fill, device="cpu"), None)
        assert scales is not None
        return int(codes[0, 0]), float(scales)


def _storage(squares: bool) -> str:
    return "q8_squares" if squares else "q8"


#: Elements that are converted at a time, whole blocks: what is computed in between takes 8 bytes for each, several
#: times.
PART = 1 << 22


def to_blocks(p: Tensor, value: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    """The codes and the scales, placed as the parameter is, of a state that has its shape and placement."""
    own, shape = local(value).detach(), _shape_of_scales(local(p))
    codes = torch.empty_like(local(p), dtype=torch.uint8 if squares else torch.int8, requires_grad=False)
    scales = torch.empty(shape, dtype=torch.float32, device=own.device)
    if own.numel() > 0:
        rows = own.reshape(shape[0], -1)
        parts = _split(rows, _height(rows), PART)
        found = [[reference.encode(_storage(squares), x, None) for x in part] for part in parts]
        codes.copy_(_joined([[c for c, _ in part] for part in found]).view(own.shape))
        scales.copy_(_joined([[s for _, s in part if s is not None] for part in found]))
    return _as(p, codes), wrapped(p, scales, _shape_of_scales(p))


def out_of_blocks(p: Tensor, codes: Tensor, scales: Tensor, squares: bool, dtype: torch.dtype) -> Tensor:
    """The numbers, placed as the parameter is."""
    own, of_blocks = local(codes).detach(), local(scales).detach()
    found = torch.empty_like(local(p), dtype=dtype, requires_grad=False)
    if own.numel() > 0:
        rows = own.reshape(of_blocks.shape[0], -1)
        height = _height(rows)
        parts = zip(_split(rows, height, PART), _split(of_blocks, height, PART // reference.BLOCK), strict=True)
        decoded = [
            [reference.decode(_storage(squares), *both).to(dtype) for both in zip(*part, strict=True)] for part in parts
        ]
        found.copy_(_joined(decoded).view(own.shape))
    return _as(p, found)


def _as(p: Tensor, shard: Tensor) -> Tensor:
    return alike(p, shard) if is_dtensor(p) else shard


def _height(rows: Tensor) -> int:
    return max(1, PART // rows.shape[1])


def _split(rows: Tensor, height: int, width: int) -> list[list[Tensor]]:
    return [[part.contiguous() for part in torch.split(some, width, 1)] for some in torch.split(rows, height)]


def _joined(parts: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(part, 1) for part in parts])

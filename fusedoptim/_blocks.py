"""States in 8 bits: which parameters can have them, and what they are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._distributed import sharded_by_fsdp1
from ._dtensor import is_dtensor, local, wrapped
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
    storage = "q8_squares" if squares else "q8"
    of_row, _ = reference.encode(storage, torch.full((1, reference.BLOCK), fill, device="cpu"), None)
    scale = reference.encode(storage, torch.full((1, 1), fill, device="cpu"), None)[1]
    assert scale is not None
    if name.endswith(CODES):
        return torch.full_like(
            p, int(of_row[0, 0]), dtype=of_row.dtype, memory_format=torch.preserve_format, requires_grad=False
        )
    own = torch.full(_shape_of_scales(local(p)), float(scale), dtype=torch.float32, device=local(p).device)
    return wrapped(p, own, _shape_of_scales(p))


def in_blocks(codes: Tensor, scales: Tensor, squares: bool) -> Tensor:
    """The numbers, fp32, of this process's shard."""
    return reference.decode("q8_squares" if squares else "q8", local(codes), local(scales))

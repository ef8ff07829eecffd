"""Which elements of a whole tensor a shard has, from the DTensor's placements alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from ._dtensor import local, row_major

#: Of one dimension, in the order in which a shard has them: where a run of indices starts and ends.
Runs = tuple[tuple[int, int], ...]


class Cut(NamedTuple):
    """What a mesh dimension does to a dimension of a tensor: it cuts it as torch.chunk does."""

    ranks: int
    #: In how many parts the dimension is cut first, of each of which every rank has a part: FSDP2 over tensor
    #: parallelism (``_StridedShard``). 1 if it is not.
    parts: int


class Cuts(NamedTuple):
    """What all mesh dimensions do to a dimension of a tensor, one after the other."""

    size: int
    cuts: tuple[Cut, ...]
    #: Of these mesh dimensions, where this rank is.
    here: tuple[int, ...]

    def runs(self) -> Runs:
        return runs(self.size, self.cuts, self.here)

    def all_runs(self) -> Iterator[Runs]:
        """Of every rank."""
        return (runs(self.size, self.cuts, at) for at in product(*(range(cut.ranks) for cut in self.cuts)))


def cuts_of(p: Any, shape: Sequence[int]) -> list[Cuts] | None:
    """What a DTensor's placements do to each dimension of a tensor of this shape. None if this rank is not in its mesh.

    Raises:
        ValueError: for a kind of placement that nobody knows here.
    """
    mesh, placements = p.device_mesh, p.placements
    here = mesh.get_coordinate()
    if here is None:
        return None
    dims: list[list[int]] = [[] for _ in shape]
    for d, placement in enumerate(placements):
        if not placement.is_replicate():
            if type(placement).__name__ not in ("Shard", "_StridedShard"):
                raise ValueError(f"has a placement that is not known here ({placement!r}): use redistribute()")
            dims[placement.dim].append(d)
    if not any(hasattr(placement, "split_factor") for placement in placements):
        for tensor_dim, mesh_dims in getattr(getattr(p, "_spec", None), "shard_order", None) or ():  # private
            dims[tensor_dim] = list(mesh_dims)
    return [
        Cuts(
            size,
            tuple(Cut(mesh.size(d), getattr(placements[d], "split_factor", 1)) for d in of_dim),
            tuple(here[d] for d in of_dim),
        )
        for size, of_dim in zip(shape, dims, strict=True)
    ]


@lru_cache(maxsize=8192)
def runs(size: int, cuts: tuple[Cut, ...], at: tuple[int, ...]) -> Runs:
    """Those of the rank at this place, joined where one follows another."""
    found: Runs = ((0, size),) if size else ()
    for cut, rank in zip(cuts, at, strict=True):
        places = []
        n = sum(end - start for start, end in found)
        for start, end in (_chunk(0, n, cut.parts, i) for i in range(cut.parts)):
            places.append(_chunk(start, end, cut.ranks, rank))
        found = _joined(run for start, end in places for run in _slice(found, start, end))
    return found


def _chunk(start: int, end: int, chunks: int, i: int) -> tuple[int, int]:
    step = -(-(end - start) // chunks)
    return min(start + i * step, end), min(start + (i + 1) * step, end)


def _slice(of: Runs, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What is at these places of the indices."""
    before = 0
    for first, last in of:
        low, high = max(first, first + start - before), min(last, first + end - before)
        if low < high:
            yield low, high
        before += last - first


def _joined(found: Iterator[tuple[int, int]]) -> Runs:
    result: list[tuple[int, int]] = []
    for start, end in found:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, end))
    return tuple(result)


# ---- what is asked of them ----


def index_map(p: Any) -> tuple[int, tuple[int, ...] | None]:
    """Where the elements of this process's shard belong in the whole tensor: the flat index of the first, and by how
    much the index grows along each dimension; None instead of these where the elements follow each other."""
    cuts = cuts_of(p, p.shape)
    if cuts is None:
        return 0, None
    strides = row_major(p.shape)
    found = [of_dim.runs() for of_dim in cuts]
    if not all(found):
        return 0, None
    first = sum(of_dim[0][0] * s for of_dim, s in zip(found, strides, strict=True))
    shape = [of_dim[0][1] - of_dim[0][0] for of_dim in found]
    own = row_major(shape)
    follow = all(a == b for a, b, size in zip(strides, own, shape, strict=True) if size != 1)
    return first, None if follow else strides


def check_index_map(p: Any, who: str) -> None:
    """Raises ValueError for a DTensor whose shards have no :func:`index_map`: on all ranks alike if that is due to its
    placements."""
    remedy = (
        "so that where its elements belong cannot be told, which random bits follow from: redistribute() it to Shard "
        "placements, or use rounding='nearest'"
    )
    try:
        cuts = cuts_of(p, p.shape)
    except ValueError as error:
        raise ValueError(f"{who} {error}, or rounding='nearest'") from None
    if cuts is None:
        return
    for of_dim in cuts:
        if any(cut.parts > 1 for cut in of_dim.cuts) and any(len(found) > 1 for found in of_dim.all_runs()):
            raise ValueError(f"{who} has shards that consist of several pieces ({p.placements}), {remedy}")
    usual = tuple(sum(end - start for start, end in of_dim.runs()) for of_dim in cuts)
    if usual != local(p).shape:
        raise ValueError(
            f"{who} has a shard on this rank of shape {tuple(local(p).shape)}, where torch would make one of {usual}, "
            f"{remedy}"
        )


def cuts_no_block(p: Any, block: int) -> bool:
    """Whether every shard of a DTensor consists of whole blocks of so many elements of a row, and a tensor with a
    number for each, of shape (rows, blocks), has shards with those of the same blocks if it is placed alike."""
    cuts = cuts_of(p, p.shape)
    if cuts is None:
        return True
    if any(of_dim.cuts for of_dim in cuts[2:]):  # which the other tensor does not have
        return False
    rest, row = p.shape[2:].numel(), p.shape[1:].numel()
    of_rows = cuts[1]
    of_blocks = of_rows._replace(size=-(-row // block))
    for found, wanted in zip(of_rows.all_runs(), of_blocks.all_runs(), strict=True):
        if any(edge * rest % block and edge * rest != row for run in found for edge in run):
            return False
        if tuple((start * rest // block, -(-end * rest // block)) for start, end in found) != wanted:
            return False
    return True

"""Which elements of a whole tensor a shard has: by what placements say, and by the elements themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from sharded_models import mesh, shard
from torch import Tensor

from fusedoptim._random_places import Place
from fusedoptim._reference_runner import _indices
from fusedoptim._shard_maps import Cut, check_index_map, cuts_no_block, index_map, runs

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 4
SHAPES = [(), (3,), (9,), (5, 3), (1, 7), (7, 1), (2, 5, 3), (0, 3)]


def arange(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


# ---- against torch's own splitting ----

CUTS = [
    [(2, 1)], [(3, 1)], [(2, 1), (3, 1)], [(3, 1), (2, 1)], [(2, 2), (2, 1)], [(3, 2), (2, 1)], [(2, 4), (4, 1)],
    [(2, 6), (3, 1), (2, 1)], [(2, 2)], [(3, 4)], [(2, 1), (2, 2)], [(1, 1), (4, 1)], [(5, 1)],
]  # fmt: skip


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_every_rank_has_what_torch_gives_it(cuts: list[tuple[int, int]]) -> None:
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    for size in range(31):
        seen: list[int] = []
        for at in itertools.product(*(range(ranks) for ranks, _ in cuts)):
            expected = torch.arange(size)
            for (ranks, parts), i in zip(cuts, at, strict=True):
                placement = Shard(0) if parts == 1 else _StridedShard(0, split_factor=parts)
                expected = placement._split_tensor(expected, ranks, with_padding=False, contiguous=False)[0][i]
            found = runs(size, tuple(Cut(*cut) for cut in cuts), at)
            assert [i for start, end in found for i in range(start, end)] == expected.tolist(), (size, at)
            assert all(a[1] != b[0] for a, b in itertools.pairwise(found)) and all(a < b for a, b in found)
            seen += expected.tolist()
        assert sorted(seen) == list(range(size))


# ---- over DTensors ----


def check_map(p: Any) -> None:
    """The shard's elements are their indices in the whole tensor."""
    first, strides = index_map(p)
    own = shard(p)
    found = _indices(own.shape, Place(0, first, strides), own.device)
    what = (p.shape, p.placements, p.device_mesh.shape, dist.get_rank(), first, strides)
    assert torch.equal(found, own.long()), (what, own, found)
    contiguous = own.numel() < 2 or torch.equal(own.reshape(-1), arange(own.numel()) + own.reshape(-1)[0])
    assert (strides is None) == contiguous, what  # the quick way is taken where it can be


def check_all_placements() -> int:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    count = 0
    for sizes in ((4,), (2, 2), (4, 1), (2, 1, 2)):
        for shape in SHAPES if len(sizes) < 3 else SHAPES[:4]:
            kinds = [Replicate(), *map(Shard, range(len(shape)))]
            for placements in itertools.product(kinds, repeat=len(sizes)):
                whole = arange(*shape)
                check_map(distribute_tensor(whole, mesh(*sizes), placements, src_data_rank=None))
                count += 1
    return count


def check_orders() -> None:
    """Two mesh dimensions cut the same dimension of the tensor: FSDP2 over tensor parallelism, and where the DTensor
    itself says in which order."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import _StridedShard

    both = mesh(2, 2)
    first, last = both.get_coordinate()
    for rows in (8, 9, 6, 5, 3, 2, 1):
        whole = arange(rows, 3)
        p = distribute_tensor(whole, both, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None)
        check_map(p)
        check_index_map(p, "it")
        parts = [*whole.chunk(2), whole[:0]][last]  # torch.chunk gives one where there is one row
        own = [*parts.chunk(2), whole[:0]][first]
        assert torch.equal(shard(p), own)
        order = DTensorSpec.compute_default_shard_order((Shard(0), Shard(0)))
        entry = type(order[0])(tensor_dim=0, mesh_dims=(1, 0))
        meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
        spec = DTensorSpec(both, (Shard(0), Shard(0)), tensor_meta=meta, shard_order=(entry,))
        check_map(DTensor(own.clone(), spec, requires_grad=False))
        on_three = mesh(2, 1, 2)
        placements = [_StridedShard(0, split_factor=2), Replicate(), Shard(0)]
        check_map(distribute_tensor(whole, on_three, placements, src_data_rank=None))


def refusals() -> list[str]:
    """What is said of a shard of several pieces, of one whose size is somebody's own, and of a placement unknown."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    class Ragged(Shard):
        pass

    pieces = distribute_tensor(arange(9, 3), mesh(4), [_StridedShard(0, split_factor=2)], src_data_rank=None)
    rows = [3, 4, 1, 2]
    own = torch.zeros(rows[dist.get_rank()], 3)
    uneven = DTensor.from_local(own, mesh(4), [Shard(0)], shape=torch.Size((10, 3)), stride=(3, 1))
    strange = DTensor.from_local(own[:1], mesh(4), [Ragged(0)], shape=torch.Size((4, 3)), stride=(3, 1))
    found = []
    for p in (pieces, uneven, strange):
        try:
            check_index_map(p, "it")
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def no_block_is_cut(shape: tuple[int, ...], sizes: tuple[int, ...], kinds: str, block: int) -> tuple[bool, bool]:
    """What is said of all ranks, and whether it is so on this one."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    placements = [
        Replicate() if k == "r" else _StridedShard(int(k[1:]), split_factor=2) if k[0] == "s" else Shard(int(k))
        for k in kinds.split()
    ]
    row = torch.Size(shape[1:]).numel()
    number = arange(*shape) // row * -(-row // block) + arange(*shape) % row // block
    p = distribute_tensor(number, mesh(*sizes), placements, src_data_rank=None)
    own = shard(p).flatten()
    blocks = own.unique()
    are_whole = torch.equal(torch.isin(number, blocks).sum(), torch.tensor(own.numel()))
    said = cuts_no_block(p, block)
    if said:
        scales = distribute_tensor(arange(shape[0], -(-row // block)), mesh(*sizes), placements, src_data_rank=None)
        in_rows = own.view(shard(p).shape[0], -1) if own.numel() else own.view(0, 1)
        assert torch.equal(blocks, shard(scales).flatten().sort().values), (shape, placements)
        assert torch.equal(in_rows[:, ::block].flatten(), shard(scales).flatten()), (shape, placements)
    return said, are_whole


BLOCKS = [
    ((8, 16), (4,), "0", 4), ((7, 15), (4,), "0", 4), ((8, 16), (4,), "1", 4), ((8, 16), (4,), "1", 8),
    ((8, 8), (4,), "1", 4), ((8, 24), (4,), "1", 4), ((3, 6, 4), (4,), "1", 4), ((3, 6, 2), (4,), "1", 4),
    ((3, 7, 2), (2, 2), "r 1", 4), ((3, 8, 2), (2, 2), "1 1", 4), ((3, 16, 2), (2, 2), "s1 1", 4),
    ((3, 8, 1), (2, 2), "s1 1", 4), ((5, 16), (2, 2), "0 1", 8), ((5, 8), (2, 2), "s0 0", 4),
    ((2, 2, 8), (4,), "2", 4), ((2, 2, 8), (2, 2), "0 2", 8), ((9, 13), (4,), "s0", 4), ((2, 14), (2, 2), "r 1", 4),
]  # fmt: skip


def check_blocks() -> list[tuple[bool, bool]]:
    return [no_block_is_cut(*case) for case in BLOCKS]


def test_index_maps() -> None:
    assert set(run(WORLD, check_all_placements)) == {
        sum((len(s) + 1) ** n for n, shapes in ((1, SHAPES), (2, SHAPES * 2), (3, SHAPES[:4])) for s in shapes)
    }
    run(WORLD, check_orders)


def test_shards_without_an_index_map_are_refused() -> None:
    found = run(WORLD, refusals)
    pieces, uneven, strange = zip(*found, strict=True)
    assert len(set(pieces)) == 1 and "it has shards that consist of several pieces" in pieces[0]
    assert [bool(text) for text in uneven] == [False, True, True, True]
    assert "of shape (4, 3), where torch would make one of (3, 3)" in uneven[1]
    assert len(set(strange)) == 1 and "has a placement that is not known here" in strange[0]
    assert all("rounding='nearest'" in text for text in (pieces[0], uneven[1], strange[0]))


def test_blocks_that_are_cut_are_found() -> None:
    found = run(WORLD, check_blocks)
    for case, of_ranks in zip(BLOCKS, zip(*found, strict=True), strict=True):
        (said,) = {said for said, _ in of_ranks}
        assert said == all(are_whole for _, are_whole in of_ranks), case
    assert {said for of_rank in found for said, _ in of_rank} == {False, True}

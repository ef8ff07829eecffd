"""One rank of a large world, alone in its process: torch's ``fake`` process group, whose collectives send nothing, and
parameters that are sharded over it. Values that come from other ranks are wrong; shapes, memory and calls are right."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@contextmanager
def simulated(world: int) -> Iterator[None]:
    """Within it this process is rank 0 of the default group. There must be none before. torch's DTensors warn of
    nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    logger = logging.getLogger("torch.distributed.tensor._redistribute")  # of two sums in a row
    level = logger.level
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)
            yield
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


@dataclass(frozen=True)
class Layout:
    """``placements`` gives those of the parameter of an index, one per dimension of the mesh."""

    name: str
    dimensions: tuple[str, ...]
    placements: Callable[[int], tuple[Any, ...]]
    #: Ranks along the last dimension of the mesh, where it has two.
    inner: int = 1

    def mesh(self, world: int) -> DeviceMesh:
        shape = (world,) if len(self.dimensions) == 1 else (world // self.inner, self.inner)
        return init_device_mesh("cpu", shape, mesh_dim_names=self.dimensions)

    def says(self, world: int) -> str:
        """Its name with the number of ranks along every dimension of the mesh."""
        return self.name.format(world=world, outer=world // self.inner, inner=self.inner)


def _of_tp(index: int) -> tuple[Any, ...]:
    """As ``fully_shard`` places what tensor parallelism has sharded: by rows, then by columns, in turn."""
    return (Shard(0), Shard(1)) if index % 2 else (_StridedShard(0, split_factor=8), Shard(0))


LAYOUTS = {
    "fsdp2": Layout("FSDP2 over {world}", ("shard",), lambda index: (Shard(0),)),
    "hsdp": Layout("HSDP {outer} x {inner}", ("replicate", "shard"), lambda index: (Replicate(), Shard(0)), inner=8),
    "tp": Layout("TP {inner} x FSDP2 {outer}", ("dp", "tp"), _of_tp, inner=8),
}


def parameters(mesh: DeviceMesh, layout: Layout, count: int, shard: tuple[int, int]) -> list[torch.nn.Parameter]:
    """Of shards of that shape, whatever the world is; with gradients of ones."""

    def placed(index: int, value: float) -> Any:
        return DTensor.from_local(torch.full(shard, value), mesh, layout.placements(index), run_check=False)

    params = [torch.nn.Parameter(placed(index, 1.0)) for index in range(count)]
    for index, p in enumerate(params):
        p.grad = placed(index, 1.0)
    return params

"""How a model and its optimizer are shared by the processes of torchrun: what ``--shard`` chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..common.arguments import UsageError
from . import parallel

#: What each process has of a model: kind of sharding, and what it means.
KINDS = {
    "ddp": "all of it (DistributedDataParallel)",
    "fsdp2": "a shard of every parameter, gradient and state (fully_shard)",
    "hsdp": "the same, in two replicas that have half of the processes each",
    "zero": "all parameters and gradients, the states of some of them (ZeroRedundancyOptimizer)",
}
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def check(kind: str | None) -> str | None:
    """The kind, of which DDP is the default under torchrun; None for a single process. Raises UsageError."""
    if not parallel.launched():
        if kind is not None:
            raise UsageError(
                f"--shard {kind} shares a model between processes, but there is one: "
                "torchrun --nproc_per_node N -m benchmarks.train starts N"
            )
        return None
    if kind == "hsdp" and parallel.world() % 2:
        raise UsageError(f"--shard hsdp makes two replicas: {parallel.world()} processes are no even number")
    return kind or "ddp"


def says(kind: str | None) -> str:
    return "" if kind is None else f", {kind} over {parallel.world()} processes"


def _fully_sharded(model: nn.Module, blocks: Iterable[nn.Module], replicas: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = parallel.world() // replicas
    if replicas == 1:
        mesh = init_device_mesh("cpu", (shards,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard(model: nn.Module, blocks: Iterable[nn.Module], kind: str | None) -> nn.Module:
    """What computes the model's loss in all processes together. ``blocks`` are gathered one at a time. Comes before the
    optimizer: FSDP2 replaces the model's parameters."""
    if kind is None:
        return model
    if kind in ("fsdp2", "hsdp"):
        return _fully_sharded(model, blocks, replicas=2 if kind == "hsdp" else 1)
    return nn.parallel.DistributedDataParallel(model)


def optimizer(params: Iterable[nn.Parameter], make: MakeOptimizer, kind: str | None, lr: float) -> Any:
    """What ``make`` makes, for the parameters that this process steps."""
    if kind != "zero":
        return make(params)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=lambda params, lr: make(params), lr=lr)


def norm_options(kind: str | None) -> dict[str, Any]:
    """What tensors do not show to an optimizer: with ZeRO each process's knows some of the parameters, and the norm is
    that of all."""
    return {"norm_group": dist.group.WORLD} if kind == "zero" else {}


def own(optimizer: Any) -> Any:
    """The optimizer that steps in this process: the one within ZeRO's."""
    return getattr(optimizer, "optim", optimizer)


def stepped(optimizer: Any) -> list[nn.Parameter]:
    """The parameters that it steps in this process."""
    return [p for group in own(optimizer).param_groups for p in group["params"]]

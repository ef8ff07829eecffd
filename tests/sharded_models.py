"""Tiny models that torch shards, as they are in every process of a group: FSDP2, HSDP, tensor and sequence parallel.

torch.distributed.tensor is imported where a model is built, as most tests have to work without it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cases import assert_same_bits
from torch import Tensor, nn

WIDTH = 6


@dataclass
class Sharded:
    model: nn.Module
    #: Of a step, in this process. Processes that share a part of the data have the same.
    loss: Callable[[int], Tensor]

    def __post_init__(self) -> None:
        self.params = list(self.model.parameters())
        self.start = [shard(p).clone() for p in self.params]

    def restore(self) -> None:
        """The values that the parameters had at first, and no gradients."""
        for p, start in zip(self.params, self.start, strict=True):
            shard(p).copy_(start)
            p.grad = None

    def backward(self, step: int) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self.loss(step)
        loss.backward()
        return loss.detach()


def is_dtensor(t: object) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


@torch.no_grad()
def shard(t: Tensor) -> Tensor:
    """The memory of this process; a plain tensor is its own."""
    return t.to_local() if is_dtensor(t) else t.detach()


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of it. A collective."""
    return t.full_tensor() if is_dtensor(t) else t.detach()


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer, what: str) -> None:
    """Shards of parameters and states."""
    for i, (p, q) in enumerate(zip(*([p for g in o.param_groups for p in g["params"]] for o in (a, b)), strict=True)):
        assert p.placements == q.placements
        left, right = ({"parameter": x, **o.state[x]} for o, x in ((a, p), (b, q)))
        for name in left.keys() | right.keys():
            if left.get(name) is not None or right.get(name) is not None:
                one, two = (shard(torch.as_tensor(of[name])) for of in (left, right))
                assert_same_bits(one, two, f"{what}: {name} of parameter {i}")


@functools.cache
def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def layers(*widths: int) -> nn.Sequential:
    """The same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            modules += [nn.Tanh()] * (i > 0) + [nn.Linear(a, b)]
        return nn.Sequential(*modules)


def batch(step: int, part: int, *shape: int) -> Tensor:
    return torch.randn(shape or (8, WIDTH), generator=torch.Generator().manual_seed(100 * step + part))


def loss_of(model: nn.Module, part: int) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        x = batch(step, part)
        return (model(x) - x.sum(1, keepdim=True).sin()).square().mean()

    return loss


def fsdp2(*widths: int, on: Any = None, part: int | None = None, **options: Any) -> Sharded:
    """Every layer is a module of its own, and the rest of the model one."""
    from torch.distributed.fsdp import fully_shard

    model = layers(*(widths or (WIDTH, 16, 8)))
    options["mesh"] = on or mesh(dist.get_world_size())
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return Sharded(model, loss_of(model, dist.get_rank() if part is None else part))


def fsdp2_bf16() -> Sharded:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_offloaded() -> Sharded:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))


def fsdp2_accumulated() -> Sharded:
    sharded = fsdp2()
    model, one = sharded.model, sharded.loss

    def loss(step: int) -> Tensor:
        model.set_requires_gradient_sync(False)
        one(step + 1000).backward()
        model.set_requires_gradient_sync(True)
        return one(step)

    return Sharded(model, loss)


def hsdp() -> Sharded:
    return fsdp2(WIDTH, 17, 1, on=mesh(2, 2, names=("replicate", "shard")))


def parallelized(model: nn.Module, on: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, on, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel() -> Sharded:
    """The last bias is in every process."""
    model = parallelized(layers(WIDTH, 16, 3), mesh(2))
    return Sharded(model, loss_of(model, 0))


def tensor_parallel_and_fsdp2() -> Sharded:
    """The first weight's rows are sharded twice."""
    from torch.distributed.fsdp import fully_shard

    both = mesh(2, 2, names=("data", "tensor"))
    model = parallelized(layers(WIDTH, 16, 5), both["tensor"])
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=both["data"])
    return Sharded(model, loss_of(model, both.get_local_rank("data")))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = layers(WIDTH, 16), layers(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


def sequence_parallel() -> Sharded:
    """Every process has a part of each sequence, and so a part of the sum that is the norm's gradient."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plan = {
        "norm": SequenceParallel(),
        "up.0": ColwiseParallel(input_layouts=Shard(1)),
        "down.0": RowwiseParallel(output_layouts=Shard(1)),
    }
    model = parallelize_module(Block(), mesh(2), plan)

    def loss(step: int) -> Tensor:
        x = batch(step, 0, 3, 8, WIDTH).chunk(2, 1)[dist.get_rank()]
        return (model(x) - x.sin()).square().mean()

    sharded = Sharded(model, loss)
    sharded.backward(0)
    norm = model.norm.weight  # what this is here for
    assert norm.grad.placements != norm.placements == (Replicate(),), (norm.grad.placements, norm.placements)
    return sharded


def plain_beside() -> Sharded:
    """The first layer is replicated, its gradients averaged by hand."""
    from torch.distributed.fsdp import fully_shard

    model = layers(WIDTH, 17, 5)
    fully_shard(model[2], mesh=mesh(2))
    one = loss_of(model, dist.get_rank())
    for p in model[0].parameters():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(2)))
    return Sharded(model, one)


def two_meshes() -> Sharded:
    from torch.distributed.fsdp import fully_shard

    model = layers(WIDTH, 17, 9, 1)
    fully_shard(model[0], mesh=mesh(4))
    fully_shard(model[2], mesh=mesh(2, 2, names=("replicate", "shard")))
    fully_shard(model[4], mesh=mesh(4))
    return Sharded(model, loss_of(model, dist.get_rank()))


#: By name: how many processes, and what builds it in each.
MODELS: dict[str, tuple[int, Callable[[], Sharded]]] = {
    "fsdp2": (2, fsdp2),
    "fsdp2_bf16": (2, fsdp2_bf16),
    "fsdp2_kept": (2, lambda: fsdp2(reshard_after_forward=False)),
    "fsdp2_uneven": (4, lambda: fsdp2(WIDTH, 17, 1)),
    "fsdp2_empty": (4, lambda: fsdp2(WIDTH, 3, 1)),  # nothing in the last process
    "fsdp2_offloaded": (2, fsdp2_offloaded),
    "fsdp2_accumulated": (2, fsdp2_accumulated),
    "hsdp": (4, hsdp),
    "tensor_parallel": (2, tensor_parallel),
    "tensor_parallel_and_fsdp2": (4, tensor_parallel_and_fsdp2),
    "sequence_parallel": (2, sequence_parallel),
    "plain_beside": (2, plain_beside),
    "two_meshes": (4, two_meshes),
}


@functools.cache
def _built(name: str) -> Sharded:
    return MODELS[name][1]()


def built(name: str) -> Sharded:
    """One of each is kept in a process, as wrapping takes longer than a test."""
    sharded = _built(name)
    sharded.restore()
    return sharded

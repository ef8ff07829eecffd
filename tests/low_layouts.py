"""One model of 16-bit numbers in every layout, and optimizers that store it in fewer bits: what every process steps,
beside the same model whole, with the same gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cases import assert_same_raw
from sharded_models import is_dtensor, mesh, shard
from torch import Tensor, nn

import fusedoptim

BF16 = torch.bfloat16
BLOCK = 128


class Net(nn.Module):
    """Matrices with rows of several blocks and of parts of one, uneven over 2, 3 and 4 ranks; some of which have
    nothing of the last. Nobody runs it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up = nn.Linear(192, 42, dtype=dtype)
            self.down = nn.Linear(512, 17, dtype=dtype)
            self.conv = nn.Conv2d(16, 6, 8, dtype=dtype)
            self.small = nn.Linear(6, 3, dtype=dtype)


# ---- layouts ----


def fsdp2(model: Net, on: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in (model.up, model.down, model):
        fully_shard(module, mesh=on or mesh(dist.get_world_size()), **options)
    return model


def in_columns(model: Net, on: Any = None) -> nn.Module:
    """In whole blocks, where these are several; in rows else."""
    from torch.distributed.tensor import Shard

    columns = {model.down.weight, model.conv.weight}
    return fsdp2(model, on, shard_placement_fn=lambda p: Shard(int(p in columns)))


def tensor_parallel(model: Net, on: Any = None) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(
        model, on or mesh(dist.get_world_size()), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def both(model: Net) -> nn.Module:
    """``up`` is cut twice by rows, ``down`` by rows and by columns."""
    on = mesh(2, 2, names=("data", "tensor"))
    return fsdp2(tensor_parallel(model, on["tensor"]), on["data"])


def both_in_columns(model: Net) -> nn.Module:
    """``down`` is cut twice by columns."""
    on = mesh(2, 2, names=("data", "tensor"))
    return in_columns(tensor_parallel(model, on["tensor"]), on["data"])


def hsdp(model: Net) -> nn.Module:
    return fsdp2(model, mesh(2, 2, names=("replicate", "shard")))


def ddp(model: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def single(model: Net) -> nn.Module:
    return model


Layout = Callable[[Net], nn.Module]
LAYOUTS: dict[str, Layout] = {
    f.__name__: f for f in (fsdp2, in_columns, tensor_parallel, both, both_in_columns, hsdp, ddp, single)
}


# ---- optimizers ----


@dataclass(frozen=True)
class Low:
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = BF16

    def make(self, params: Any, **more: Any) -> Any:
        return getattr(fusedoptim, self.optimizer)(params, **{"lr": 0.01, "rounding_seed": 5, **self.options, **more})


CASES = {
    "all stochastic": Low("AdamW", {"rounding": "stochastic", "state_dtype": BF16}),
    "remainder": Low("AdamW", {"master": "remainder", "state_dtype": BF16, "ema_decay": 0.9}),
    "8 bits": Low("AdamW", {"master": "remainder", "state_dtype": "int8"}),
    "8 bits stochastic": Low("AdamW", {"rounding": "stochastic", "state_dtype": "int8"}),
    "remainder8": Low("Adam", {"master": "remainder8", "state_dtype": {"exp_avg": "int8"}, "amsgrad": True}),
    "master": Low("RMSprop", {"master": torch.float32, "state_dtype": BF16, "centered": True, "momentum": 0.9}),
    "sgd": Low("SGD", {"momentum": 0.9, "rounding": "stochastic", "state_dtype": "int8"}),
    "adagrad": Low("Adagrad", {"state_dtype": "int8", "initial_accumulator_value": 0.1}, torch.float32),
}


# ---- what a process has of the model ----


class Part:
    """The model in a layout, of which it is known which elements are here."""

    def __init__(self, layout: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.model = _in_place(layout, dtype)
        self.params = list(self.model.parameters())
        self.index = [index.clone() for index in indices(layout)]
        for i, p in enumerate(self.params):
            shard(p).copy_(self.part(i, value(i, p, seed)))

    def part(self, i: int, whole: Tensor) -> Tensor:
        """Of a tensor of the i-th parameter's shape, what is here."""
        return whole.flatten()[self.index[i].flatten()].view(self.index[i].shape)

    def set_gradients(self, step: int) -> None:
        for i, p in enumerate(self.params):
            g = torch.empty_like(p)
            shard(g).copy_(self.part(i, gradient(i, p, step)))
            p.grad = g

    def advance(self, optimizer: Any, steps: range) -> None:
        for step in steps:
            self.set_gradients(step)
            optimizer.step()


def _in_place(layout: str, dtype: torch.dtype) -> nn.Module:
    return LAYOUTS[layout](Net(dtype))


@functools.cache
def indices(layout: str) -> list[Tensor]:
    """Of the elements that are here, in each parameter: by sharding their numbers."""
    net = Net(torch.float32)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    return [shard(p).long() for p in LAYOUTS[layout](net).parameters()]


def value(i: int, p: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i)).to(p.dtype)


def gradient(i: int, p: Tensor, step: int) -> Tensor:
    """Such that elements of a block differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(100 * step + i)
    size = torch.randn(p.shape, generator=generator).mul(3).exp()
    return torch.randn(p.shape, generator=generator).mul_(size).to(p.dtype)


# ---- the same of one process ----


def alone(case: str, steps: int, named: bool) -> list[dict[str, Tensor]]:
    """Parameters and states of one process that has all of them, by the reference."""
    return _run_alone(case, named)[steps - 1]


@functools.cache
def _run_alone(case: str, named: bool) -> list[list[dict[str, Tensor]]]:
    part = Part("single", CASES[case].dtype)
    optimizer = CASES[case].make(params_of(part.model, named), backend="reference")
    found = []
    for step in range(4):
        part.advance(optimizer, range(step, step + 1))
        found.append(contents(part.params, optimizer))
    return found


def params_of(model: nn.Module, named: bool) -> Any:
    return model.named_parameters() if named else model.parameters()


def contents(params: list[Tensor], optimizer: Any) -> list[dict[str, Tensor]]:
    """What is here."""
    return [
        {k: shard(t).clone() for k, t in {"parameter": p, **optimizer.state[p]}.items() if t is not None}
        for p in params
    ]


def assert_a_part(part: Part, optimizer: Any, expected: list[dict[str, Tensor]], what: str) -> None:
    """Every element and every scale that is here is the one that belongs here."""
    for i, (p, found) in enumerate(zip(part.params, contents(part.params, optimizer), strict=True)):
        assert found.keys() == expected[i].keys(), (what, i, found.keys(), expected[i].keys())
        for name, own in found.items():
            whole, about = expected[i][name], f"{what}: {name} of parameter {i}"
            if name.endswith("_scale"):
                assert own.shape[0] == part.index[i].shape[0], about
                own, whole = (by_element(t, of) for t, of in ((own, part.index[i]), (whole, expected[i]["parameter"])))
            if whole.dim():
                whole = part.part(i, whole)
            assert_same_raw(own, whole, about)
        for name, state in optimizer.state[p].items():
            if is_dtensor(p) and isinstance(state, Tensor) and name != "step":
                assert is_dtensor(state) and state.placements == p.placements, (what, i, name)
                rows, blocks = p.shape[0], -(-p.shape[1:].numel() // BLOCK)
                assert state.shape == ((rows, blocks) if name.endswith("_scale") else p.shape), (what, i, name)


def by_element(scales: Tensor, of: Tensor) -> Tensor:
    """The scale of each element."""
    rows = scales.repeat_interleave(BLOCK, 1)
    return rows[:, : of.shape[1:].numel()].reshape(of.shape)


def distributed(t: Tensor, *placements: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, mesh(dist.get_world_size()), placements, src_data_rank=None)


def differ(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]

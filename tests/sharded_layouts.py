"""One model in every layout that a checkpoint can move to, with an optimizer of every kind.

The model has a branch for each optimizer, with a loss of its own, because to wrap a model takes longer than to train
it. Every process has the same data, so that means of gradients are exact, and all layouts compute the same bits but
those that are tensor parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from sharded_models import layers, mesh, shard, whole
from torch import Tensor, nn

#: The last layer has no element in most processes, and the rows of the first are uneven.
WIDTHS = (6, 18, 1)


def fsdp2(model: nn.Module, on: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=on or mesh(dist.get_world_size()))


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp2(model, mesh(2, 2, names=("replicate", "shard")))


def tensor_parallel(model: nn.Module, on: Any = None) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    on = on or mesh(dist.get_world_size())
    return parallelize_module(model, on, {"*.0": ColwiseParallel(), "*.2": RowwiseParallel()})


def both(model: nn.Module) -> nn.Module:
    """Tensor parallel within pairs, FSDP2 over them."""
    on = mesh(2, 2, names=("data", "tensor"))
    return fsdp2(tensor_parallel(model, on["tensor"]), on["data"])


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def single(model: nn.Module) -> nn.Module:
    return model


LAYOUTS: dict[str, Callable[[Any], nn.Module]] = {
    f.__name__: f for f in (fsdp2, hsdp, tensor_parallel, both, ddp, single)
}
#: Those whose losses are one process's.
EXACT = {"fsdp2", "hsdp", "ddp", "single"}


class Branches(nn.Module):
    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.of = nn.ModuleDict({name: layers(*WIDTHS) for name in names})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: branch(x) for name, branch in self.of.items()}


Tensors = list[dict[str, Tensor]]


class Training:
    """A model in a layout, and its optimizers with two groups each; another ``seed`` has other values throughout."""

    def __init__(self, layout: str, cases: Iterable[Case], seed: int = 0, of_torch: bool = False) -> None:
        cases = list(cases)
        branches = Branches(case.name for case in cases)
        with torch.no_grad():
            for p in branches.parameters():
                p.add_(seed)
        self.model = LAYOUTS[layout](branches)
        self.optimizers: dict[str, Any] = {}
        for case in cases:
            first, _, last = branches.of[case.name]
            groups = [{"params": list(m.parameters())} for m in (first, last)]
            groups[0]["lr"] = 0.003 * (1 + seed)  # type: ignore[assignment]
            make = {False: case.make, True: case.make_torch}[of_torch]
            self.optimizers[case.name] = make(groups, **({"foreach": False} if of_torch else {}))

    def go_on(self, steps: range) -> dict[str, Any]:
        """Every optimizer's losses, parameters and states, whole."""
        losses: dict[str, list[Tensor]] = {name: [] for name in self.optimizers}
        for step in steps:
            x = torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(step))
            of_branches = {n: (y - x.sum(1, keepdim=True).sin()).square().mean() for n, y in self.model(x).items()}
            sum(of_branches.values()).backward()  # type: ignore[union-attr]
            for name, optimizer in self.optimizers.items():
                losses[name].append(of_branches[name].detach())
                optimizer.step()
                optimizer.zero_grad()
        contents = self.contents()
        return {name: {"losses": losses[name], "content": contents[name]} for name in losses}

    def contents(self, of: Callable[[Tensor], Tensor] = whole) -> dict[str, Tensors]:
        """Parameters and states, whole (a collective), or this process's shards."""
        found = {}
        for name, optimizer in self.optimizers.items():
            found[name] = [
                {
                    key: of(torch.as_tensor(value)).clone()
                    for key, value in {"parameter": p, **optimizer.state.get(p, {})}.items()
                    if value is not None
                }
                for group in optimizer.param_groups
                for p in group["params"]
            ]
        return found

    def shards(self) -> dict[str, Tensors]:
        return self.contents(shard)

    def rates(self) -> dict[str, list[float]]:
        return {name: [group["lr"] for group in o.param_groups] for name, o in self.optimizers.items()}

"""What tests of steps under a TorchDispatchMode share."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, parameters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(5,), (3, 4), (1,)]


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def pair(case: Case, **options: Any) -> tuple[list, list, Any, Any]:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    return mine, theirs, case.make(mine, **options), case.make(theirs, **options)


def operators(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if "fusedoptim" in str(n.target)]


def traced(optimizer: torch.optim.Optimizer) -> torch.fx.GraphModule:
    return make_fx(lambda x: (optimizer.step(), x)[1])(torch.ones(1))

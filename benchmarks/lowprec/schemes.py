"""The ways to keep parameters and AdamW's states that are compared: fusedoptim's, and what others have."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fusedoptim
from fusedoptim import reference

Named = list[tuple[str, nn.Parameter]]
#: What all of them are given. Other defaults differ from library to library.
ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Scheme:
    name: str
    #: What one writes for it.
    options: str
    make: Callable[[Named, float, int], Any]
    #: Of the parameters that the optimizer steps.
    dtype: torch.dtype = torch.bfloat16
    #: Whether the model computes with bf16 weights and the optimizer gets bf16 gradients.
    half: bool = True
    #: What to import.
    module: str = "fusedoptim"

    def missing(self) -> str | None:
        """Why it cannot take part."""
        name = self.module.partition(".")[0]
        return None if importlib.util.find_spec(name) else f"{name} is not installed"

    def seen(self, p: Tensor) -> Tensor:
        """The weight that the model computes with: of fp32 parameters, their upper halves as with a remainder."""
        return rounded(p) if self.half and p.dtype == torch.float32 else p.detach()


def rounded(x: Tensor) -> Tensor:
    """fp32 to bf16 as ``master="remainder"`` rounds."""
    return reference.encode("bf16_remainder", x.detach(), None)[0]


def number(p: Tensor, states: dict[str, Any]) -> Tensor:
    """The fp32 numbers that a parameter stands for, with what its states keep of them."""
    for name, storage in (("param_remainder", "bf16_remainder"), ("param_remainder8", "bf16_remainder8")):
        if name in states:
            return reference.decode(storage, p.detach(), states[name])
    return states["param_master"] if "param_master" in states else p.detach().float()


def bytes_of(optimizer: Any) -> int:
    """Of parameters and states."""
    if isinstance(optimizer, fusedoptim.FusedOptimizer):
        memory = optimizer.memory()
        return memory.parameters + sum(memory.states.values())
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [x for states in optimizer.state.values() for x in states.values() if isinstance(x, Tensor)]
    storages = {s._cdata: s.nbytes() for x in tensors for part in _parts(x) for s in [part.untyped_storage()]}
    return sum(storages.values())


def _parts(x: Tensor) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from _parts(getattr(x, name))
    else:
        yield x


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()).replace("'", '"')


def _ours(name: str, dtype: torch.dtype = torch.bfloat16, half: bool = True, **options: Any) -> Scheme:
    def make(params: Named, lr: float, seed: int) -> Any:
        seeded = {"rounding_seed": seed} if options else {}
        return fusedoptim.AdamW(params, lr=lr, **ADAMW, **options, **seeded)

    return Scheme(name, _written(options), make, dtype, half)


def _other(name: str, path: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Scheme:
    module, _, optimizer = path.rpartition(".")

    def make(params: Named, lr: float, seed: int) -> Any:
        torch.manual_seed(seed)  # of which torchao's random bits come
        cls = getattr(importlib.import_module(module), optimizer)
        return cls([p for _, p in params], lr=lr, **ADAMW, **options)

    written = f"{optimizer}({_written(options)})" if options else optimizer
    return Scheme(name, written, make, dtype, module=module)


#: Plain fp32 parameters and states, of which the model sees the upper halves: no scheme can do better with them.
EXACT = _ours("exact", torch.float32)
FP32 = "fp32"
_STOCHASTIC: dict[str, Any] = {"rounding": {"param": "stochastic"}}
_FP32: dict[str, Any] = {"state_dtype": torch.float32}
_INT8: dict[str, Any] = {"state_dtype": "int8"}
_OURS = (
    _ours(FP32, torch.float32, half=False),
    _ours("master", master=torch.float32),
    _ours("remainder, fp32 moments", master="remainder", **_FP32),
    _ours("remainder", master="remainder"),
    _ours("remainder, 8-bit m", master="remainder", state_dtype={"exp_avg": "int8"}),
    _ours("remainder, 8 bits", master="remainder", **_INT8),
    _ours("remainder8, 8 bits", master="remainder8", **_INT8),
    _ours("stochastic", **_STOCHASTIC),
    _ours("stochastic, 8 bits", **_STOCHASTIC, **_INT8),
    _ours("bf16"),
)
_OTHERS = (
    _other("torch, bf16", "torch.optim.AdamW"),
    _other("torchao, bf16", "torchao.optim._AdamW", bf16_stochastic_round=True),
    _other("torchao, bf16, 8 bits", "torchao.optim.AdamW8bit", bf16_stochastic_round=True),
    _other("torchao, fp32, 8 bits", "torchao.optim.AdamW8bit", torch.float32),
    _other("bitsandbytes, bf16, 8 bits", "bitsandbytes.optim.AdamW8bit"),
    _other("bitsandbytes, fp32, 8 bits", "bitsandbytes.optim.AdamW8bit", torch.float32),
)
SCHEMES = {scheme.name: scheme for scheme in (*_OURS, *_OTHERS)}

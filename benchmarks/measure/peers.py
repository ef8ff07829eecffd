"""The optimizers to compare with, each used in the fastest way that it documents for the dtypes asked for.

Below what a peer has stands the function from work and groups to its optimizer, which has a ``step()``. That it steps,
in those dtypes, and to the same result, is checked when it is measured (check.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import Case
from .optimizers import Work
from .timing import explain

Groups = list[dict[str, Any]]
FLOAT_ONLY = ("fp32",)
#: States in the parameter's dtype; states in fp32; either.
PURE, WIDE, ALL = ("fp32", "bf16"), ("fp32", "bf16+fp32"), ("fp32", "bf16", "bf16+fp32")
#: Compilers of a whole step take about a second per so many tensors; beyond this they would take minutes.
COMPILED_TENSORS = 32
#: Likewise those that compile a step for each shape.
COMPILED_SHAPES = 64


@dataclass(frozen=True)
class Peer:
    name: str
    make: Callable[[Work, Groups], Any]
    #: Optimizer to the dtypes that it has for it.
    has: Mapping[str, tuple[str, ...]]
    #: And for all others.
    has_others: tuple[str, ...] | None = None
    #: What to import, and what to install if that is called otherwise.
    module: str = "torch"
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    #: Optimizers that it has for the CPU alone.
    cpu_only: tuple[str, ...] = ()
    most_tensors: int | None = None
    most_shapes: int | None = None
    #: Optimizers of the name, with another formula.
    differs: Mapping[str, str] = field(default_factory=dict)
    #: Whether a CUDA graph can capture its step; others may leave a failed capture behind.
    capturable: bool = False
    #: Bytes that a step needs beside parameters, gradients and states, as a multiple of the parameters.
    temporary: int = 0

    def problem(self, work: Work, case: Case, device: str) -> str | None:
        """Why it cannot take part."""
        if device not in self.devices:
            return f"is not for {device}"
        dtypes = self.has.get(work.setting.name, self.has_others)
        if dtypes is None:
            return f"has no {work.setting.name}"
        if device != "cpu" and work.setting.name in self.cpu_only:
            return f"has no {work.setting.name} for {device}"
        if work.dtypes.name not in dtypes:
            return f"has no {work.setting.name} in {work.dtypes.name}"
        if self.most_tensors is not None and len(case.shapes) > self.most_tensors:
            return f"compiles for minutes beyond {self.most_tensors} tensors"
        if self.most_shapes is not None and len(set(case.shapes)) > self.most_shapes:
            return f"compiles for minutes beyond {self.most_shapes} different shapes"
        return self.missing()

    def missing(self) -> str | None:
        name = self.module.partition(".")[0]
        package = self.package or name
        if importlib.util.find_spec(name) is None:
            return f"{package} is not installed"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(self.module)
        except Exception as error:  # what a broken installation raises is anyone's guess
            return f"{package} cannot be imported: {explain(error)}"
        return None


class _ClipsFirst:
    """torch's clipping of gradients, in their place, before each step."""

    def __init__(self, optimizer: Any, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.state, self.param_groups = optimizer.state, optimizer.param_groups
        self.params = [p for group in self.param_groups for p in group["params"]]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()


#: All of them, in the order in which they take part and are shown.
PEERS: dict[str, Peer] = {}
Adapter = Callable[[Any, Work, Groups], Any]
_TORCH = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")
#: Without fused code.
_TORCH_PLAIN = ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")


def _in(dtypes: tuple[str, ...], *optimizers: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(optimizers, dtypes)


def _peer(name: str, has: Mapping[str, tuple[str, ...]], **more: Any) -> Callable[[Adapter], Adapter]:
    """Adds a peer whose adapter also gets its module."""

    def add(adapt: Adapter) -> Adapter:
        def make(work: Work, groups: Groups) -> Any:
            return adapt(importlib.import_module(PEERS[name].module), work, groups)

        PEERS[name] = Peer(name, make, has, **more)
        return adapt

    return add


def _torch(work: Work, groups: Groups, **how: Any) -> Any:
    optimizer = getattr(torch.optim, work.setting.optimizer)(groups, **work.setting.options, **how)
    limit = work.setting.max_grad_norm
    return optimizer if limit is None else _ClipsFirst(optimizer, limit)


@_peer("torch for-loop", _in(PURE, *_TORCH, *_TORCH_PLAIN), temporary=1)
def _for_loop(_: Any, work: Work, groups: Groups) -> Any:
    return _torch(work, groups, foreach=False)


@_peer("torch foreach", _in(PURE, *_TORCH, *_TORCH_PLAIN, "AdamW+clip"), temporary=3)
def _foreach(_: Any, work: Work, groups: Groups) -> Any:
    return _torch(work, groups, foreach=True)


@_peer(
    "torch fused", _in(PURE, "AdamW", "AdamW+clip", "Adam", "SGD", "Adagrad"), cpu_only=("Adagrad",), capturable=True
)
def _fused(_: Any, work: Work, groups: Groups) -> Any:
    return _torch(work, groups, fused=True)


@_peer("torch compiled", _in(PURE, *_TORCH, *_TORCH_PLAIN), most_tensors=COMPILED_TENSORS)
class _Compiled:
    """torch's foreach code, compiled as a whole; the first step compiles."""

    def __init__(self, _: Any, work: Work, groups: Groups) -> None:
        torch.compiler.reset()
        self.optimizer = _torch(work, groups, foreach=True)
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups
        self.step = torch.compile(self.optimizer.step)


def ours(work: Work, groups: Groups, backend: str | None = None) -> Any:
    """fusedoptim, with the backend that it chooses or another one."""
    options = work.dtypes.options or {"state_dtype": work.dtypes.state if work.dtypes.mixed else None}
    return work.setting.make(groups, backend=backend, **options)


@_peer("to nearest", _in(("stochastic",), "AdamW"), differs={"AdamW": "rounds to nearest"})
def _nearest(_: Any, work: Work, groups: Groups) -> Any:
    """fusedoptim without options: bf16 that is rounded to nearest."""
    return work.setting.make(groups)


@_peer(
    "eager reference",
    {"NormAdaptive": ALL} | _in((), *_TORCH, *_TORCH_PLAIN, "AdamW+clip"), has_others=ALL, temporary=4,
)  # fmt: skip
def _reference(_: Any, work: Work, groups: Groups) -> Any:
    """For what torch does not have."""
    return ours(work, groups, "reference")


@_peer(
    "Triton backend",
    _in(ALL, *_TORCH, "AdamW+clip", "NormAdaptive"), module="triton", devices=("cuda",), capturable=True,
)  # fmt: skip
def _triton(_: Any, work: Work, groups: Groups) -> Any:
    return ours(work, groups, "triton")


@_peer("DeepSpeedCPUAdam", _in(ALL, "AdamW", "Adam", "Adagrad"), module="deepspeed.ops.adam", devices=("cpu",))
def _deepspeed_cpu(module: Any, work: Work, groups: Groups) -> Any:
    """Takes states in fp32 or in the parameters' dtype. Its operator is compiled at first use, and kept."""
    how = {"fp32_optimizer_states": work.dtypes.state == torch.float32, **work.setting.options}
    if work.setting.name == "Adagrad":
        return importlib.import_module("deepspeed.ops.adagrad").DeepSpeedCPUAdagrad(groups, **how)
    return module.DeepSpeedCPUAdam(groups, adamw_mode=work.setting.name == "AdamW", **how)


@_peer("DeepSpeed FusedAdam", _in(PURE, "AdamW", "Adam"), module="deepspeed.ops.adam", devices=("cuda",))
def _deepspeed_cuda(module: Any, work: Work, groups: Groups) -> Any:
    return module.FusedAdam(groups, adam_w_mode=work.setting.name == "AdamW", **work.setting.options)


@_peer("bitsandbytes", _in(WIDE, *_TORCH), module="bitsandbytes.optim", temporary=3)
def _bitsandbytes(module: Any, work: Work, groups: Groups) -> Any:
    return getattr(module, f"{work.setting.name}32bit")(groups, **work.setting.options)


@_peer(
    "apex",
    {"AdamW": WIDE, "Adam": WIDE, "SGD": FLOAT_ONLY, "Adagrad": FLOAT_ONLY}, module="apex.optimizers",
    package="NVIDIA apex, built with its CUDA extensions,", devices=("cuda",),
)  # fmt: skip
def _apex(module: Any, work: Work, groups: Groups) -> Any:
    name = work.setting.name
    how = {"adam_w_mode": name == "AdamW"} if name in ("Adam", "AdamW") else {}
    return getattr(module, f"Fused{name.removesuffix('W')}")(groups, **work.setting.options, **how)


@_peer(
    "TransformerEngine",
    {"AdamW": ALL, "Adam": ALL, "SGD": FLOAT_ONLY}, module="transformer_engine.pytorch.optimizers",
    package="transformer-engine[pytorch]", devices=("cuda",),
)  # fmt: skip
def _transformer_engine(module: Any, work: Work, groups: Groups) -> Any:
    if work.setting.name == "SGD":
        return module.FusedSGD(groups, **work.setting.options)
    states = {"exp_avg_dtype": work.dtypes.state, "exp_avg_sq_dtype": work.dtypes.state}
    return module.FusedAdam(groups, adam_w_mode=work.setting.name == "AdamW", **work.setting.options, **states)


@_peer("torchao", {"AdamW": PURE}, module="torchao.optim", most_shapes=COMPILED_SHAPES, temporary=1)
def _torchao(module: Any, work: Work, groups: Groups) -> Any:
    """Compiles one step per shape. ``_AdamW`` is its unquantised class."""
    return module._AdamW(groups, **work.setting.options)


@_peer("optimi", _in(PURE, "AdamW", "Adam", "SGD"), module="optimi", package="torch-optimi", temporary=1)
def _optimi(module: Any, work: Work, groups: Groups) -> Any:
    """Triton on a GPU, else the for-loop: the foreach code is deprecated and gives other results than the for-loop.
    Kahan summation, which would add a state for 16-bit parameters, is off."""
    how = {"foreach": False, "triton": groups[0]["params"][0].is_cuda, "kahan_sum": False}
    return getattr(module, work.setting.name)(groups, **work.setting.options, **how)


@_peer(
    "heavyball",
    {"AdamW": ALL, "SGD": ALL}, module="heavyball", most_tensors=COMPILED_TENSORS, temporary=1,
    differs={"SGD": "its momentum is a weighted average"},
)  # fmt: skip
def _heavyball(module: Any, work: Work, groups: Groups) -> Any:
    options = {("beta" if name == "momentum" else name): value for name, value in work.setting.options.items()}
    how = {"storage_dtype": str(work.dtypes.state).removeprefix("torch."), "compile_step": True}
    return getattr(module, work.setting.name)(groups, **how, **options)

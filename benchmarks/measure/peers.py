"""The optimizers to compare with, each used in the fastest way that it documents for the dtypes asked for.

An adapter is a function from the work and its groups to an optimizer with a ``step()``, and the optimizers and dtypes
that the peer has. That it steps, in those dtypes, and to the same result, is checked when it is measured (check.py).
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
    #: What to import, and what to install.
    module: str = "torch"
    package: str = "torch"
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
        dtypes = self.has.get(work.setting.name)
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
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"{self.package} is not installed"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(self.module)
        except Exception as error:  # what a broken installation raises is anyone's guess
            return f"{self.package} cannot be imported: {explain(error)}"
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


def _torch(**how: Any) -> Callable[[Work, Groups], Any]:
    def make(work: Work, groups: Groups) -> Any:
        optimizer = getattr(torch.optim, work.setting.optimizer)(groups, **work.setting.options, **how)
        limit = work.setting.max_grad_norm
        return optimizer if limit is None else _ClipsFirst(optimizer, limit)

    return make


class _Compiled:
    """torch's foreach code, compiled as a whole; the first step compiles."""

    def __init__(self, work: Work, groups: Groups) -> None:
        torch.compiler.reset()
        self.optimizer = _torch(foreach=True)(work, groups)
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups
        self.step = torch.compile(self.optimizer.step)


def ours(work: Work, groups: Groups, backend: str | None = None) -> Any:
    """fusedoptim, with the backend that it chooses or another one."""
    state_dtype = work.dtypes.state if work.dtypes.mixed else None
    return work.setting.make(groups, state_dtype=state_dtype, backend=backend)


def _own(backend: str) -> Callable[[Work, Groups], Any]:
    return lambda work, groups: ours(work, groups, backend)


def _deepspeed_cpu(work: Work, groups: Groups) -> Any:
    """Takes states in fp32 or in the parameters' dtype. Its operator is compiled at first use, and kept."""
    wide = {"fp32_optimizer_states": work.dtypes.state == torch.float32}
    if work.setting.name == "Adagrad":
        return importlib.import_module("deepspeed.ops.adagrad").DeepSpeedCPUAdagrad(
            groups, **work.setting.options, **wide
        )
    cls = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    return cls(groups, adamw_mode=work.setting.name == "AdamW", **work.setting.options, **wide)


def _deepspeed_cuda(work: Work, groups: Groups) -> Any:
    cls = importlib.import_module("deepspeed.ops.adam").FusedAdam
    return cls(groups, adam_w_mode=work.setting.name == "AdamW", **work.setting.options)


def _bitsandbytes(work: Work, groups: Groups) -> Any:
    return getattr(importlib.import_module("bitsandbytes.optim"), f"{work.setting.name}32bit")(
        groups, **work.setting.options
    )


def _apex(work: Work, groups: Groups) -> Any:
    name = work.setting.name
    how = {"adam_w_mode": name == "AdamW"} if name in ("Adam", "AdamW") else {}
    cls = getattr(importlib.import_module("apex.optimizers"), f"Fused{name.removesuffix('W')}")
    return cls(groups, **work.setting.options, **how)


def _transformer_engine(work: Work, groups: Groups) -> Any:
    module = importlib.import_module("transformer_engine.pytorch.optimizers")
    if work.setting.name == "SGD":
        return module.FusedSGD(groups, **work.setting.options)
    states = {"exp_avg_dtype": work.dtypes.state, "exp_avg_sq_dtype": work.dtypes.state}
    return module.FusedAdam(groups, adam_w_mode=work.setting.name == "AdamW", **work.setting.options, **states)


def _torchao(work: Work, groups: Groups) -> Any:
    """Compiles one step per shape. ``_AdamW`` is its unquantised class."""
    return importlib.import_module("torchao.optim")._AdamW(groups, **work.setting.options)


def _optimi(work: Work, groups: Groups) -> Any:
    """Triton on a GPU, else the for-loop: the foreach code is deprecated and gives other results than the for-loop.
    Kahan summation, which would add a state for 16-bit parameters, is off."""
    on_gpu = groups[0]["params"][0].is_cuda
    how = {"foreach": False, "triton": on_gpu, "kahan_sum": False}
    return getattr(importlib.import_module("optimi"), work.setting.name)(groups, **work.setting.options, **how)


def _heavyball(work: Work, groups: Groups) -> Any:
    options = dict(work.setting.options)
    if work.setting.name == "SGD":
        options["beta"] = options.pop("momentum")
    cls = getattr(importlib.import_module("heavyball"), work.setting.name)
    return cls(groups, storage_dtype=str(work.dtypes.state).removeprefix("torch."), compile_step=True, **options)


_TORCH = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")
PEERS = {
    p.name: p
    for p in (
        Peer("torch for-loop", _torch(foreach=False), dict.fromkeys(_TORCH, PURE), temporary=1),
        Peer("torch foreach", _torch(foreach=True), dict.fromkeys((*_TORCH, "AdamW+clip"), PURE), temporary=3),
        Peer(
            "torch fused",
            _torch(fused=True),
            dict.fromkeys(("AdamW", "AdamW+clip", "Adam", "SGD", "Adagrad"), PURE),
            cpu_only=("Adagrad",),
            capturable=True,
        ),
        Peer("torch compiled", _Compiled, dict.fromkeys(_TORCH, PURE), most_tensors=COMPILED_TENSORS),
        Peer("eager reference", _own("reference"), {"NormAdaptive": ALL}, temporary=4),
        Peer(
            "Triton backend",
            _own("triton"),
            dict.fromkeys((*_TORCH, "AdamW+clip", "NormAdaptive"), ALL),
            module="triton",
            package="triton",
            devices=("cuda",),
            capturable=True,
        ),
        Peer(
            "DeepSpeedCPUAdam",
            _deepspeed_cpu,
            dict.fromkeys(("AdamW", "Adam", "Adagrad"), ALL),
            module="deepspeed.ops.adam",
            package="deepspeed",
            devices=("cpu",),
        ),
        Peer(
            "DeepSpeed FusedAdam",
            _deepspeed_cuda,
            dict.fromkeys(("AdamW", "Adam"), PURE),
            module="deepspeed.ops.adam",
            package="deepspeed",
            devices=("cuda",),
        ),
        Peer(
            "bitsandbytes",
            _bitsandbytes,
            dict.fromkeys(_TORCH, WIDE),
            module="bitsandbytes.optim",
            package="bitsandbytes",
            temporary=3,
        ),
        Peer(
            "apex",
            _apex,
            {"AdamW": WIDE, "Adam": WIDE, "SGD": FLOAT_ONLY, "Adagrad": FLOAT_ONLY},
            module="apex.optimizers",
            package="NVIDIA apex, built with its CUDA extensions,",
            devices=("cuda",),
        ),
        Peer(
            "TransformerEngine",
            _transformer_engine,
            {"AdamW": ALL, "Adam": ALL, "SGD": FLOAT_ONLY},
            module="transformer_engine.pytorch.optimizers",
            package="transformer-engine[pytorch]",
            devices=("cuda",),
        ),
        Peer(
            "torchao",
            _torchao,
            {"AdamW": PURE},
            module="torchao.optim",
            package="torchao",
            most_shapes=COMPILED_SHAPES,
            temporary=1,
        ),
        Peer(
            "optimi",
            _optimi,
            dict.fromkeys(("AdamW", "Adam", "SGD"), PURE),
            module="optimi",
            package="torch-optimi",
            temporary=1,
        ),
        Peer(
            "heavyball",
            _heavyball,
            {"AdamW": ALL, "SGD": ALL},
            module="heavyball",
            package="heavyball",
            most_tensors=COMPILED_TENSORS,
            temporary=1,
            differs={"SGD": "its momentum is a weighted average"},
        ),
    )
}

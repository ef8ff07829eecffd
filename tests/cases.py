"""The registry: one row per optimizer variant. Parity, layout, dtype, state_dict and property tests run over it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import fusedoptim
from fusedoptim._backends import is_own

#: The backend of every optimizer that a test makes without naming one. None is the user's default.
BACKEND = os.environ.get("FUSEDOPTIM_TEST_BACKEND")
#: Set where tests run once more, under a sanitizer: of large products a covering part is enough.
COVERING = "FUSEDOPTIM_TEST_COVERING" in os.environ


@dataclass(frozen=True)
class Case:
    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Whether torch.optim has this variant.
    in_torch: bool = True

    @property
    def cls(self) -> type[fusedoptim.FusedOptimizer]:
        found: type[fusedoptim.FusedOptimizer] = getattr(fusedoptim, self.optimizer)
        return found

    @property
    def own(self) -> bool:
        """Whether its rule is a function alone, as those of the gallery are."""
        return is_own(self.cls.rule)

    def runs_on(self, backend: str | None) -> bool:
        """Whether that has something to step it with: CUDA's kernels come with the package."""
        return not self.own or backend != "cuda"

    @property
    def as_it_is(self) -> dict[str, Any]:
        """Options for steps that are not what is tested: a function is run, not compiled, which takes a second anew for
        each mix of dtypes and every other side of its conditions."""
        return {"backend": "reference"} if self.own else {}

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Of its constructor. Skips the test if a backend is asked for that it does not run on."""
        options = {"backend": BACKEND, **self.options, **more}
        if not self.runs_on(options["backend"]):
            pytest.skip("it has no CUDA kernels")
        return options

    def make(self, params: Any, **more: Any) -> fusedoptim.FusedOptimizer:
        return self.cls(params, **self.arguments(**more))

    def make_torch(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(params, **{**self.options, **more})

    def __str__(self) -> str:
        return self.name


def _other(name: str, optimizer: str, **options: Any) -> Case:
    """One that torch.optim does not have."""
    return Case(name, optimizer, options, in_torch=False)


CASES = [
    Case("adam", "Adam"),
    Case("adam_decay", "Adam", {"weight_decay": 0.1, "eps": 1e-6}),
    Case("adam_amsgrad", "Adam", {"amsgrad": True}),
    Case("adam_amsgrad_decay_max", "Adam", {"amsgrad": True, "weight_decay": 0.03, "maximize": True}),
    Case("adam_small_betas", "Adam", {"betas": (0.3, 0.45), "lr": 0.01}),
    Case("adam_zero_betas", "Adam", {"betas": (0.0, 0.0)}),
    Case("adam_decoupled", "Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("adam_no_correction", "Adam", {"bias_correction": False, "weight_decay": 0.1}, in_torch=False),
    Case("adamw", "AdamW"),
    Case("adamw_amsgrad", "AdamW", {"amsgrad": True, "weight_decay": 0.2}),
    Case("adamw_max_capturable", "AdamW", {"maximize": True, "capturable": False, "betas": (0.95, 0.99)}),
    Case("adamw_no_decay", "AdamW", {"weight_decay": 0.0}),
    Case("adamw_no_correction", "AdamW", {"bias_correction": False}, in_torch=False),
    Case("sgd", "SGD", {"lr": 0.1}),
    Case("sgd_decay_max", "SGD", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    Case("sgd_momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("sgd_dampening", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    Case("sgd_nesterov", "SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    Case("sgd_nesterov_decay_max", "SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    Case("rmsprop", "RMSprop"),
    Case("rmsprop_decay_max", "RMSprop", {"weight_decay": 0.1, "maximize": True, "alpha": 0.9}),
    Case("rmsprop_momentum", "RMSprop", {"momentum": 0.9, "lr": 1e-3}),
    Case("rmsprop_centered", "RMSprop", {"centered": True}),
    Case("rmsprop_all", "RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.01, "alpha": 0.4}),
    _other("rmsprop_inside", "RMSprop", eps=1e-3, eps_inside_root=True),
    _other("rmsprop_inside_all", "RMSprop", eps=1e-4, eps_inside_root=True, centered=True, momentum=0.5, maximize=True),
    Case("adagrad", "Adagrad"),
    Case("adagrad_lr_decay", "Adagrad", {"lr_decay": 0.01, "lr": 0.1}),
    Case(
        "adagrad_all",
        "Adagrad",
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
    ),
    Case("norm_adaptive", "NormAdaptive", in_torch=False),
    Case("norm_adaptive_all", "NormAdaptive", {"beta": 0.5, "weight_decay": 0.1, "maximize": True}, in_torch=False),
    Case("adadelta", "Adadelta"),
    Case("adadelta_all", "Adadelta", {"rho": 0.5, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
    Case("adamax", "Adamax"),
    Case("adamax_all", "Adamax", {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    Case("asgd", "ASGD"),
    Case("asgd_all", "ASGD", {"lambd": 0.1, "alpha": 0.6, "t0": 1.5, "weight_decay": 0.1, "maximize": True}),
    Case("nadam", "NAdam"),
    Case("nadam_decay_max", "NAdam", {"weight_decay": 0.1, "maximize": True, "momentum_decay": 0.1}),
    Case("nadam_decoupled", "NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.7, 0.9)}),
    Case("radam", "RAdam"),
    Case("radam_decay_max", "RAdam", {"weight_decay": 0.1, "maximize": True, "betas": (0.7, 0.9)}),
    Case("radam_decoupled", "RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.0, 0.5)}),
    Case("rprop", "Rprop"),
    Case("rprop_all", "Rprop", {"etas": (0.3, 1.5), "step_sizes": (1e-3, 0.02), "maximize": True}),
    _other("lion", "Lion"),
    _other("lion_all", "Lion", lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, maximize=True),
    _other("lamb", "LAMB"),
    _other("lamb_always", "LAMB", weight_decay=0.0, always_adapt=True, bias_correction=False, maximize=True),
    _other("lamb_clip", "LAMB", weight_decay=0.3, trust_clip=True, betas=(0.5, 0.7)),
    _other("lars", "LARS", lr=0.1),
    _other("lars_all", "LARS", momentum=0.9, dampening=0.3, weight_decay=0.1, trust_coeff=0.05, maximize=True),
    _other("lars_clip", "LARS", lr=0.1, momentum=0.9, nesterov=True, always_adapt=True, trust_clip=True),
    _other("ademamix", "AdEMAMix"),
    _other(
        "ademamix_all", "AdEMAMix", betas=(0.8, 0.9, 0.99), beta3_warmup=4, alpha_warmup=5, weight_decay=0.1, alpha=8.0
    ),
    _other("ademamix_max", "AdEMAMix", alpha_warmup=3, maximize=True),
    _other("adopt", "ADOPT"),
    _other("adopt_decouple", "ADOPT", weight_decay=0.1, decouple=True, betas=(0.7, 0.9), clip_exp=0.333),
    _other("adopt_decay_max", "ADOPT", weight_decay=0.1, clip=False, eps=1e-3, maximize=True),
    _other("schedule_free", "AdamWScheduleFree"),
    _other("schedule_free_all", "AdamWScheduleFree", weight_decay=0.1, warmup_steps=4, r=0.5, maximize=True),
    _other("cautious", "CautiousAdamW"),
    _other("cautious_max", "CautiousAdamW", weight_decay=0.0, betas=(0.5, 0.9), maximize=True),
]
BY_NAME = {case.name: case for case in CASES}
IN_TORCH = [case for case in CASES if case.in_torch]
#: One variant per optimizer, with every state it can have.
EVERY = [
    BY_NAME[n]
    for n in (
        "adam_amsgrad_decay_max",
        "adamw_amsgrad",
        "sgd_dampening",
        "rmsprop_all",
        "adagrad_all",
        "norm_adaptive_all",
        "adadelta_all",
        "adamax_all",
        "asgd_all",
        "nadam_decoupled",
        "radam_decay_max",
        "rprop_all",
        "lion_all",
        "lamb_clip",
        "lars_all",
        "ademamix_all",
        "adopt_decouple",
        "schedule_free_all",
        "cautious",
    )
]
#: Of the gallery's, one for each kind of states and sums: absent at first, without a step, two sums; the same with
#: numbers; numbers; two sums. For tests of what is around a rule, which sees nothing else of it. Triton's interpreter,
#: to which an operation takes as long as to a GPU a step, gets the first two.
_KINDS = ("lars_all", "schedule_free_all", "asgd_all", "lamb_clip")[: 2 if "TRITON_INTERPRET" in os.environ else 4]
FULL = [c for c in EVERY if not c.own or c.name in _KINDS]

#: Numbers in fewer bits: every way to store a parameter and each kind of state, and every optimizer. For parameters of
#: bfloat16 and fp32; those in blocks have to be large: see LOW_SHAPES.
LOW = [
    _other("adamw_low", "AdamW", master="remainder", state_dtype=torch.bfloat16, rounding_seed=3),
    _other("adamw_8_bits", "AdamW", master="remainder8", state_dtype="int8", weight_decay=0.1),
    _other(
        "adam_amsgrad_low",
        "Adam",
        amsgrad=True,
        master=torch.float32,
        state_dtype={"exp_avg": "int8", "exp_avg_sq": torch.bfloat16},
    ),
    _other("sgd_low", "SGD", lr=0.1, momentum=0.9, nesterov=True, rounding="stochastic", state_dtype=torch.bfloat16),
    _other(
        "rmsprop_8_bits",
        "RMSprop",
        momentum=0.5,
        alpha=0.7,
        state_dtype="int8",
        rounding={"param": "stochastic", "momentum_buffer": "stochastic"},
    ),
    _other("adagrad_low", "Adagrad", rounding="stochastic", state_dtype="int8", initial_accumulator_value=0.5),
    _other("norm_adaptive_low", "NormAdaptive", master="remainder", beta=0.5, weight_decay=0.1),
    _other("nadam_low", "NAdam", master="remainder", state_dtype=torch.bfloat16, weight_decay=0.1, rounding_seed=3),
    _other("adadelta_8_bits", "Adadelta", master=torch.float32, state_dtype="int8"),
    _other("lamb_8_bits", "LAMB", master="remainder8", state_dtype="int8", weight_decay=0.1),
    _other("lars_low", "LARS", momentum=0.9, rounding="stochastic", state_dtype=torch.bfloat16, weight_decay=0.1),
    _other(
        "schedule_free_low",
        "AdamWScheduleFree",
        master="remainder",
        state_dtype={"z": torch.float32, "exp_avg_sq": "int8"},
        weight_decay=0.1,
    ),
]
#: Rows of whole blocks and of others, some too short for blocks; three dimensions and one; none and one element.
LOW_SHAPES: list[tuple[int, ...]] = [(0,), (), (17,), (33, 170), (16, 3, 128), (64, 64), (4099,), (100, 63)]

#: All that the package exports.
OPTIMIZERS: list[type[fusedoptim.FusedOptimizer]] = [
    cls
    for cls in (getattr(fusedoptim, name) for name in fusedoptim.__all__)
    if isinstance(cls, type) and issubclass(cls, fusedoptim.FusedOptimizer) and cls is not fusedoptim.FusedOptimizer
]

#: Everything that a step can do around its rule, at once.
ALL: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "clip_grad_value": 0.01,
    "ema_decay": 0.9,
    "zero_grad_in_step": True,
    "skip_nonfinite": True,
}

#: Every vector width's body and tail, tiles and their remainders, no elements and one, several dimensions.
SHAPES = [
    (0,),
    (),
    (1,),
    (3,),
    (15,),
    (16,),
    (17,),
    (33,),
    (7, 11),
    (2, 3, 5),
    (1023,),
    (1024,),
    (1025,),
    (4099,),
    (64, 65),
]
CAPABILITIES = fusedoptim._native._C.cpu_capabilities() if fusedoptim._native._C else []


def parameters(shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def gradient(p: torch.Tensor, step: int, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A gradient that depends on nothing but shape, step and index, over many orders of magnitude, with some zeros."""
    return _drawn.values(p.shape, step, index).to(dtype or p.dtype, copy=True)


class Drawn:
    """Numbers that were drawn before: to draw them takes longer than most of the steps that are tested."""

    def __init__(self, most: int) -> None:
        """Keeps ``most`` elements; then it starts anew."""
        self.most, self.elements = most, 0
        self.kept: dict[tuple[object, ...], torch.Tensor] = {}

    def values(self, *key: Any) -> torch.Tensor:
        """In fp64, by shape, step and index. The caller must not write to them."""
        if _get_current_dispatch_mode() is not None:  # which may make other tensors than ordinary ones
            return self._draw(*key)
        full_key = (*key, torch.get_default_dtype())
        if full_key not in self.kept:
            x = self._draw(*key)
            if x.numel() > self.most // 4:
                return x
            if self.elements + x.numel() > self.most:
                self.kept.clear()
                self.elements = 0
            self.kept[full_key] = x
            self.elements += x.numel() + 100  # as much as a tensor takes besides
        return self.kept[full_key]

    @staticmethod
    def _draw(shape: torch.Size, step: int, index: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(1000 * step + index)
        x = torch.randn(shape, generator=g, dtype=torch.float64, device="cpu") * 10.0 ** (-(index % 5))
        x[torch.rand(shape, generator=g, device="cpu") < 0.05] = 0.0
        return x


_drawn = Drawn(1 << 24)  # 128 MB


def set_gradients(params: list[torch.nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    for i, p in enumerate(params):
        p.grad = gradient(p, step, i, dtype)


def force_grad(p: torch.nn.Parameter, g: torch.Tensor) -> None:
    """Gives a parameter a gradient of another dtype, which torch allows only by this detour (or by grad_dtype)."""
    if g.dtype == p.dtype:
        p.grad = g
        return
    data = p.data
    p.data = data.to(g.dtype)
    p.grad = g
    p.data = data


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    if torch.equal(a, b):
        return
    both_nan = a.isnan() & b.isnan()
    differ = (a != b) & ~both_nan
    n = int(differ.sum())
    assert n == 0, (
        f"{what}: {n} of {a.numel()} elements differ, first {a[differ][0].item()!r} != {b[differ][0].item()!r}"
    )


def assert_same_raw(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """Bit for bit: a zero's sign and a NaN's payload count, too."""
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = (t.detach().contiguous().view(of_size) for t in (a, b))
    if torch.equal(x, y):
        return
    differ = (x != y).nonzero()
    first = tuple(differ[0].tolist())
    raise AssertionError(
        f"{what}: {len(differ)} of {a.numel()} elements differ, first at {first}: "
        f"{x[first].item():#x} ({a[first].item()!r}) != {y[first].item():#x} ({b[first].item()!r})"
    )


def assert_same_numbers(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """Bit for bit, but for which NaN it is, where a sum may have any."""
    assert torch.equal(a.isnan(), b.isnan()), what
    assert_same_raw(torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b), what)


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer, what: str = "") -> None:
    """Parameters and every state, bit for bit, wherever they are."""
    pairs = zip(_params(a), _params(b), strict=True)
    for i, (p, q) in enumerate(pairs):
        assert_same_bits(p.detach().cpu(), q.detach().cpu(), f"{what}parameter {i}")
        left, right = a.state.get(p, {}), b.state.get(q, {})
        assert {k for k, v in left.items() if v is not None} == {k for k, v in right.items() if v is not None}
        for name, value in left.items():
            if value is not None:
                compare = assert_same_raw if name == "param_remainder" else assert_same_bits  # whose NaNs are numbers
                compare(
                    torch.as_tensor(value).cpu(), torch.as_tensor(right[name]).cpu(), f"{what}{name} of parameter {i}"
                )


def _params(o: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in o.param_groups for p in group["params"]]

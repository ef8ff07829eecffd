"""Storages that are no dtypes, on a backend with tables on a device: the CPU kernels' bits. A test module that imports
this one's names defines the fixture ``kernels``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import ALL, BY_NAME, COVERING, Case, assert_same_numbers, assert_same_raw, gradient
from device import Kernels
from layouts import LAYOUTS

from fusedoptim import _members
from fusedoptim._random_places import Place, place_of

BF16, F32 = torch.bfloat16, torch.float32
#: What a group asks for. All but the last three have loops of their own on a GPU; of fp32 parameters, those in 8 bits.
POLICIES: dict[str, dict[str, Any]] = {
    "states": {"state_dtype": BF16},
    "stochastic": {"state_dtype": BF16, "rounding": {"param": "stochastic"}},
    "remainder": {"master": "remainder", "state_dtype": BF16},
    "remainder, fp32 states": {"master": "remainder", "state_dtype": F32},
    "remainder, 8 bits": {"master": "remainder", "state_dtype": "int8"},
    "8-bit remainder, 8 bits": {"master": "remainder8", "state_dtype": "int8", "rounding_seed": 5},
    "fp32 master": {"master": F32, "state_dtype": F32},
    "all stochastic": {"state_dtype": BF16, "rounding": "stochastic"},
    "fp32 master, 8 bits": {"master": F32, "state_dtype": "int8"},
    "all stochastic, 8 bits": {"state_dtype": "int8", "rounding": "stochastic"},
    "stochastic, fp32 states": {"state_dtype": F32, "rounding": {"param": "stochastic"}},
}
CASES = [
    BY_NAME[name]
    for name in (
        "adamw",
        "adam_amsgrad_decay_max",
        "sgd",
        "sgd_dampening",
        "rmsprop",
        "rmsprop_momentum",
        "rmsprop_all",
        "adagrad_all",
        "norm_adaptive_all",
    )
]
#: For blocks: whole ones, rows that end in shorter ones, and rows that no group is aligned to; several chunks. Others.
SHAPES = [(3,), (2051,), (16, 256), (25, 170), (14, 301), (52, 9, 3, 3)]


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters, gradients and every state, bit for bit. A remainder typed as bf16 is no number."""
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        pairs = [("the parameter", p.detach(), q.detach()), ("the gradient", p.grad, q.grad)]
        for name, x, y in [*pairs, *((name, a.state[p][name], b.state[q][name]) for name in a.state[p])]:
            if x is not None and y is not None:
                compare = assert_same_raw if name.endswith("_remainder") else assert_same_numbers
                compare(x, y, f"{name} of shape {tuple(p.shape)}")


def params_of(o: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in o.param_groups for p in group["params"]]


def both(
    kernels: Kernels,
    case: Case,
    policies: Iterable[dict[str, Any]],
    make: Callable[[int], list[torch.Tensor]],
    **options: Any,
) -> tuple[Any, Any]:
    """The optimizer under test and the CPU's, with a group for each policy, whose parameters ``make`` makes."""
    made = []
    for backend in (kernels.backend, "cpu"):
        groups = [
            {"params": [torch.nn.Parameter(x) for x in make(i)], **allowed(case, policy)}
            for i, policy in enumerate(policies)
        ]
        made.append(case.make(groups, backend=backend, **options))
    return made[0], made[1]


def allowed(case: Case, policy: dict[str, Any]) -> dict[str, Any]:
    """A policy without what some of the rule's states may not have."""
    policy, eight = dict(policy), policy.get("state_dtype") == "int8"
    if "amsgrad" in case.options:
        if eight:
            policy["state_dtype"] = {"exp_avg": "int8", "exp_avg_sq": "int8"}
        if policy.get("rounding") == "stochastic":
            policy["rounding"] = {"param": "stochastic", "exp_avg": "stochastic"}
    if "centered" in case.options and eight:
        policy["state_dtype"] = {"momentum_buffer": "int8", "square_avg": BF16}
    return policy


def drawn(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, place: Callable[..., Any], seed: int) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    return [place(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def give_gradients(a: Any, b: Any, step: int, place: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> None:
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        for x in (p, q):
            x.grad = place(gradient(x, step, i))


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


@pytest.mark.parametrize(
    ("case", "dtype"),
    # Under a sanitizer every rule, and both dtypes, but not both for each rule.
    [(c, d) for i, c in enumerate(CASES) for k, d in enumerate((BF16, F32)) if not COVERING or i % 2 == k],
    ids=str,
)
def test_every_policy_in_one_launch(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """And one group without any."""
    a, b = both(kernels, case, [{}, *POLICIES.values()], lambda i: drawn(SHAPES, dtype, contiguous, i))
    for step in range(2 if COVERING else 3):
        give_gradients(a, b, step)
        assert kernels.launches(a) == 1
        b.step()
        assert_same(a, b)


@pytest.mark.parametrize("case", [BY_NAME["adamw"], BY_NAME["sgd_dampening"]], ids=str)
def test_dtypes_without_loops_of_their_own(kernels: Kernels, case: Case) -> None:
    """fp16 with an fp32 master; fp64 with moments in bf16, which takes a launch of its own."""
    for dtype, policy in ((torch.float16, {"master": F32}), (torch.float64, POLICIES["all stochastic"])):
        a, b = both(kernels, case, [policy, {}], lambda i, dtype=dtype: drawn(SHAPES, dtype, contiguous, i))
        for step in range(3):
            give_gradients(a, b, step)
            assert kernels.launches(a) == 1
            b.step()
            assert_same(a, b)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "misaligned", "slice"])
@pytest.mark.parametrize("case", ["adamw", "rmsprop_all"])
def test_memory_layouts(kernels: Kernels, case: str, layout: str) -> None:
    """Codes and random bits follow the logical order."""
    shape = (24, 4, 7, 7) if layout == "channels_last" else (33, 170)
    place = LAYOUTS[layout]
    a, b = both(kernels, BY_NAME[case], POLICIES.values(), lambda i: drawn([shape], BF16, place, i))
    for step in range(2):
        give_gradients(a, b, step, place if step else torch.clone)
        a.step()
        b.step()
        assert_same(a, b)


@pytest.mark.parametrize("case", ["adamw", "sgd_dampening", "norm_adaptive_all"])
def test_what_surrounds_a_rule(kernels: Kernels, case: str) -> None:
    """Clipping, a moving average of the parameter as it is stored, zeros in the gradient's place."""
    a, b = both(kernels, BY_NAME[case], POLICIES.values(), lambda i: drawn(SHAPES, BF16, contiguous, i), **ALL)
    for step in range(2 if COVERING else 3):
        give_gradients(a, b, step)
        a.step()
        b.step()
        assert_same(a, b)


@pytest.mark.parametrize("case", ["adamw", "adam_amsgrad_decay_max", "sgd_dampening", "rmsprop_all", "adagrad_all"])
def test_numbers_that_loops_of_groups_leave(kernels: Kernels, case: str) -> None:
    """Weights that somebody set to 0, or to something else; subnormal and huge ones, NaN and infinities, a few in some
    spans and many in others."""

    def make(i: int) -> list[torch.Tensor]:
        return drawn([(48, 256)], BF16, contiguous, i)

    a, b = both(kernels, BY_NAME[case], POLICIES.values(), make)
    for step in range(4):
        give_gradients(a, b, step)
        for p, q in zip(params_of(a), params_of(b), strict=True):
            draw = torch.Generator().manual_seed(step)
            numbers = torch.tensor([0.0, -0.0, 1e-40, 3e38, 1e30, 1e-30, math.nan, math.inf, -math.inf, 1e20])
            for i, t in enumerate((p.detach(), p.grad)):
                where = torch.rand(t.shape, generator=draw) < (torch.arange(len(t)) % 12 / 12)[:, None] ** 4
                chosen = numbers[torch.randint(2 if step == 1 else len(numbers), t.shape, generator=draw)].to(BF16)
                for x in (t, (q.detach(), q.grad)[i]):
                    x[where] = chosen[where]
        a.step()
        b.step()
        assert_same(a, b)


@pytest.mark.parametrize(
    ("first", "strides"),
    [((1 << 32) - 5000, None), ((7 << 32) - 2048, None), ((1 << 33) + 12345, None), (3, (1 << 30, 5))],
    ids=["within", "at a chunk", "beyond", "strided"],
)
def test_places_beyond_two_to_the_32(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, first: int, strides: tuple[int, ...] | None
) -> None:
    """As of a shard of a tensor that is larger: the keys of random bits change on the way."""

    def moved(p: torch.Tensor, its_id: int) -> Place:
        return place_of(p, its_id)._replace(first=first, strides=strides)

    monkeypatch.setattr(_members, "place_of", moved)
    a, b = both(
        kernels,
        BY_NAME["adamw"],
        [POLICIES[name] for name in ("remainder", "remainder, 8 bits", "all stochastic", "all stochastic, 8 bits")],
        lambda i: drawn([(48, 256), (30, 199)], BF16, contiguous, i),
    )
    for step in range(2):
        give_gradients(a, b, step)
        a.step()
        b.step()
        assert_same(a, b)

"""What every backend with tables on a device has to do. A test module that imports this one's names defines the fixture
``kernels``; every result is compared with the CPU's kernels, bit for bit, and every launch is counted."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from cases import (
    ALL,
    BY_NAME,
    CASES,
    FULL,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    force_grad,
    gradient,
    parameters,
    set_gradients,
)
from test_amp import train
from versions import check_versions

import fusedoptim

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Kernels(Protocol):
    backend: str
    #: Programs take milliseconds: sizes and steps have to be small.
    slow: bool

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        """Makes a step. How many kernels it launched."""


def pair(
    kernels: Kernels, case: Case, shapes: list, dtype: torch.dtype, **options: object
) -> tuple[list, list, object, object]:
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    return (
        mine,
        theirs,
        case.make(mine, backend=kernels.backend, **options),
        case.make(theirs, backend="cpu", **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    shapes = [(0,), (), (3,), (7, 11), (1025,)] if kernels.slow else SHAPES
    mine, theirs, a, b = pair(kernels, case, shapes, dtype)
    for step in range(2 if kernels.slow else 6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_mixed_dtypes_take_one_launch_and_fp64_a_second(kernels: Kernels, case: Case) -> None:
    for dtypes, expected in ((DTYPES[2:] + DTYPES[:1], 1), (DTYPES, 2)):
        both = []
        for backend in (kernels.backend, "cpu"):
            params = [p for d in dtypes for p in parameters([(5,), (300,), (33, 40)], d)]
            both.append((params, case.make(params, backend=backend)))
        (mine, a), (theirs, b) = both
        for step in range(4):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                # the gradient's dtype goes round as well
                p.grad, q.grad = (torch.nn.Parameter(gradient(x, step, i)).detach() for x in (p, q))
                if step > 1 and expected == 2:
                    p.grad = torch.Tensor.clone(p.grad)
            assert kernels.launches(a) == expected
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_versions_of_all_that_a_step_writes(kernels: Kernels, case: Case, options: dict[str, Any]) -> None:
    check_versions(case, kernels.backend, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_state_dtype(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    if case.optimizer == "NormAdaptive":
        pytest.skip("has no state of the parameter's shape")
    for state_dtype in (torch.float32, torch.bfloat16):
        mine, theirs, a, b = pair(kernels, case, [(9,), (1500,)], dtype, state_dtype=state_dtype)
        for step in range(4):
            set_gradients(mine, step)
            set_gradients(theirs, step)
            a.step()
            b.step()
        assert_same_optimizers(a, b)


def moved(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins so many elements behind an aligned address."""
    return torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:].copy_(x)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_alignment(kernels: Kernels, case: Case) -> None:
    """Heads of every length; operands that agree in their alignment and that do not."""
    for dtype in (torch.float32, torch.bfloat16):
        offsets = [(p, g) for p in ((1, 3) if kernels.slow else range(9)) for g in (p, 0, p + 1)]
        mine = [
            torch.nn.Parameter(moved(gradient(torch.empty(2100), 9, i).to(dtype), p))
            for i, (p, _) in enumerate(offsets)
        ]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = case.make(mine, backend=kernels.backend), case.make(theirs, backend="cpu")
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = moved(q.grad, offsets[i][1])
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "zero_grad_in_step": True}], ids=["plain", "surrounded"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_misaligned_tensors_of_several_ranges(kernels: Kernels, case: Case, options: dict[str, Any]) -> None:
    """Parameters, gradients and states alike, so that every range is moved up by the head, and cut at the end: with
    more elements than the head behind whole ranges, as many, and fewer."""
    if case.optimizer != "AdamW" and (kernels.slow or options):
        pytest.skip("the ranges know no rule")
    across = 1 << 14 if kernels.slow else 1 << 15
    for dtype in (torch.float32, torch.bfloat16):
        lengths = [(across + more, at) for at in (1, 3) for more in ((5,) if kernels.slow else (1, 7, 2500))]
        mine = [torch.nn.Parameter(moved(gradient(torch.empty(n), 9, at).to(dtype), at)) for n, at in lengths]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = (case.make(x, backend=k, **options) for x, k in ((mine, kernels.backend), (theirs, "cpu")))
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = moved(q.grad, lengths[i][1])
            if step == 1:
                for (_, at), p in zip(lengths, mine, strict=True):
                    a.state[p].update({k: moved(s, at) for k, s in a.state[p].items() if s.dim() > 0})
                    assert all(s.data_ptr() % (4 * s.itemsize) for s in a.state[p].values() if s.dim() > 0)
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_gradient_of_another_dtype_than_before(kernels: Kernels, case: Case) -> None:
    """At the address of the one before."""
    if kernels.slow and case.optimizer != "AdamW":
        pytest.skip("the tables know no rule")
    mine, theirs, a, b = pair(kernels, case, [(100,), (33, 5)], torch.float32)
    memories = [torch.zeros(p.numel(), dtype=torch.float64) for p in mine]
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32)):
        set_gradients(theirs, step)
        for p, q, memory in zip(mine, theirs, memories, strict=True):
            g = q.grad.to(dtype)
            p.grad = q.grad = None
            force_grad(q, g)
            force_grad(p, memory.view(dtype)[: g.numel()].view(g.shape).copy_(g))
        a.step()
        b.step()
        assert_same_optimizers(a, b, f"step {step}: ")


def any_magnitude(n: int, seed: int, largest: float) -> torch.Tensor:
    """Zeros of both signs, subnormal numbers and all up to the largest; a NaN and infinities."""
    draw = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-149, 1, (n,), generator=draw).double()
    x = torch.exp2(exponent + largest) * (1 + torch.rand(n, generator=draw)) * torch.randn(n, generator=draw).sign()
    x[::7] = 0.0
    x[3::70] = -0.0
    x[n // 2 : n // 2 + 3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x.float()


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["adamw", "adam_amsgrad_decay_max", "rmsprop_momentum", "rmsprop_all", "adagrad_all"])
def test_numbers_of_all_magnitudes(kernels: Kernels, case: str, dtype: torch.dtype, eps: float) -> None:
    """Roots and quotients that take a way of their own where they are ordinary have to notice where they are not."""
    n = 260 if kernels.slow else 2100
    mine, theirs, a, b = pair(kernels, BY_NAME[case], [(n,), (n,)], dtype, eps=eps)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(any_magnitude(n, 1, 20.0))
            q.copy_(p)
    for step in range(2 if kernels.slow else 4):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            q.grad = any_magnitude(n, step // 2 if i else step, 127.0 if step == 1 else 0.0).to(dtype)
            p.grad = q.grad.clone()
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("count", [(1 << 14) + 1, 100_003, (1 << 20) + 5, 2_200_000])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_tensors_are_cut_into_chunks_and_parts(kernels: Kernels, case: Case, count: int) -> None:
    """Above 1,048,576 elements a sum of squares has a third level."""
    if kernels.slow and count != {"NormAdaptive": (1 << 20) + 5}.get(case.optimizer, (1 << 14) + 1):
        pytest.skip("takes too long where programs take milliseconds")
    if count > 1 << 20 and case.optimizer != "NormAdaptive":
        count //= 8
    mine, theirs, a, b = pair(kernels, case, [(count,), (17,), (count // 3,)], torch.float32)
    for step in range(2):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_more_groups_than_fit_the_arguments(kernels: Kernels, case: Case) -> None:
    groups_in_all, both = 21 if kernels.slow else 465, []
    for backend in (kernels.backend, "cpu"):
        params = parameters([(7,)] * groups_in_all)
        groups = [{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)]
        both.append((params, case.make(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for i in range(groups_in_all):
            a.param_groups[i]["lr"] = b.param_groups[i]["lr"] = 1e-3 * (1 + (i + step) % 7)
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_without_gradients_and_late_ones(kernels: Kernels, case: Case) -> None:
    mine, theirs, a, b = pair(kernels, case, [(5,), (40_000,), (33,)], torch.float32)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[step % 3].grad = theirs[step % 3].grad = None
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_lr_is_read_from_the_device(kernels: Kernels, case: Case, lr_dtype: torch.dtype) -> None:
    """By its address: here the device's memory is the host's."""
    mine, theirs, a, b = pair(kernels, case, [(50,), (3,)], torch.float32, lr=torch.tensor(0.01, dtype=lr_dtype))
    for step in range(4):
        for o in (a, b):
            o.param_groups[0]["lr"].fill_(0.01 / (step + 1))
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def test_scalars_agree_with_the_cpu_over_many_steps(kernels: Kernels) -> None:
    """Powers are computed in another way than the C library's."""
    shapes = [(1,)] * 12
    betas = [(0.9, 0.999), (0.5, 0.9), (0.95, 0.98), (0.0, 0.9999), (0.99, 0.9), (0.123, 0.77)]
    both = []
    for backend in (kernels.backend, "cpu"):
        params = parameters(shapes)
        groups = [{"params": params[i::6], "betas": b} for i, b in enumerate(betas)]
        both.append((params, fusedoptim.Adam(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    for step in range(15 if kernels.slow else 300):  # up to more than 1,500,000
        a.step()
        b.step()
        if step % 5 == 0:
            for optimizer in (a, b):
                for state in optimizer.state.values():
                    state["step"] += step * (7 if kernels.slow else 177)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_unscaling_and_skipping_in_the_kernel(kernels: Kernels, case: Case) -> None:
    mine, theirs, a, b = pair(kernels, case, [(5,), (40,), (20_000,)], torch.float32, amp_in_step=True)
    overflow = {0, 4, 5}
    assert train(a, mine, 10, overflow) == train(b, theirs, 10, overflow)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_steps_in_the_backward_pass(kernels: Kernels, case: Case) -> None:
    """A table of its own for every parameter, and shared states."""
    mine, theirs, a, b = pair(kernels, case, [(3,), (7, 11), ()], torch.float32)
    fusedoptim.step_in_backward(a)
    for step in range(3):
        set_gradients(theirs, step)
        sum((p * q.grad).sum() for p, q in zip(mine, theirs, strict=True)).backward()
        assert all(p.grad is None for p in mine)
        b.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_outside_of_a_step(kernels: Kernels, dtype: torch.dtype) -> None:
    shapes = [(3,), (7, 11), (1025,)] if kernels.slow else [*SHAPES, (70_001,)]
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    for max_norm, limit in ((0.3, None), (float("inf"), None), (None, 0.01)):
        set_gradients(mine, 0)
        set_gradients(theirs, 0)
        for p in (mine[1], theirs[1]):  # dense, in another order
            p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
        norms = []
        for params, backend in ((mine, kernels.backend), (theirs, "cpu")):
            if max_norm is not None:
                norms.append(fusedoptim.clip_grad_norm_(params, max_norm, backend=backend))
            else:
                fusedoptim.clip_grad_value_(params, limit, backend=backend)
        if norms:
            assert_same_bits(*norms)
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.grad, q.grad)


# ---- what surrounds the rule: clipping, moving averages, zeros, skipping ----

#: An optimizer's options, and those of three groups: one with a limit, one with another, one without.
AROUND: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "norm": ({}, [{"max_grad_norm": 0.5}, {"max_grad_norm": 3.0}, {}]),
    "value": ({}, [{"clip_grad_value": 0.3}, {"clip_grad_value": 1e-3}, {}]),
    "average": ({}, [{"ema_decay": 0.75}, {"ema_decay": 0.3}, {}]),
    "zeros": ({"zero_grad_in_step": True}, [{}, {}, {}]),
    "skipping": ({"skip_nonfinite": True}, [{}, {}, {}]),
    "all": (
        {"zero_grad_in_step": True, "skip_nonfinite": True},
        [
            {"max_grad_norm": 0.5, "clip_grad_value": 0.01, "ema_decay": 0.75},
            {"max_grad_norm": 1e4, "ema_decay": 0.0},
            {"clip_grad_value": 0.2, "ema_decay": 0.999},
        ],
    ),
}
MEASURING = ("norm", "skipping", "all")
MIXES = {"fp32": DTYPES[:1], "bf16": DTYPES[2:3], "fp64": DTYPES[1:2], "16 and 32 bits": DTYPES[::2], "mixed": DTYPES}


class Both:
    """An optimizer of the kernels under test and the CPU's, on equal parameters."""

    def __init__(self, kernels: Kernels, case: Case, params: list[torch.Tensor], around: str) -> None:
        options, groups = AROUND[around]
        self.kernels, self.zeroes = kernels, "zero_grad_in_step" in options
        self.params, self.optimizers = [], []
        for backend in (kernels.backend, "cpu"):
            own = [torch.nn.Parameter(p.detach().clone()) for p in params]
            members = [{"params": own[i::3], **group} for i, group in enumerate(groups)]
            self.params.append([p for member in members for p in member["params"]])
            self.optimizers.append(case.make(members, backend=backend, **options))

    def set_gradients(self, step: int) -> None:
        """Half of them in another dtype than their parameters, of 64 bits only for parameters of as many; those of
        several dimensions in another order; one is missing."""
        for params in self.params:
            for i, p in enumerate(params):
                dtypes = DTYPES if p.dtype == torch.float64 else DTYPES[2:] + DTYPES[:1]
                g = gradient(p, step, i, dtypes[(step + i) % len(dtypes)] if i % 2 else p.dtype)
                p.grad = None
                if len(params) <= 3 or i != step % len(params):
                    force_grad(p, g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() > 1 else g)

    def make_step(self, launches: int, scaling: tuple[float, float] | None = None) -> None:
        """Makes a step, and compares everything."""
        before = [[None if p.grad is None else p.grad.detach().clone() for p in params] for params in self.params]
        a, b = self.optimizers
        if scaling is not None:
            for o in (a, b):
                o.grad_scale, o.found_inf = (torch.tensor(x) for x in scaling)
        assert self.kernels.launches(a) == launches
        b.step()
        if scaling is not None:
            for o in (a, b):
                del o.grad_scale, o.found_inf
        assert_same_optimizers(a, b)
        assert a.skipped_steps.item() == b.skipped_steps.item()
        if a._measures_norm():
            assert_same_bits(a.last_grad_norm, b.last_grad_norm, "the norm")
        for params, old in zip(self.params, before, strict=True):
            for p, g in zip(params, old, strict=True):
                if g is not None:
                    assert_same_bits(p.grad.detach(), torch.zeros_like(g) if self.zeroes else g, "a gradient")

    def values(self) -> list[torch.Tensor]:
        """Of the kernels under test: all parameters and states."""
        o = self.optimizers[0]
        states = [v for p in self.params[0] for v in o.state.get(p, {}).values() if v is not None]
        return [torch.as_tensor(v).detach().clone() for v in (*self.params[0], *states)]


def assert_unchanged(now: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for x, y in zip(now, before, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_what_surrounds_the_rule(kernels: Kernels, case: Case, around: str, mix: str) -> None:
    if kernels.slow and (mix not in ("fp32", "mixed") or (around != "all" and case.optimizer != "AdamW")):
        pytest.skip("takes too long where programs take milliseconds")
    shapes = [(0,), (), (3,), (7, 11), (1025,)] if kernels.slow else [*SHAPES, (20_000,)]
    if kernels.slow and len(MIXES[mix]) > 1:
        shapes = [(3,), (40, 27)]
    both = Both(kernels, case, [p for dtype in MIXES[mix] for p in parameters(shapes, dtype)], around)
    grids = 2 if mix == "mixed" else 1
    for step in range(2 if kernels.slow else 5):
        both.set_gradients(step)
        both.make_step(grids * (2 if around in MEASURING else 1))


@pytest.mark.parametrize("around", ["zeros", "skipping", "all"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_step_that_is_skipped(kernels: Kernels, case: Case, around: str) -> None:
    """The first one and a later one: states, counters and averages stay as they were, gradients are zeroed if asked."""
    sizes = [(5,), (33, 40), (17_000 if case.optimizer == "NormAdaptive" else 2100,), (3,)]
    both = Both(kernels, case, parameters(sizes), around)
    launches, skipped = (2 if around in MEASURING else 1), 0
    for step in range(5):
        both.set_gradients(step)
        before, skip = both.values(), step in (0, 2, 3)
        scaling = None
        if skip and (around == "zeros" or step == 3):  # GradScaler's finding
            scaling = (1024.0, 1.0)
        elif skip:
            for params in both.params:
                params[-1 if step else 1].grad.view(-1)[1] = float("nan" if step else "-inf")
            skipped += 1
        both.make_step(launches, scaling)
        if skip:
            assert_unchanged(both.values(), before)
        else:
            assert any(not torch.equal(x, y) for x, y in zip(both.values(), before, strict=False))
        assert both.optimizers[0].skipped_steps.item() == skipped


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_what_surrounds_the_rule_under_a_scaler(kernels: Kernels, case: Case, around: str) -> None:
    both = Both(kernels, case, parameters([(5,), (40,), (2100,)]), around)
    a, b = both.optimizers
    a._step_supports_amp_scaling = b._step_supports_amp_scaling = True
    steps, overflow = (4, {0, 2}) if kernels.slow else (10, {0, 4, 5})
    assert train(a, both.params[0], steps, overflow) == train(b, both.params[1], steps, overflow)
    assert_same_optimizers(a, b)
    assert a.skipped_steps.item() == b.skipped_steps.item() == (len(overflow) if around in ("skipping", "all") else 0)
    both.set_gradients(0)
    both.make_step(2 if around in MEASURING else 1, (48.0, 0.0))  # a scale that is no power of 2


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in FULL for d in DTYPES[:2] if c.optimizer in ("AdamW", "NormAdaptive")],
    ids=str,
)
def test_the_norm_of_many_tensors(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """More than a warp has lanes, one of several parts, one of more parts than a node of the tree of sums. In fp64 the
    order of the sum shows. The kernel that sums knows no rule but NormAdaptive's, which has sums of its own."""
    if kernels.slow and (case.optimizer, dtype) not in (("AdamW", torch.float64), ("NormAdaptive", torch.float32)):
        pytest.skip("takes too long where programs take milliseconds")
    large = [(17_000,)] if kernels.slow else [(17_000,), ((1 << 20) + 5,)]
    both = Both(kernels, case, parameters([(5,)] * 40 + large + [(1 + i % 3,) for i in range(30)], dtype), "norm")
    for step in range(2):
        both.set_gradients(step)
        both.make_step(2)
    squares = sum(p.grad.double().square().sum() for p in both.params[0] if p.grad is not None)
    assert abs(both.optimizers[0].last_grad_norm.item() / squares.sqrt().item() - 1) < 1e-6


@pytest.mark.parametrize("case", FULL, ids=str)
def test_options_that_change_between_steps(kernels: Kernels, case: Case) -> None:
    both = Both(kernels, case, parameters([(5,), (17_000,), (33,), (3,)]), "value")
    launches = [1, 2, 2, 1, 1]
    for step, expected in enumerate(launches):
        for o in both.optimizers:
            o.param_groups[1]["max_grad_norm"] = {1: 0.5, 2: 0.25}.get(step)
            o.param_groups[2]["ema_decay"] = 0.9 if step in (2, 4) else None
            o.param_groups[0]["clip_grad_value"] = 0.1 if step % 2 else None
        both.set_gradients(step)
        both.make_step(expected)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_step_without_gradients(kernels: Kernels, case: Case) -> None:
    """Its norm is 0, and it changes nothing."""
    both = Both(kernels, case, parameters([(5,), (17_000,), (33,)]), "all")
    both.set_gradients(0)
    both.make_step(2)
    before = both.values()
    for o in both.optimizers:
        o.zero_grad(set_to_none=True)
    both.make_step(2)
    assert both.optimizers[0].last_grad_norm.item() == 0.0
    assert_unchanged(both.values(), before)
    both.set_gradients(1)
    both.make_step(2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_clip_coefficient_rounds_as_the_cpus(kernels: Kernels, dtype: torch.dtype) -> None:
    """For many limits: one by one its three roundings rarely show."""
    both = []
    for backend in (kernels.backend, "cpu"):
        params = parameters([(3,)] * 40, dtype)
        groups = [{"params": [p], "max_grad_norm": 1e-3 * 1.3**i} for i, p in enumerate(params)]
        both.append((params, fusedoptim.SGD(groups, lr=1.0, backend=backend)))
    (mine, a), (theirs, b) = both
    for step in range(2):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert kernels.launches(a) == 2
        b.step()
        assert 1.0 < a.last_grad_norm.item() < 0.5 * 1e-3 * 1.3**39  # some are clipped, some are not
    assert_same_optimizers(a, b)

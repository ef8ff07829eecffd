"""What surrounds the rule: clipping, moving averages, zeros, skipping. See device_tests.py."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FULL,
    SHAPES,
    Case,
    assert_same_optimizers,
    parameters,
    set_gradients,
)
from device import AROUND, DTYPES, MEASURING, Both, Kernels, assert_unchanged
from scaled import train

import fusedoptim

#: Every rule with all that can surround it; one thing at a time, which knows no rule, around one of those that work
#: element by element, and around the one with a norm of its own.
PRODUCT = [(c, a) for c in FULL for a in AROUND if a == "all" or c.optimizer in ("AdamW", "NormAdaptive")]
MIXES = {"fp32": DTYPES[:1], "bf16": DTYPES[2:3], "fp64": DTYPES[1:2], "16 and 32 bits": DTYPES[::2], "mixed": DTYPES}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("case", "around"), PRODUCT, ids=str)
def test_what_surrounds_the_rule(kernels: Kernels, case: Case, around: str, mix: str) -> None:
    if kernels.slow and (mix not in ("fp32", "mixed") or (around != "all" and case.optimizer != "AdamW")):
        pytest.skip("takes too long where programs take milliseconds")
    if kernels.slow and mix == "fp32" and case.own:
        pytest.skip("the mix has fp32 as well")
    shapes = [(0,), (), (3,), (7, 11), (1025,)] if kernels.slow else [*SHAPES, (20_000,)]
    if kernels.slow and len(MIXES[mix]) > 1:
        shapes = [(3,), (40, 27)]
    both = Both(kernels, case, [p for dtype in MIXES[mix] for p in parameters(shapes, dtype)], around)
    grids = 2 if mix == "mixed" else 1
    for step in range(2 if kernels.slow else 5):
        both.set_gradients(step)
        both.make_step(grids * (2 if around in MEASURING else 1))


@pytest.mark.parametrize(("case", "around"), [x for x in PRODUCT if x[1] in ("zeros", "skipping", "all")], ids=str)
def test_a_step_that_is_skipped(kernels: Kernels, case: Case, around: str) -> None:
    """The first one and a later one: states, counters and averages stay as they were, gradients are zeroed if asked."""
    if kernels.slow and around != "all" and case.optimizer != "AdamW":
        pytest.skip("takes too long where programs take milliseconds")
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


@pytest.mark.parametrize(("case", "around"), PRODUCT, ids=str)
def test_what_surrounds_the_rule_under_a_scaler(kernels: Kernels, case: Case, around: str) -> None:
    if kernels.slow and around != "all" and case.optimizer != "AdamW":
        pytest.skip("takes too long where programs take milliseconds")
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

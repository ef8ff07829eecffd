"""What 16-bit weights lose, and with a master or stochastic rounding do not; and that nothing is new without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, FULL, Case, assert_same_raw, force_grad, gradient, parameters
from torch import Tensor

import fusedoptim
from fusedoptim import reference
from fusedoptim._storage import stored

# ---- decay ----


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"rounding": "nearest", "state_dtype": torch.float32}, False),
        ({"rounding": {"param": "stochastic"}}, True),
        ({"rounding": "stochastic", "state_dtype": torch.bfloat16}, True),
        ({"master": "remainder"}, True),
        ({"master": "remainder8"}, True),
        ({"master": torch.float32}, True),
    ],
    ids=str,
)
def test_decay_alone_moves_weights(options: dict[str, Any], moves: bool) -> None:
    """By lr * weight_decay = 1e-4 a step, a fortieth of what rounding to nearest needs: 9.5 % in 1,000 steps."""
    before = torch.linspace(-3, 3, 4096).to(torch.bfloat16).view(64, 64)
    p = torch.nn.Parameter(before.clone())
    p.grad = torch.zeros_like(p)
    o = fusedoptim.AdamW([p], lr=1e-3, weight_decay=0.1, **options)
    for _ in range(1_000):
        o.step()
    ratios = p.detach().double() / before.double()
    if not moves:
        assert_same_raw(p.detach(), before)
    elif "master" in options:
        # Half a unit of 24 bits is up to a 13th of a step's decay. To that comes what 16 bits show of a weight.
        lost = 8e-3 if options["master"] == "remainder8" else 1e-5
        assert (ratios - 0.9999**1_000).abs().max() < 2**-8 + lost
        assert abs(ratios.mean() - 0.9999**1_000) < 1e-3
    else:
        assert abs(ratios.mean() - 0.9999**1_000) < 1e-3
        assert ratios.std() < 0.05


def test_decay_is_within_the_one_sum_that_is_rounded() -> None:
    """A decay that is as large as the update, against it, leaves a weight alone: two roundings would not."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    o = fusedoptim.SGD([p], lr=1.0, weight_decay=2.0**-12, rounding={"param": "stochastic"})
    force_grad(p, torch.full((4096,), -(2.0**-12)))
    for _ in range(20):
        o.step()
    assert (p == 1).all()
    force_grad(p, torch.zeros(4096))
    o.step()
    assert not (p == 1).all()


# ---- masters ----

#: Of a parameter of 16 bits, how what it stands for is read.
Read = Callable[[Tensor, dict[str, Any]], Tensor]
MASTERS: dict[str, tuple[torch.dtype, Any, Read]] = {
    "remainder": (
        torch.bfloat16,
        "remainder",
        lambda p, state: reference.decode("bf16_remainder", p, state["param_remainder"]),
    ),
    "fp32": (torch.bfloat16, torch.float32, lambda p, state: state["param_master"]),
    "fp32 of fp16": (torch.float16, torch.float32, lambda p, state: state["param_master"]),
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9}], ids=["plain", "options"])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_master_has_the_bits_of_fp32(case: Case, master: str, options: dict[str, Any]) -> None:
    """Those of a parameter in fp32, from the same start and with the same gradients of 16 bits, over 60 steps."""
    dtype, value, read = MASTERS[master]
    shapes = [(5,), (33, 17), (4099,)]
    mine = parameters(shapes, dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in mine]
    a = case.make(mine, master=value, state_dtype=torch.float32, **options)
    b = case.make(wide, **options)
    for step in range(60):
        for i, (p, q) in enumerate(zip(mine, wide, strict=True)):
            p.grad = gradient(p, step % 7, i)
            force_grad(q, p.grad.clone())
        a.step()
        b.step()
    for p, q in zip(mine, wide, strict=True):
        of_p, of_q = a.state[p], b.state[q]
        assert_same_raw(read(p.detach(), of_p), q.detach())
        for name, state in of_q.items():
            if state is not None:
                assert_same_raw(torch.as_tensor(of_p[name]), torch.as_tensor(state), name)
        if master != "remainder":  # whose ties go away from zero
            assert_same_raw(p.detach(), q.detach().to(dtype))
        assert ((p.detach().double() - q.detach().double()).abs() <= q.detach().abs() * 2.0**-8 + 1e-7).all()


def test_a_master_keeps_what_steps_below_half_a_unit_add_up_to() -> None:
    """Where the parameter alone stays as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        for master in (None, torch.float32) if dtype == torch.float16 else (None, "remainder", torch.float32):
            p = torch.nn.Parameter(torch.ones(8, dtype=dtype))
            o = fusedoptim.SGD([p], lr=1.0, master=master)
            for _ in range(512):
                force_grad(p, torch.full((8,), 2.0**-13))
                o.step()
            assert (p == (1.0 if master is None else 0.9375)).all()


# ---- without such an option ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_without_an_option_nothing_is_new(case: Case, dtype: torch.dtype) -> None:
    """No key in the groups, no state, none in another dtype, nothing that is stored as more than its dtype."""
    new = {"master", "state_dtype", "rounding", "rounding_seed"}
    for options in ({}, ALL):
        params = parameters([(5,), (64, 65)], dtype)
        o = case.make(params, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        o.step()
        assert not new & set(o.param_groups[0]) and not new & set(o.state_dict()["param_groups"][0])
        names = [slot.name for slot in o.rule.states if slot.needed_in(o.param_groups[0])]
        known = {*names, "step", "ema", *o.rule.number_names}
        for p in params:
            assert set(o.state[p]) <= known
            assert ("step" in o.state[p]) == o.rule.has_step
            for name in names:
                assert o.state[p][name].dtype == p.dtype and o.state[p][name].shape == p.shape
            assert stored(o.param_groups[0], o.rule, p, o.state[p]) == ()

"""Checkpoints as others leave them: narrow states, steps of any type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVERY, FULL, Case, assert_same_bits, set_gradients
from checkpoints import BF16, F16, F32, F64, WITH_SLOTS, cast, one_warning, slots, stepped

import fusedoptim


@pytest.mark.parametrize(
    ("param", "saved", "asked", "result"),
    [
        (F32, BF16, None, F32),
        (F32, F16, None, F32),
        (F32, F32, None, F32),
        (F32, F64, None, F64),
        (F64, F32, None, F64),
        (BF16, F32, None, F32),
        (BF16, BF16, None, BF16),
        (BF16, F16, None, F16),
        (F32, BF16, F32, F32),
        (F32, F32, BF16, BF16),
        (BF16, BF16, F32, F32),
        (BF16, F32, BF16, BF16),
        (F64, F16, F32, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_no_state_becomes_or_stays_narrower(case: Case, param: Any, saved: Any, asked: Any, result: Any) -> None:
    source, _ = stepped(case, param, **case.as_it_is)
    target, params = stepped(case, param, steps=0, state_dtype=asked, **case.as_it_is)
    content = cast(source.state_dict(), slots(source), saved)
    name = next(slot.name for slot in target.rule.states if slot.name in content["state"][0])
    wider = result.itemsize > saved.itemsize
    with one_warning(
        f"{name!r} of parameter 0 of group 0"
        if wider and len(slots(source)) == 1
        else "parameter 0 of group 0"
        if wider
        else None
    ):
        target.load_state_dict(content)
    for i, p in enumerate(params):
        for n in slots(target):
            assert_same_bits(target.state[p][n], content["state"][i][n].to(result), n)
    set_gradients(params, 3)
    target.step()


def test_narrow_moments_train_on_as_torchs_do() -> None:
    """ultralytics#24085, OpenTau#184: second moments that stay in fp16 underflow, and the loss explodes."""

    def loss_after(cls: Any) -> float:
        p = torch.nn.Parameter(torch.full((50,), 3.0))
        optimizer = cls([p], lr=1e-2)
        for step in range(300):
            optimizer.zero_grad()
            loss = (1e-4 * p).square().sum()
            loss.backward()
            optimizer.step()
            if step == 20:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.load_state_dict(cast(optimizer.state_dict(), {"exp_avg", "exp_avg_sq"}, F16))
        return loss.item()

    assert loss_after(fusedoptim.Adam) == pytest.approx(loss_after(torch.optim.Adam), rel=1e-3)


def test_averages_and_norms_have_their_own_dtype() -> None:
    source, _ = stepped(EVERY[5], BF16, ema_decay=0.9)
    target, params = stepped(EVERY[5], BF16, steps=0, state_dtype=BF16)
    target.load_state_dict(cast(source.state_dict(), {"ema", "avg_grad_norm"}, BF16))
    assert target.state[params[0]]["ema"].dtype == target.state[params[0]]["avg_grad_norm"].dtype == F32
    target.step()


# ---- the number of steps ----

STEPS: dict[str, Callable[[float], Any]] = {
    "int64": lambda n: torch.tensor(int(n)),
    "int32": lambda n: torch.tensor(int(n), dtype=torch.int32),
    "bf16": lambda n: torch.tensor(n, dtype=BF16),
    "fp16": lambda n: torch.tensor(n, dtype=F16),
    "one element": lambda n: torch.tensor([int(n)]),
    "int": int,
    "float": float,
    "numpy int64": np.int64,
    "numpy float32": np.float32,
    "numpy array": np.array,
    "Decimal": Decimal,
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("case", [c for c in FULL if c.cls.rule.has_step], ids=str)
def test_steps_of_any_type(case: Case, kind: str) -> None:
    source, _ = stepped(case)
    expected, ps = stepped(case, steps=0)
    target, qs = stepped(case, steps=0)
    byhand, rs = stepped(case)
    expected.load_state_dict(source.state_dict())
    content = copy.deepcopy(source.state_dict())
    for values in content["state"].values():
        values["step"] = STEPS[kind](values["step"].item())
    target.load_state_dict(content)
    for r in rs:
        byhand.state[r]["step"] = STEPS[kind](2.0)
    for p, r in zip(ps, rs, strict=True):
        r.data.copy_(p.data)
    for params, optimizer in ((ps, expected), (qs, target), (rs, byhand)):
        set_gradients(params, 5)
        optimizer.step()
    for p, q, r in zip(ps, qs, rs, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(p.detach(), r.detach())
        assert target.state[q]["step"].dtype == byhand.state[r]["step"].dtype == F32
        assert target.state[q]["step"].item() == 3


def test_a_step_of_fp64_stays() -> None:
    source, _ = stepped(EVERY[0])
    target, params = stepped(EVERY[0], steps=0)
    target.load_state_dict(cast(source.state_dict(), {"step"}, F64))
    assert target.state[params[0]]["step"].dtype == F64


@pytest.mark.parametrize("value", ["3", torch.ones(2), torch.tensor(1j), [1], np.ones(2)], ids=str)
def test_a_step_that_is_no_number(value: Any) -> None:
    optimizer, _ = stepped(EVERY[0])
    content = copy.deepcopy(optimizer.state_dict())
    content["state"][1]["step"] = value
    with pytest.raises(ValueError, match="state 'step' of parameter 1 of group 0"):
        optimizer.load_state_dict(content)


@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_a_parameter_that_thaws_after_loading_has_wide_states(case: Case) -> None:
    source, _ = stepped(case)
    target, params = stepped(case, steps=0)
    params[0].requires_grad_(False)
    with one_warning("parameter 0 of group 0"):
        target.load_state_dict(cast(source.state_dict(), slots(source), BF16))
    params[0].requires_grad_(True)
    set_gradients(params, 1)
    target.step()
    assert all(target.state[params[0]][name].dtype == F32 for name in slots(target))

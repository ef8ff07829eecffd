"""``portable_state_dict()``: what others take; and ``state_dict()``, which they refuse where it says what they cannot
read."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F16, F32, F64
from policies import (
    ADAMW,
    CASES,
    IN_BLOCKS,
    MIXED,
    ROUNDED,
    SGD,
    SHAPES,
    SMALLEST,
    copies,
    decoded,
    go,
    numbers,
    params_of,
    trained,
)

from benchmarks.witness import ieee_sqrt
from fusedoptim import AdamW, NormAdaptive

POLICIES: dict[str, dict[str, Any]] = {
    "smallest": SMALLEST,
    "mixed": MIXED,
    "rounded": ROUNDED,
    "master": {"master": F32},
}


# ---- what it says ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_has_the_numbers_that_the_states_stand_for(case: Case, policy: str) -> None:
    a = trained(case, **POLICIES[policy])
    raw, content = a.state_dict(), a.portable_state_dict()
    assert not {"master", "state_dtype", "rounding", "rounding_seed"} & set(content["param_groups"][0])
    assert {**raw["param_groups"][0], **content["param_groups"][0]} == raw["param_groups"][0]
    master = POLICIES[policy].get("master")
    for i, p in enumerate(params_of(a)):
        values = a.state[p]
        slots = [slot for slot in a.rule.states if slot.needed_in(a.param_groups[0])]
        expected = {slot.name for slot in slots} | ({"master"} if master else set()) | ({"step"} & set(values))
        assert set(content["state"][i]) == expected
        for slot in slots:
            found = content["state"][i][slot.name]
            if slot.name in values:
                assert_same_bits(found, values[slot.name].float())
            else:
                assert_same_bits(found, decoded(a, p, slot.name))
        if master:
            assert_same_bits(content["state"][i]["master"], numbers(a)[i])


def test_what_is_wide_already_is_the_optimizers_own() -> None:
    for dtype in (F32, F64):
        a = trained(ADAMW, dtype, ema_decay=0.5)
        content = a.portable_state_dict()
        assert (
            content["param_groups"] == a.state_dict()["param_groups"] and content["param_groups"][0]["ema_decay"] == 0.5
        )
        for i, p in enumerate(params_of(a)):
            assert all(content["state"][i][name] is value for name, value in a.state[p].items())


def test_without_states() -> None:
    o = AdamW(parameters(SHAPES, BF16), **SMALLEST)
    assert o.portable_state_dict()["state"] == {}
    o = NormAdaptive(parameters(SHAPES, BF16), master="remainder")
    go(o, 0, 1)
    assert set(o.portable_state_dict()["state"][0]) == {"step", "avg_grad_norm", "master"}


def test_it_changes_nothing() -> None:
    a = trained(SGD, **SMALLEST)
    before = copy.deepcopy(a.state_dict())
    a.portable_state_dict()
    a.state_dict()
    for i, p in enumerate(params_of(a)):
        assert not {"momentum_buffer", "master"} & set(a.state[p]) or i not in IN_BLOCKS
        for name, value in a.state[p].items():
            assert_same_bits(value, before["state"][i][name], name)


def test_a_weight_that_was_written_to_is_its_own_master() -> None:
    a = trained(ADAMW, **POLICIES["master"])
    with torch.no_grad():
        params_of(a)[1].zero_()
    content = a.portable_state_dict()
    assert not content["state"][1]["master"].any()
    b = AdamW(copies(a), master="remainder")
    b.load_state_dict(content)
    with pytest.raises(ValueError, match=r"reset_master\(\)"):
        b.load_state_dict(a.state_dict())


# ---- who takes it ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_trains_on(case: Case, policy: str) -> None:
    """From the same moments, in fp32, with the bits of this package without a policy."""
    a = trained(case, **POLICIES[policy])
    content = copy.deepcopy(a.portable_state_dict())
    theirs = case.make_torch(copies(a, F32), foreach=False)
    mine = case.make(copies(a, F32))
    for values in content["state"].values():
        values.pop("master", None)
    for o in (theirs, mine):
        o.load_state_dict(copy.deepcopy(content))
        with ieee_sqrt():
            go(o, 3, 5)
    for p, q in zip(params_of(theirs), params_of(mine), strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert_same_optimizers(mine, theirs)


def test_torch_carries_a_master_along() -> None:
    a = trained(ADAMW, **SMALLEST)
    theirs = torch.optim.AdamW(copies(a))
    theirs.load_state_dict(copy.deepcopy(a.portable_state_dict()))
    go(theirs, 3, 4)
    assert {v.dtype for v in theirs.state[params_of(theirs)[1]].values()} == {BF16, F32}  # step is the latter


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_loads_back(case: Case, policy: str) -> None:
    """With the numbers of before, as far as 8 bits have them."""
    a = trained(case, **POLICIES[policy])
    b = case.make(copies(a), **POLICIES[policy])
    b.load_state_dict(copy.deepcopy(a.portable_state_dict()))
    one, two = a.portable_state_dict()["state"], b.portable_state_dict()["state"]
    for k, values in one.items():
        assert set(a.state[params_of(a)[k]]) == set(b.state[params_of(b)[k]])
        for name, value in values.items():
            if k in IN_BLOCKS and name not in ("step", "master") and POLICIES[policy].get("state_dtype") == "int8":
                assert torch.allclose(value, two[k][name], rtol=1e-6, atol=0)
            else:
                assert_same_bits(value, two[k][name], name)
    go(b, 3, 5)


def test_an_optimizer_without_a_policy_goes_on_in_fp32() -> None:
    a = trained(ADAMW, **SMALLEST)
    b = AdamW(copies(a))
    with pytest.warns(UserWarning, match=r"fp32 numbers of 4 parameters was dropped.* master="):
        b.load_state_dict(a.portable_state_dict())
    assert "state_dtype" not in b.param_groups[0]
    for p in params_of(b):
        assert set(b.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        assert {v.dtype for v in b.state[p].values()} == {F32}
    go(b, 3, 4)


def test_fp32_parameters_that_were_made_of_a_master_need_none() -> None:
    a = trained(ADAMW, **SMALLEST)
    content = a.portable_state_dict()
    params = [torch.nn.Parameter(values["master"].clone()) for values in content["state"].values()]
    for b in (AdamW(params), AdamW(params, master="remainder")):
        b.load_state_dict(content)
        assert all("master" not in b.state[p] for p in params)
    params[0].data.zero_()
    with pytest.warns(UserWarning, match="fp32 numbers of 1 parameters was dropped"):
        AdamW(params).load_state_dict(content)


@pytest.mark.parametrize("policy", [{}, {"master": "remainder"}], ids=str)
def test_parameters_without_values_take_it_as_it_is(policy: dict[str, Any]) -> None:
    a = trained(ADAMW, **SMALLEST)
    content = a.portable_state_dict()
    others = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in params_of(a)]
    others[1] = torch.nn.UninitializedParameter(dtype=others[1].dtype)
    b = AdamW(others, **policy)
    del a
    b.load_state_dict(content)
    for p in others:
        assert "master" in b.state[p] or "param_master" in b.state[p]


@pytest.mark.parametrize("param", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_checkpoints_load_into_a_policy(case: Case, param: torch.dtype) -> None:
    params = parameters(SHAPES, param)
    theirs = case.make_torch(params)
    go(theirs, 0, 3)
    mine = case.make(copies(theirs), master=F32, state_dtype="int8")
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for i, (p, q) in enumerate(zip(params, params_of(mine), strict=True)):
        names = {n for n, v in theirs.state[p].items() if n != "step" and v is not None}
        assert all((f"{n}_q8" in mine.state[q]) == (i in IN_BLOCKS) for n in names)
    go(mine, 3, 4)
    assert all(("param_master" in mine.state[q]) == (param != F32) for q in params_of(mine))


# ---- who refuses the other ----


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_does_not_train_on_with_codes(case: Case, foreach: bool) -> None:
    """It would take a momentum that it does not find for one to come: a mark stands in its place."""
    a = trained(case, state_dtype="int8")
    for fused in (False, True):
        if fused and (foreach or case.optimizer == "RMSprop"):
            continue
        theirs = case.make_torch(copies(a), **({"fused": True} if fused else {"foreach": foreach}))
        theirs.load_state_dict(copy.deepcopy(a.state_dict()))
        for group in theirs.param_groups:  # which the checkpoint brought along
            group.update(foreach=foreach and not fused, fused=fused)
        set_gradients(params_of(theirs), 3)
        before = [p.detach().clone() for p in params_of(theirs)]
        with pytest.raises((KeyError, AttributeError, TypeError)):
            theirs.step()
        for i in IN_BLOCKS:
            assert_same_bits(before[i], params_of(theirs)[i].detach())


def test_marks_are_in_state_dicts_only() -> None:
    a = trained(SGD, state_dtype="int8")
    for i, p in enumerate(params_of(a)):
        assert ("momentum_buffer" in a.state[p]) == (i not in IN_BLOCKS)
    assert a.state_dict()["state"][1]["momentum_buffer"] == 0
    b = SGD.make(copies(a))
    b.load_state_dict(a.state_dict())
    assert "momentum_buffer" not in b.state[params_of(b)[1]]
    for o in (a, b):
        go(o, 3, 5)
    assert_same_optimizers(a, b)


def test_torch_goes_on_from_the_parameters_where_the_rest_is_a_remainder() -> None:
    """Which it carries along and does not read: as without it."""
    a = trained(ADAMW, master="remainder", state_dtype=BF16)
    with_it, without = (torch.optim.AdamW(copies(a)) for _ in range(2))
    content = copy.deepcopy(a.state_dict())
    with_it.load_state_dict(copy.deepcopy(content))  # of which torch shares what it need not cast
    for values in content["state"].values():
        del values["param_remainder"]
    without.load_state_dict(content)
    for o in (with_it, without):
        go(o, 3, 5)
    for p, q in zip(params_of(with_it), params_of(without), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert "param_remainder" in with_it.state[p]


def test_a_remainder_that_another_library_cast_is_refused() -> None:
    a = trained(ADAMW, master="remainder")
    theirs = torch.optim.AdamW(copies(a, F32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_state_dict(a.state_dict())
    b = AdamW(copies(a), master="remainder")
    with pytest.raises(ValueError, match=r"'param_remainder' .* unsupported dtype torch\.float32"):
        b.load_state_dict(theirs.state_dict())
    assert not b.state

"""``master=`` in checkpoints: of one kind loaded into another, and of another step than the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_optimizers, parameters
from checkpoints import BF16, F16, F32
from policies import (
    MASTERS,
    SHAPES,
    STATES,
    beside,
    go,
    moved,
    numbers,
    params_of,
    with_master,
)

from fusedoptim import AdamW


@pytest.mark.parametrize("how", ["file", "deepcopy"])
@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_a_run_goes_on_with_the_same_bits(master: Any, how: str) -> None:
    a, _ = with_master(master)
    if how == "deepcopy":
        b = copy.deepcopy(a)
    else:
        b = beside(a, master=master, state_dtype=F32)
        b.load_state_dict(moved(a))
    for o in (a, b):
        go(o, 3, 6)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("asked", MASTERS, ids=str)
@pytest.mark.parametrize("saved", MASTERS, ids=str)
def test_one_kind_loads_into_another(saved: Any, asked: Any) -> None:
    a, _ = with_master(saved)
    b = beside(a, master=asked, state_dtype=F32)
    b.load_state_dict(moved(a))
    assert b.param_groups[0]["master"] == asked
    assert all(STATES[k] not in values for values in b.state.values() for k in MASTERS if k != asked)
    lost = 2.0**-15 if asked == "remainder8" else 2.0**-23 if saved != asked else 0.0
    for x, y, p, q in zip(numbers(a), numbers(b), params_of(a), params_of(b), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert torch.allclose(x, y, rtol=lost, atol=0)
    go(b, 3, 4)


def test_an_optimizer_without_a_policy_takes_over_the_checkpoints() -> None:
    a, _ = with_master("remainder")
    b = beside(a)
    b.load_state_dict(a.state_dict())
    for o in (a, b):
        go(o, 3, 5)
    assert_same_optimizers(a, b)
    assert b.param_groups[0]["master"] == "remainder" and b.param_groups[0]["state_dtype"] == F32


def test_a_master_that_is_asked_for_ends_what_the_checkpoint_says_of_rounding_parameters() -> None:
    a, _ = with_master(None, rounding={"param": "stochastic", "exp_avg_sq": "nearest"})
    b = beside(a, master="remainder", state_dtype=F32)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["rounding"] == {"exp_avg_sq": "nearest"}
    go(b, 3, 4)


def test_what_others_rounded_to_even_is_split_within_one_unit_of_the_remainder() -> None:
    """A tie that was rounded towards zero has no remainder of 16 bits."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F800001, 0x3F80FFFF, -0x407F8000, 0x00008000, 0x7F7F8000, 0x7F800000]
    )
    master = bits.to(torch.int32).view(F32)
    for kind, unit in (("remainder", 1), ("remainder8", 256)):
        p = torch.nn.Parameter(master.to(BF16))
        o = AdamW([p], master=kind)
        zeros = torch.zeros(8)
        o.load_state_dict(
            {**o.state_dict(), "state": {0: {"step": 1, "exp_avg": zeros, "exp_avg_sq": zeros, "master": master}}}
        )
        assert (numbers(o)[0].view(torch.int32) - master.view(torch.int32)).abs().max() <= unit


def doubtful(values: list[float], p_values: list[float], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    p = torch.nn.Parameter(torch.tensor(p_values, dtype=dtype))
    o = AdamW([p], master=F32)
    z = torch.zeros(len(values))
    return o, {
        **o.state_dict(),
        "state": {0: {"step": 3, "exp_avg": z, "exp_avg_sq": z, "master": torch.tensor(values)}},
    }


@pytest.mark.parametrize(
    ("dtype", "of_master", "of_p"),
    [
        (BF16, 1 + 2.0**-8, 1.0),  # a tie, to even
        (BF16, 1 + 2.0**-8, 1 + 2.0**-7),  # the same, away from zero
        (BF16, 1 + 2.0**-8 - 2.0**-23, 1.0),
        (BF16, 0.0, -0.0),
        (BF16, float("nan"), float("nan")),
        (BF16, -float("inf"), -float("inf")),
        (F16, 1 + 2.0**-12, 1.0),
    ],
    ids=str,
)
def test_a_master_that_was_rounded_to_its_parameter_loads(dtype: Any, of_master: float, of_p: float) -> None:
    o, content = doubtful([1.0, of_master], [1.0, of_p], dtype)
    o.load_state_dict(content)
    assert len(o.state) == 1


@pytest.mark.parametrize(
    ("dtype", "of_master", "of_p"),
    [
        (BF16, 1 + 2.0**-8 + 2.0**-23, 1.0),
        (BF16, 1 + 2.0**-8 - 2.0**-23, 1 + 2.0**-7),
        (BF16, 0.0, 1e-30),
        (BF16, float("nan"), 1.0),
        (BF16, 1.0, float("nan")),
        (BF16, float("inf"), 3e38),
        (BF16, float("inf"), -float("inf")),
        (F16, 1 + 2.0**-10, 1.0),
    ],
    ids=str,
)
def test_a_master_of_another_step_is_refused(dtype: Any, of_master: float, of_p: float) -> None:
    o, content = doubtful([1.0, of_master], [1.0, of_p], dtype)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0.*1 of 2 elements.*Load the model first.*reset_master"
    ):
        o.load_state_dict(content)
    assert not o.state and o.param_groups[0]["master"] == F32


def test_a_model_and_an_optimizer_of_different_steps() -> None:
    """The optimizer is loaded before the model; then after it."""
    a, _ = with_master(F32)
    fresh = parameters(SHAPES, BF16)
    b = AdamW([(f"layer.{i}", p) for i, p in enumerate(fresh)], master="remainder")
    content = moved(a)
    with pytest.raises(ValueError, match=r"parameter 0 'layer\.0' of group 0"):
        b.load_state_dict(content)
    assert not b.state
    for p, q in zip(fresh, params_of(a), strict=True):
        p.data.copy_(q)
    b.load_state_dict(content)
    go(b, 3, 4)


def test_older_checkpoints_have_none_and_go_on_from_the_parameters() -> None:
    a, _ = with_master(None)
    for master in MASTERS:
        b = beside(a, master=master, state_dtype=F32)
        b.load_state_dict(a.state_dict())
        assert all(STATES[master] not in values for values in b.state.values())
        go(b, 3, 4)
        assert all(STATES[master] in values for values in b.state.values())

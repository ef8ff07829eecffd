"""``master=``: the fp32 numbers that 16-bit parameters stand for, as users write to these, change and reset them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F32
from policies import (
    MASTERS,
    SGD,
    SHAPES,
    STATES,
    beside,
    go,
    moved,
    numbers,
    with_master,
)

from fusedoptim import AdamW

# ---- writing to parameters ----


@pytest.mark.parametrize("master", MASTERS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_written_to_a_parameter_is_its_new_number(backend: str, master: Any) -> None:
    """Off by less than a unit in its last place with a remainder; a zero stays one, whatever was left."""
    o, params = with_master(master, backend=backend)
    one, two, three = params[0], params[1], params[4]
    with torch.no_grad():
        one.zero_()
        two.data = torch.full_like(two, 0.75)
        three.copy_(torch.full_like(three, -3.0))
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in o.param_groups:
        group["lr"] = 0.0
    o.step()
    found = numbers(o)
    assert (found[0] == 0).all() or (found[0].abs() < 1e-38).all()
    for x, value in ((found[1], 0.75), (found[4], -3.0)):
        assert torch.allclose(x, torch.full_like(x, value), rtol=2.0**-8, atol=0)
        assert x.isfinite().all()


@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_reset_master_takes_the_parameters_as_they_are(master: Any) -> None:
    o, params = with_master(master)
    addresses = [o.state[p][STATES[master]].data_ptr() for p in params]
    versions = [o.state[p][STATES[master]]._version for p in params]
    with torch.no_grad():
        params[1].mul_(0.5)
    o.reset_master()
    for x, p in zip(numbers(o), params, strict=True):
        assert_same_bits(x, p.detach().float())
    assert addresses == [o.state[p][STATES[master]].data_ptr() for p in params]
    assert all(o.state[p][STATES[master]]._version > v for p, v in zip(params, versions, strict=True))
    b = beside(o, master=F32)
    b.load_state_dict(o.state_dict())
    go(o, 3, 4)


def test_reset_master_where_there_is_nothing_to_reset() -> None:
    params = parameters(SHAPES, BF16)
    o = AdamW(params, master="remainder")
    o.reset_master()
    assert not o.state
    plain = SGD.make(parameters([(3,)]))
    go(plain, 0, 1)
    before = copy.deepcopy(plain.state_dict())
    plain.reset_master()
    assert str(before) == str(plain.state_dict())


def test_reset_master_leaves_a_loaded_state_dict_alone() -> None:
    params = [torch.nn.Parameter(torch.rand(256, 256).to(BF16))]
    a = AdamW(params, master="remainder")
    go(a, 0, 2)
    content = moved(a)
    expected = content["state"][0]["param_remainder"].clone()
    b = beside(a, master="remainder")
    b.load_state_dict(content)
    b.reset_master()
    assert_same_bits(content["state"][0]["param_remainder"], expected)
    assert not b.state[b.param_groups[0]["params"][0]]["param_remainder"].any()


def test_reset_master_within_averages_is_refused() -> None:
    o, _ = with_master("remainder", ema_decay=0.5)
    with o.ema_weights(), pytest.raises(RuntimeError, match=r"within ema_weights\(\)"):
        o.reset_master()


# ---- changes of groups and parameters ----


@pytest.mark.parametrize("second", [*MASTERS, None], ids=str)
@pytest.mark.parametrize("first", [*MASTERS, None], ids=str)
def test_a_group_changes_its_master_between_steps(first: Any, second: Any) -> None:
    """As a checkpoint loaded into the other kind does."""
    o, _ = with_master(first)
    twin = beside(o, master=second, state_dtype=F32)
    twin.load_state_dict(o.state_dict())
    for opt in (o, twin):
        if second is None:
            opt.param_groups[0].pop("master", None)
        else:
            opt.param_groups[0]["master"] = second
    for opt in (o, twin):
        go(opt, 3, 5)
    assert_same_optimizers(o, twin)
    there = {STATES[k] for k in MASTERS} & set().union(*o.state.values())
    assert there == ({STATES[second]} if second else set())


def test_a_remainder_of_before_is_no_longer_known() -> None:
    o, params = with_master("remainder", 2)
    o.param_groups[0]["master"] = "remainder8"
    go(o, 2, 3)
    del o.param_groups[0]["master"]
    go(o, 3, 4)
    o.param_groups[0]["master"] = F32
    before = [p.detach().float() for p in params]
    o.param_groups[0]["lr"] = 0.0
    go(o, 4, 5)
    for x, y in zip(numbers(o), before, strict=True):
        assert_same_bits(x, y)


def test_a_step_that_fails_leaves_the_masters_as_they_were() -> None:
    o, params = with_master("remainder")
    before = copy.deepcopy(o.state_dict())
    o.param_groups[0]["master"] = F32
    set_gradients(params, 3)
    params[-1].grad = torch.zeros_like(params[-1]).detach().to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        o.step()
    del o.param_groups[0]["master"]
    assert list(o.state[params[0]]) == list(before["state"][0])
    for i, p in enumerate(params):
        for name, value in before["state"][i].items():
            assert_same_bits(o.state[p][name], value, name)


@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_a_model_that_changes_its_dtype(master: Any) -> None:
    """To fp32 it goes on from what the parameters show; back without a step in between, nothing is lost."""
    model = torch.nn.Linear(64, 64).to(BF16)
    o = AdamW(model.parameters(), lr=1e-3, master=master)
    go(o, 0, 2)
    kept = numbers(o)
    model.float()
    model.bfloat16()
    for x, y in zip(kept, numbers(o), strict=True):
        assert_same_bits(x, y)
    model.float()
    twin = copy.deepcopy(o)
    with pytest.warns(UserWarning, match=r"fp32 numbers of 2 parameters was dropped.*portable_state_dict\(\)") as found:
        go(o, 2, 3)
    assert len(found) == 1
    content = twin.state_dict()
    with pytest.warns(UserWarning, match="fp32 numbers of 2 parameters was dropped"):
        beside(twin, state_dtype=BF16).load_state_dict(content)
    assert not {STATES[k] for k in MASTERS} & set().union(*o.state.values())
    model.bfloat16()
    before = [p.detach().float() for p in model.parameters()]
    o.param_groups[0]["lr"] = 0.0
    go(o, 3, 4)
    for x, y in zip(before, numbers(o), strict=True):
        assert_same_bits(x, y)
    model.half()
    if master == F32:
        go(o, 4, 5)
    else:
        with pytest.raises(
            ValueError, match=r"float16, which is no upper part of a float32: use master=torch\.float32"
        ):
            go(o, 4, 5)


@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_nothing_is_said_where_nothing_is_lost(master: Any) -> None:
    model = torch.nn.Linear(64, 64).to(BF16)
    o = AdamW(model.parameters(), lr=1e-3, master=master, state_dtype=F32)
    go(o, 0, 2)
    content, raw = o.portable_state_dict(), copy.deepcopy(o.state_dict())
    model.float()
    for p, values in zip(model.parameters(), content["state"].values(), strict=True):
        p.data.copy_(values["master"])
    go(o, 2, 3)  # of whose parameters every bit is there
    model.bfloat16()
    go(o, 3, 4)
    o.reset_master()
    model.float()
    go(o, 4, 5)
    wide = [torch.nn.Parameter(values["master"].clone()) for values in content["state"].values()]
    AdamW(wide).load_state_dict(raw)
    wide[0].data[0, 0] = content["state"][0]["master"][0, 0] = float("nan")
    AdamW(wide).load_state_dict(content)


def test_a_loss_is_told_once_and_only_if_it_happens() -> None:
    model = torch.nn.Linear(64, 64).to(BF16)
    o = AdamW(model.parameters(), lr=1e-3, master="remainder", skip_nonfinite=True)
    go(o, 0, 2)
    kept = copy.deepcopy(o.state_dict())
    model.float()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    o.step()
    assert o.skipped_steps == 1 and all("param_remainder" in values for values in o.state.values())
    with pytest.warns(UserWarning, match="of 2 parameters was dropped"):
        go(o, 2, 3)
    go(o, 3, 4)
    model.bfloat16()
    rounded = AdamW(model.parameters(), lr=1e-3, rounding={"param": "stochastic"})
    with pytest.warns(UserWarning, match="of 2 parameters was dropped"):
        rounded.load_state_dict(kept)


def test_groups_of_different_kinds_side_by_side() -> None:
    options: list[Any] = [{"master": k, "state_dtype": F32} for k in MASTERS]
    options += [{}, {"rounding": {"param": "stochastic"}}, {"master": None}]
    alone = []
    for i, own in enumerate(options):
        o = AdamW([{"params": parameters([(5,), (64, 65)], BF16, i), **own}], lr=1e-2)
        alone.append(o)
    first, *rest = ({"params": parameters([(5,), (64, 65)], BF16, i), **own} for i, own in enumerate(options))
    together = AdamW([first], lr=1e-2)
    for group in rest:
        together.add_param_group(group)
    for step in range(3):
        for o in alone:
            go(o, step, step + 1)
        for group in together.param_groups:
            set_gradients(group["params"], step)
        together.step()
    for k, o in enumerate(alone):
        if k == 4:  # whose random bits are by number
            continue
        for p, q in zip(o.param_groups[0]["params"], together.param_groups[k]["params"], strict=True):
            assert_same_bits(p.detach(), q.detach())
            for name, value in o.state[p].items():
                assert_same_bits(value, together.state[q][name], name)
    assert "master" not in together.param_groups[5]


def test_a_group_that_is_added_is_checked_first() -> None:
    o = AdamW(parameters([(5,)], BF16), master="remainder")
    with pytest.raises(ValueError, match="Invalid master: 'half'"):
        o.add_param_group({"params": parameters([(6,)], BF16), "master": "half"})
    with pytest.raises(ValueError, match="do not go together"):
        o.add_param_group({"params": parameters([(6,)], BF16), "rounding": {"param": "stochastic"}})
    assert len(o.param_groups) == 1


@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_parameters_in_other_memory_orders(master: Any) -> None:
    def build(flip: bool) -> tuple[Any, Any]:
        w = torch.rand(8, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(BF16)
        p = torch.nn.Parameter(w.contiguous(memory_format=torch.channels_last) if flip else w)
        return AdamW([p], master=master, lr=0.1), p

    a, p = build(False)
    b, q = build(True)
    for step in range(3):
        set_gradients([p], step)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    c, r = build(True)
    r.data.copy_(p.data)
    c.load_state_dict(a.state_dict())
    for o, x in ((a, p), (b, q), (c, r)):
        x.grad = torch.ones_like(p)
        o.step()
    for x in (q, r):
        assert_same_bits(p.detach(), x.detach().contiguous())
    assert b.state[q][STATES[master]].stride() == q.stride() == c.state[r][STATES[master]].stride()

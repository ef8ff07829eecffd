"""state_dict, load_state_dict and copies: torch.optim's contract."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import (
    CASES,
    EVERY,
    IN_TORCH,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    parameters,
    set_gradients,
)

import fusedoptim
from benchmarks.witness import ieee_sqrt


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dict_continues_with_the_same_bits(case: Case) -> None:
    shapes = [(5,), (3, 4), (1025,)]
    one, two = parameters(shapes), parameters(shapes)
    a, b = case.make(one), case.make(two)
    for step in range(3):
        set_gradients(one, step)
        a.step()
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    for p, q in zip(one, two, strict=True):
        q.data.copy_(p.data)
    for step in range(3, 6):
        for params, o in ((one, a), (two, b)):
            set_gradients(params, step)
            o.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_state_dict_moves_to_and_from_torch_in_mid_training(case: Case, back: bool) -> None:
    shapes = [(5,), (3, 4), (1025,)]
    straight, moved = parameters(shapes), parameters(shapes)
    torch_straight = case.make_torch(straight, foreach=False)
    first = case.make(moved) if back else case.make_torch(moved, foreach=False)
    second = case.make_torch(moved, foreach=False) if back else case.make(moved)
    for step in range(6):
        if step == 3:
            second.load_state_dict(first.state_dict())
        o = first if step < 3 else second
        set_gradients(straight, step)
        set_gradients(moved, step)
        with ieee_sqrt():
            torch_straight.step()
            o.step()
    assert_same_optimizers(second, torch_straight)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(case: Case, how: str) -> None:
    params = parameters([(5,), (3, 4)])
    a = case.make(params, state_dtype=torch.bfloat16, **case.as_it_is)
    set_gradients(params, 0)
    a.step()
    b = copy.deepcopy(a) if how == "deepcopy" else pickle.loads(pickle.dumps(a))
    others = [p for g in b.param_groups for p in g["params"]]
    assert all(p is not q for p, q in zip(params, others, strict=True))
    for step in range(1, 4):
        for ps, o in ((params, a), (others, b)):
            set_gradients(ps, step)
            o.step()
    assert_same_optimizers(a, b)
    assert b._options == a._options


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_loading_copies_the_tensors(case: Case) -> None:
    params = parameters([(5,)])
    a = case.make(params)
    set_gradients(params, 0)
    a.step()
    b = case.make(parameters([(5,)]))
    b.load_state_dict(a.state_dict())
    for one, two in zip(a.state.values(), b.state.values(), strict=True):
        for name, value in one.items():
            assert value.data_ptr() != two[name].data_ptr()


def test_groups_that_carry_torchs_options_load() -> None:
    params, others = parameters([(5,)]), parameters([(5,)])
    theirs = torch.optim.AdamW(params, foreach=True)
    set_gradients(params, 0)
    theirs.step()
    mine = fusedoptim.AdamW(others)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["foreach"] is True and "bias_correction" not in mine.param_groups[0]
    set_gradients(others, 1)
    mine.step()
    assert mine.state_dict()["param_groups"][0]["foreach"] is True


def test_old_checkpoints_have_numbers_for_steps_and_none_for_buffers() -> None:
    p = parameters([(5,)])
    o = fusedoptim.Adam(p)
    d = o.state_dict()
    d["state"] = {0: {"step": 7, "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)}}
    o.load_state_dict(d)
    set_gradients(p, 0)
    o.step()
    assert o.state[p[0]]["step"].item() == 8
    q = parameters([(5,)])
    s = fusedoptim.SGD(q, momentum=0.9)
    d = s.state_dict()
    d["state"] = {0: {"momentum_buffer": None}}
    s.load_state_dict(d)
    set_gradients(q, 0)
    s.step()
    assert_same_bits(s.state[q[0]]["momentum_buffer"], q[0].grad)


def test_load_state_dict_hooks_see_and_change_what_is_loaded() -> None:
    p = parameters([(5,)])
    o = fusedoptim.Adam(p)
    set_gradients(p, 0)
    o.step()

    def double(optimizer: torch.optim.Optimizer, d: dict) -> dict:
        d = copy.deepcopy(d)
        d["state"][0]["exp_avg"] *= 2
        return d

    seen = []
    o2 = fusedoptim.Adam(parameters([(5,)]))
    o2.register_load_state_dict_pre_hook(double)
    o2.register_load_state_dict_post_hook(lambda opt: seen.append(next(iter(opt.state.values()))["exp_avg"].clone()))
    o2.load_state_dict(o.state_dict())
    assert_same_bits(seen[0], o.state[p[0]]["exp_avg"] * 2)

"""Optimizers whose rules are functions alone: what the tests over all rows of cases.py leave out."""

from __future__ import annotations

import copy
import inspect
import sys
from itertools import product
from types import FrameType
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    EVERY,
    IN_TORCH,
    OPTIMIZERS,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    parameters,
    set_gradients,
)
from test_parity import STEPS, rounded_witness_step, run_against_torch

import fusedoptim
from benchmarks.witness import ieee_sqrt
from fusedoptim import gallery

OWN = [case for case in CASES if case.own]
#: torch.optim's, with the values that their options take in all combinations.
TORCHS: dict[str, dict[str, tuple[Any, ...]]] = {
    "Adadelta": {"rho": (0.0, 0.9, 1.0), "weight_decay": (0, 0.1)},
    "Adamax": {"betas": ((0.0, 0.0), (0.9, 0.99)), "weight_decay": (0, 0.1)},
    "ASGD": {"alpha": (0.0, 0.5, 1.0), "t0": (0, 3, 50), "weight_decay": (0, 0.1)},
    "NAdam": {
        "betas": ((0.0, 0.0), (0.9, 0.99)),
        "weight_decay": (0, 0.1),
        "momentum_decay": (0, 0.05),
        "decoupled_weight_decay": (False, True),
    },
    "RAdam": {
        "betas": ((0.0, 0.0), (0.9, 0.9), (0.9, 0.99)),
        "weight_decay": (0, 0.1),
        "decoupled_weight_decay": (False, True),
    },
    "Rprop": {"etas": ((0.5, 1.2), (0.9, 3.0)), "step_sizes": ((1e-6, 50), (0.005, 0.02))},
}


def combinations(optimizer: str) -> list[Case]:
    """Every second one maximizes."""
    found = []
    for values in product(*TORCHS[optimizer].values()):
        options = dict(zip(TORCHS[optimizer], values, strict=True))
        if options.get("decoupled_weight_decay") and not options["weight_decay"]:
            continue  # there is nothing to decouple
        found.append(Case("", optimizer, {"lr": 0.03, "maximize": len(found) % 2 == 1, **options}))
    return found


def test_all_that_the_gallery_has_is_exported() -> None:
    assert {name for name in gallery.__all__ if getattr(fusedoptim, name) is getattr(gallery, name)} == {
        cls.__name__ for cls in OPTIMIZERS if cls.__module__.startswith("fusedoptim.gallery.")
    }
    assert {case.optimizer for case in EVERY if case.own} == set(gallery.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", TORCHS)
def test_torchs_bits_with_all_options(optimizer: str, dtype: torch.dtype) -> None:
    """A hundred steps under a schedule."""
    for case in combinations(optimizer):
        run_against_torch(case, dtype, ["reference"], STEPS, [(17,)])


@pytest.mark.parametrize("case", [c for c in EVERY if c.own and c.in_torch], ids=str)
def test_capturable_changes_no_bit(case: Case) -> None:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    a, b = case.make(mine, capturable=True), case.make(theirs)
    for step in range(8):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert a.param_groups[0]["capturable"] is True
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in EVERY if c.own and c.in_torch], ids=str)
def test_parameters_of_16_bits_are_rounded_once(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """torch.optim on fp32 copies, then one rounding of parameters and states; a first step size is exact."""
    mine = parameters([(1025,), (7, 11)], dtype)
    work = [torch.nn.Parameter(p.detach().float()) for p in mine]
    options = {"lr": 2.0**-7}
    a = case.make(mine, state_dtype=state_dtype, rounding="nearest", **options)
    b = case.make_torch(work, foreach=False, **options)
    for step in range(10):
        set_gradients(mine, step)
        a.step()
        rounded_witness_step(mine, work, b, state_dtype, kept=("step", *a.rule.number_names))
    for p, w in zip(mine, work, strict=True):
        assert_same_bits(p.detach(), w.detach().to(dtype), "parameter")
        for name, s in a.state[p].items():
            assert_same_bits(s, b.state[w][name].to(s.dtype), name)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_a_learning_rate_of_one_element(case: Case) -> None:
    """In a tensor of one dimension it is as in one of none."""
    found = []
    for shape in ((), (1,)):
        params = parameters(SHAPES)
        optimizer = case.make(params, lr=torch.full(shape, 0.01))
        for step in range(4):
            set_gradients(params, step)
            optimizer.step()
        found.append(optimizer)
    assert_same_optimizers(*found)


@pytest.mark.parametrize("optimizer", ["NAdam", "ASGD"])
def test_numbers_that_older_torch_saved_as_floats(optimizer: str) -> None:
    """Loaded into torch's optimizer, too, they lead to the same bits."""
    mine, theirs = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    options = {"t0": 1} if optimizer == "ASGD" else {}
    a = getattr(fusedoptim, optimizer)(mine, backend="reference", **options)
    b = getattr(torch.optim, optimizer)(theirs, foreach=False, **options)
    for step in range(3):
        set_gradients(theirs, step)
        with ieee_sqrt():
            b.step()
    content = copy.deepcopy(b.state_dict())
    for values in content["state"].values():
        for name in ("step", *a.rule.number_names):
            values[name] = values[name].item()
    a.load_state_dict(copy.deepcopy(content))
    b.load_state_dict(content)
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q.data)
    for step in range(3, 6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        with ieee_sqrt():
            b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", [c for c in IN_TORCH if c.own], ids=str)
def test_training_goes_on_in_torch_and_comes_back(case: Case) -> None:
    """Through state_dicts: two steps here, two there, two here, with the bits of six there."""
    mine, theirs, straight = (parameters([(5,), (3, 4)]) for _ in range(3))
    a, b = case.make(mine), case.make_torch(theirs, foreach=False)
    witness = case.make_torch(straight, foreach=False)
    turns: list[tuple[list, Any]] = [(mine, a), (theirs, b), (mine, a)]
    for turn, (params, optimizer) in enumerate(turns):
        if turn:
            before, source = turns[turn - 1]
            optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
            for p, q in zip(params, before, strict=True):
                p.data.copy_(q.data)
        for step in (2 * turn, 2 * turn + 1):
            for ps, o in ((params, optimizer), (straight, witness)):
                set_gradients(ps, step)
                with ieee_sqrt():
                    o.step()
    assert_same_optimizers(a, witness)


def lines_of(function: Any) -> set[int]:
    return {line for *_, line in function.__code__.co_lines() if line not in (None, function.__code__.co_firstlineno)}


@pytest.mark.parametrize("name", gallery.__all__)
def test_the_rows_of_cases_reach_every_line(name: str) -> None:
    function, seen = getattr(gallery, name).rule.reference, set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is not function.__code__:
            return None
        seen.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    for case in CASES:
        if case.optimizer == name:
            params = parameters([(7, 11)])
            optimizer = case.make(params, backend="reference")
            sys.settrace(trace)
            try:
                for step in range(8):
                    set_gradients(params, step)
                    optimizer.step()
            finally:
                sys.settrace(before)
    source = inspect.getsource(function).splitlines()
    first = function.__code__.co_firstlineno
    missed = [source[line - first] for line in sorted(lines_of(function) - seen)]
    assert not missed


@pytest.mark.parametrize("name", gallery.__all__)
def test_the_self_checks_arguments(name: str) -> None:
    """Its six steps have all of the rule's states, and every element moves."""
    cls, params = getattr(gallery, name), parameters([(1025,)])
    optimizer = cls(params, backend="reference", **cls._self_check)
    before = params[0].detach().clone()
    for step in range(6):
        set_gradients(params, step)
        optimizer.step()
    assert {slot.name for slot in cls.rule.states} <= set(optimizer.state[params[0]])
    assert (params[0].detach() != before).float().mean() > 0.99 and params[0].isfinite().all()


@pytest.mark.parametrize("name", ["Adadelta", "Adamax", "Rprop", "AdamWScheduleFree", "NAdam"])
def test_two_moments_of_bitsandbytes_are_no_other_states(name: str) -> None:
    optimizer = getattr(fusedoptim, name)(parameters([(4,)]), backend="reference")
    content = optimizer.state_dict()
    content["state"] = {0: {"step": 3, "state1": torch.ones(4), "state2": torch.ones(4)}}
    with pytest.raises(ValueError, match="Nothing was loaded"):
        optimizer.load_state_dict(content)
    assert not optimizer.state

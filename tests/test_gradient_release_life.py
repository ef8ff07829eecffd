"""How long steps within the backward pass last, and for which parameters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
from cases import BY_NAME, FULL, Case, assert_same_bits, assert_same_optimizers, parameters
from released import FROZEN, assert_same_state_dicts, loss_of, make, ordinary, released

import fusedoptim
from fusedoptim import step_in_backward


@pytest.mark.parametrize("first", [True, False], ids=["before the first pass", "later"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_groups_added_while_it_is_active(case: Case, first: bool) -> None:
    (one, a), (two, b) = make(case), make(case)
    step_in_backward(a)
    for step in range(4):
        if step == (0 if first else 2):
            for o, params in ((a, one), (b, two)):
                new = parameters([(9,), (2, 2)], seed=1)
                o.add_param_group({"params": iter(new), "lr": 0.5})
                params += new
        released(one, step)
        ordinary(b, two, step)
    assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


def test_parameters_that_thaw_or_leave_the_optimizer() -> None:
    case = BY_NAME["adamw"]
    (one, a), (two, b) = make(case), make(case)
    step_in_backward(a)
    for step in range(6):
        for o, params in ((a, one), (b, two)):
            params[FROZEN].requires_grad_(step >= 1)
            if step == 3:  # from its end, and from its beginning, where it is the parameter whose hook notices
                del o.param_groups[2]["params"][-1], o.param_groups[0]["params"][0]
        loss_of(one, step).backward()
        assert [i for i, p in enumerate(one) if p.grad is not None] == ([0, FROZEN] if step >= 3 else [])
        for i in (0, FROZEN):
            one[i].grad = None
        ordinary(b, two, step)
        for i in (0, FROZEN):
            two[i].grad = None
        assert_same_optimizers(a, b)
        for p, q in zip(one, two, strict=True):
            assert_same_bits(p.detach(), q.detach())


def test_groups_changed_by_hand() -> None:
    """A pass hooks what was appended, for those that follow, and lets go of what was deleted."""
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    step_in_backward(a)
    new = {a: parameters([(9,)], seed=1)[0], b: parameters([(9,)], seed=1)[0]}
    for step in range(6):
        for o, params in ((a, one), (b, two)):
            if step == 1:
                o.param_groups.append({**o.param_groups[0], "params": [new[o]]})
            if step == 4:
                del o.param_groups[2:]
            loss_of([params[5] if step >= 4 else params[0], *([new[o]] if step in (2, 3) else [])], step).backward()
        assert (one[5].grad is not None) == (step >= 4) and one[0].grad is None and new[a].grad is None
        b.step()
        b.zero_grad()
        assert_same_optimizers(a, b)


def test_it_ends() -> None:
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    with step_in_backward(a) as handle:
        released(one, 0)
    handle.remove()  # once more does no harm
    ordinary(b, two, 0)
    loss_of(one, 1).backward()
    assert one[0].grad is not None
    a.step()
    a.zero_grad()
    ordinary(b, two, 1)
    handle = step_in_backward(a)
    released(one, 2)
    handle.remove()
    ordinary(b, two, 2)
    a.add_param_group({"params": parameters([(3,)])})
    assert not any(vars(a).keys() & {"_step_in_backward", "add_param_group"})
    assert all(not p._post_accumulate_grad_hooks for p in one)
    del a.param_groups[-1]
    assert_same_optimizers(a, b)


def test_a_removed_handle_does_not_end_its_successor() -> None:
    params, o = make(BY_NAME["sgd"])
    first = step_in_backward(o)
    first.remove()
    step_in_backward(o)
    first.remove()
    released(params, 0)
    o.add_param_group({"params": (new := parameters([(3,)]))})
    released(params + new, 1)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_step_in_the_ordinary_way(how: Callable) -> None:
    params, a = make(BY_NAME["adamw"])
    step_in_backward(a)
    released(params, 0)
    b = how(a)
    others = [p for g in b.param_groups for p in g["params"]]
    released(params, 1)
    ordinary(b, others, 1)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("keep", ["optimizer", "handle", "neither"])
def test_it_lasts_as_long_as_the_optimizer_or_the_handle(keep: str) -> None:
    params, o = make(BY_NAME["adamw"])
    handle = step_in_backward(o)
    released(params, 0)
    gone = weakref.ref(o)
    if keep != "optimizer":
        del o
    if keep != "handle":
        del handle
    gc.collect()
    loss_of(params, 1).backward()
    assert (gone() is None) == (params[0].grad is not None) == (keep == "neither")
    if keep == "neither":
        step_in_backward(fusedoptim.SGD(params))


def test_a_model_is_freed_with_its_optimizer() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    gone = [weakref.ref(o), *map(weakref.ref, params)]
    del params, o
    gc.collect()
    assert all(r() is None for r in gone)

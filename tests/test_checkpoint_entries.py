"""What a checkpoint has beside an optimizer's own states and values, and what it lacks."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, WITH_SLOTS, one_warning, stepped

import fusedoptim
from fusedoptim._checkpoint import SIGNATURES
from fusedoptim._storage import state_names


@pytest.mark.parametrize(
    "case", [*(c for c in FULL if c.optimizer != "AdamWScheduleFree"), Case("sgd", "SGD", {"lr": 0.1})], ids=str
)
@pytest.mark.parametrize("before", [False, True])
def test_entries_of_wrappers_are_carried_along(case: Case, before: bool) -> None:
    """As timm's Lookahead and schedule-free's wrapper keep their own in ``optimizer.state[p]``."""
    (a, ps), (b, qs) = stepped(case, steps=0), stepped(case, steps=0)
    own = {p: {"slow_buffer": p.detach().clone(), "z": [p.detach().double()], "note": "mine", "k": None} for p in ps}

    def put(optimizer: Any, params: list[Any]) -> None:
        for p, q in zip(params, ps, strict=True):
            optimizer.state[p].update(own[q])

    def there(optimizer: Any, params: list[Any]) -> None:
        for p, q in zip(params, ps, strict=True):
            values = optimizer.state[p]
            assert_same_bits(values["slow_buffer"], own[q]["slow_buffer"])
            assert_same_bits(values["z"][0], own[q]["z"][0])
            assert values["note"] == "mine" and values["k"] is None

    if before:
        put(a, ps)
    for step in range(2):
        for params, optimizer in ((ps, a), (qs, b)):
            set_gradients(params, step)
            optimizer.step()
    put(a, ps)
    a.step()
    b.step()
    there(a, ps)
    for p, q in zip(ps, qs, strict=True):
        assert_same_bits(p.detach(), q.detach())
    content = a.state_dict()
    assert content["state"][0]["slow_buffer"] is a.state[ps[0]]["slow_buffer"]
    loaded, rs = stepped(case, steps=0)
    loaded.load_state_dict(content)
    there(loaded, rs)
    assert loaded.state[rs[0]]["slow_buffer"] is not content["state"][0]["slow_buffer"]
    copied = copy.deepcopy(a)
    there(copied, copied.param_groups[0]["params"])
    there(pickled := pickle.loads(pickle.dumps(a)), pickled.param_groups[0]["params"])


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("other", ["Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "Adamax", "Adadelta", "ASGD", "Rprop"])
def test_a_checkpoint_of_another_optimizer_is_refused(case: Case, other: str) -> None:
    if case.optimizer.startswith(other):
        return
    params = parameters([(5,), (6,)])
    theirs = getattr(torch.optim, other)(params, **({"momentum": 0.9} if other in ("SGD", "RMSprop") else {}))
    set_gradients(params, 0)
    theirs.step()
    target, _ = stepped(case)
    before = copy.deepcopy(target.state_dict())
    known = {"step", *state_names(target.rule)}
    if target.rule.required_states() <= set(theirs.state[params[0]]) <= known:
        return  # as far as states tell, it is one of this optimizer's
    # Where this optimizer has all that tells the other, something is missing, or a buffer is there that SGD has.
    whose = "(are missing|it looks like one of SGD)" if SIGNATURES[other] <= known else f"it looks like one of {other}"
    with pytest.raises(ValueError, match=f"not one of {case.optimizer}: .*{whose}\\. Nothing was loaded"):
        target.load_state_dict(theirs.state_dict())
    assert str(target.state_dict()) == str(before)


@pytest.mark.parametrize("case", [c for c in FULL if len(c.cls.rule.required_states()) > 1], ids=str)
def test_a_step_says_which_state_is_missing(case: Case) -> None:
    optimizer, params = stepped(case)
    required = optimizer.rule.required_states()
    before = [p.detach().clone() for p in params]
    for name in required - {"step"}:
        value = optimizer.state[params[1]].pop(name)
        with pytest.raises(ValueError, match=f"the state of parameter 1 of group 0 .* lacks \\['{name}'\\]"):
            optimizer.step()
        optimizer.state[params[1]][name] = value
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)


def test_groups_of_plain_sgd_are_not_silently_adamws() -> None:
    theirs = torch.optim.SGD(parameters([(5,)]), lr=0.5)
    target = fusedoptim.AdamW(parameters([(5,)]))
    with one_warning("they have ['dampening', 'momentum', 'nesterov'], and lack ['betas', 'eps']"):
        target.load_state_dict(theirs.state_dict())
    assert target.param_groups[0]["betas"] == (0.9, 0.999)
    with one_warning(None):
        target.load_state_dict(torch.optim.AdamW(parameters([(5,)])).state_dict())
        fusedoptim.SGD(parameters([(5,)])).load_state_dict(theirs.state_dict())


# ---- groups ----


@pytest.mark.parametrize("case", [c for c in FULL if c.in_torch], ids=str)
def test_keys_that_older_torch_lacked_become_what_torch_makes_of_them(case: Case) -> None:
    mine, theirs = case.make(parameters([(5,)])), case.make_torch(parameters([(5,)]))
    content = theirs.state_dict()
    keys = ("amsgrad", "maximize", "nesterov", "centered", "capturable", "differentiable", "foreach", "fused")
    for key in keys:
        content["param_groups"][0].pop(key, None)
    mine.load_state_dict(copy.deepcopy(content))
    theirs.load_state_dict(copy.deepcopy(content))
    for key in keys:
        # SGD says False where the others say None, for fused.
        assert (mine.param_groups[0].get(key) or None) == (theirs.param_groups[0].get(key) or None), key


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_torchs_own_keys_keep_torchs_meaning(name: str) -> None:
    """A fused optimizer's checkpoint that passed through here is still one; and one that was made here with defaults
    leaves torch's optimizer as torch's own with defaults would."""

    def make(module: Any, **options: Any) -> Any:
        return getattr(module, name)(parameters([(5,)]), **options)

    mine = make(fusedoptim)
    mine.load_state_dict(make(torch.optim, fused=True).state_dict())
    theirs = make(torch.optim)
    theirs.load_state_dict(mine.state_dict())
    assert theirs.param_groups[0]["fused"] is True
    left, right = make(torch.optim, fused=True), make(torch.optim, fused=True)
    left.load_state_dict(make(fusedoptim).state_dict())
    right.load_state_dict(make(torch.optim).state_dict())
    for key, value in right.param_groups[0].items():
        assert key == "params" or left.param_groups[0][key] == value, key


def test_sparse_and_other_tensors_of_wrappers_are_carried_along() -> None:
    optimizer, params = stepped(FULL[0])
    optimizer.state[params[0]]["mask"] = torch.eye(3).to_sparse()
    content = copy.deepcopy(optimizer.state_dict())
    loaded, others = stepped(FULL[0], steps=0)
    loaded.load_state_dict(content)
    assert torch.equal(loaded.state[others[0]]["mask"].to_dense(), torch.eye(3))
    loaded.step()


def test_nothing_is_loaded_where_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0])
    before = copy.deepcopy(target.state_dict())

    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(fusedoptim._checkpoint, "_copy", fail)
    with pytest.raises(MemoryError):
        target.load_state_dict(source.state_dict())
    assert str(target.state_dict()) == str(before)
    set_gradients(params, 1)
    target.step()


def test_objects_of_wrappers_are_carried_by_reference() -> None:
    lock = threading.Lock()
    optimizer, params = stepped(FULL[0])
    optimizer.state[params[0]]["mine"] = {"lock": lock, "list": [torch.ones(2, dtype=BF16)], "pair": (1, None)}
    loaded, others = stepped(FULL[0], steps=0)
    loaded.load_state_dict(optimizer.state_dict())
    mine, theirs = (o.state[p[0]]["mine"] for o, p in ((loaded, others), (optimizer, params)))
    assert mine["lock"] is lock and mine["pair"] == (1, None)
    assert torch.equal(mine["list"][0], theirs["list"][0]) and mine["list"][0] is not theirs["list"][0]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_that_a_library_replaces_before_the_first_step(case: Case) -> None:
    """As accelerate does where it shards a model. An optimizer may have made its states by then."""
    optimizer, _ = stepped(case, steps=0, ema_decay=0.9)
    params = parameters([(4,), (2, 3)], seed=1)
    fresh = case.make(parameters([(4,), (2, 3)], seed=1), ema_decay=0.9)
    optimizer.param_groups[0]["params"] = params
    assert optimizer.state_dict()["state"].keys() == fresh.state_dict()["state"].keys()
    assert_same_optimizers(optimizer, fresh)
    for o in (optimizer, fresh):
        set_gradients(o.param_groups[0]["params"], 0)
        o.step()
    assert_same_optimizers(optimizer, fresh)


@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_states_of_steps_are_not_forgotten_with_their_parameters(case: Case) -> None:
    """torch names no such state, and says so by a KeyError."""
    optimizer, _ = stepped(case)
    before = len(optimizer.state)
    optimizer.param_groups[0]["params"] = parameters([(4,)])
    with pytest.raises(KeyError):
        optimizer.state_dict()
    assert len(optimizer.state) == before

"""Checkpoints as others leave them: narrow states, steps of any type, entries of wrappers, groups without some keys."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from torch import Tensor

import fusedoptim
from benchmarks.witness import ieee_sqrt

WITH_SLOTS = [case for case in FULL if case.optimizer != "NormAdaptive"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def stepped(case: Case, dtype: torch.dtype = F32, steps: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    params = parameters([(5,), (6,)], dtype)
    optimizer = case.make(params, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return optimizer, params


def slots(optimizer: Any) -> set[str]:
    return {slot.name for slot in optimizer.rule.states}


def cast(content: dict[str, Any], names: set[str], dtype: torch.dtype) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for values in content["state"].values():
        for name in names & values.keys():
            values[name] = values[name].to(dtype)
    return content


@contextmanager
def one_warning(expected: str | None) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == (expected is not None), [str(w.message) for w in caught]
    if expected is not None:
        assert expected in str(caught[0].message) and caught[0].filename == __file__


# ---- the dtype of states ----


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
    source, _ = stepped(case, param)
    target, params = stepped(case, param, steps=0, state_dtype=asked)
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
    source, _ = stepped(FULL[5], BF16, ema_decay=0.9)
    target, params = stepped(FULL[5], BF16, steps=0, state_dtype=BF16)
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
@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer != "SGD"], ids=str)
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
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0], steps=0)
    target.load_state_dict(cast(source.state_dict(), {"step"}, F64))
    assert target.state[params[0]]["step"].dtype == F64


@pytest.mark.parametrize("value", ["3", torch.ones(2), torch.tensor(1j), [1], np.ones(2)], ids=str)
def test_a_step_that_is_no_number(value: Any) -> None:
    optimizer, _ = stepped(FULL[0])
    content = copy.deepcopy(optimizer.state_dict())
    content["state"][1]["step"] = value
    with pytest.raises(ValueError, match="state 'step' of parameter 1 of group 0"):
        optimizer.load_state_dict(content)


# ---- entries of others ----


@pytest.mark.parametrize("case", [*FULL, Case("sgd", "SGD", {"lr": 0.1})], ids=str)
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
    known = other == "SGD" and case.optimizer == "RMSprop"  # which has a buffer of that name
    whose = "are missing" if known else f"it looks like one of {other}"
    with pytest.raises(ValueError, match=f"not one of {case.optimizer}: .*{whose}\\. Nothing was loaded"):
        target.load_state_dict(theirs.state_dict())
    assert str(target.state_dict()) == str(before)


@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer != "SGD"], ids=str)
def test_a_step_says_which_state_is_missing(case: Case) -> None:
    optimizer, params = stepped(case)
    name = next(iter(optimizer.rule.required_states() - {"step"}))
    del optimizer.state[params[1]][name]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=f"the state of parameter 1 of group 0 .* lacks \\['{name}'\\]"):
        optimizer.step()
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


# ---- memory ----


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of small tensors."""
    monkeypatch.setattr(fusedoptim._lending, "WORTH_LENDING", 0)


def content_of(optimizer: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def addresses(values: dict[str, Any], names: set[str]) -> list[int]:
    return [values[name].data_ptr() for name in sorted(names)]


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_a_state_dict_that_is_let_go_of_is_not_copied(case: Case) -> None:
    source, _ = stepped(case)
    target, params = stepped(case, steps=0)
    content = content_of(source)
    theirs = addresses(content["state"][1], slots(source))
    target.load_state_dict(content)
    del content
    target.step()
    assert addresses(target.state[params[1]], slots(source)) == theirs


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_state_dict_that_is_kept_stays_as_it_is(case: Case) -> None:
    source, _ = stepped(case)
    content = content_of(source)
    before = copy.deepcopy(content)
    targets = [stepped(case, steps=0) for _ in range(2)]
    for target, _ in targets:
        target.load_state_dict(content)
    for step in range(2):
        for target, params in targets:
            set_gradients(params, step)
            target.step()
    assert_same_optimizers(targets[0][0], targets[1][0])
    for i, values in content["state"].items():
        for name, value in values.items():
            assert_same_bits(value, before["state"][i][name], name)


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_states_of_a_living_optimizer_are_copied_at_once(case: Case, backend: str) -> None:
    """Its state_dict holds the very dicts that it works with."""
    source, ps = stepped(case, backend=backend)
    target, qs = stepped(case, steps=0, backend=backend)
    target.load_state_dict(source.state_dict())
    before = {n: v.clone() for n, v in target.state[qs[0]].items()}
    set_gradients(ps, 7)
    source.step()
    for name, value in target.state[qs[0]].items():
        assert_same_bits(value, before[name], name)


@pytest.mark.usefixtures("lending")
def test_views_numpy_memory_and_graphs_are_copied_at_once() -> None:
    source, _ = stepped(FULL[0])
    for change in (
        lambda t: torch.cat([t, t])[: t.numel()],
        lambda t: torch.from_numpy(t.numpy().copy()),
        lambda t: t[::1],
    ):
        content = content_of(source)
        changed = content["state"][0]["exp_avg"] = change(content["state"][0]["exp_avg"])
        address = changed.data_ptr()
        del changed
        target, params = stepped(FULL[0], steps=0)
        target.load_state_dict(content)
        assert target.state[params[0]]["exp_avg"].data_ptr() != address


@pytest.mark.usefixtures("lending")
def test_a_state_taken_after_loading_is_the_state_and_a_graph_notices_the_step() -> None:
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0], steps=0)
    content = content_of(source)
    target.load_state_dict(content)
    del content
    saved: Tensor = target.state[params[0]]["exp_avg"]
    loss = (torch.ones(5, requires_grad=True) * saved).sum()
    set_gradients(params, 3)
    target.step()
    assert target.state[params[0]]["exp_avg"] is saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("lending")
def test_torch_and_fusedoptim_agree_after_a_checkpoint_that_was_lent() -> None:
    theirs, mine = torch.optim.AdamW(p := parameters([(5,)])), fusedoptim.AdamW(q := parameters([(5,)]))
    with ieee_sqrt():
        set_gradients(p, 0)
        theirs.step()
        mine.load_state_dict(content_of(theirs))
        q[0].data.copy_(p[0].data)
        for params, optimizer in ((p, theirs), (q, mine)):
            set_gradients(params, 1)
            optimizer.step()
    assert_same_optimizers(theirs, mine)


@pytest.mark.usefixtures("lending")
def test_steps_in_the_backward_pass_leave_a_kept_state_dict_as_it_is() -> None:
    model = torch.nn.Linear(3, 2)
    source = fusedoptim.AdamW(model.parameters())
    set_gradients(list(model.parameters()), 0)
    source.step()
    source.zero_grad()
    content = content_of(source)
    before = copy.deepcopy(content)
    target = fusedoptim.AdamW(model.parameters())
    with fusedoptim.step_in_backward(target):
        target.load_state_dict(content)
        model(torch.ones(4, 3)).sum().backward()
    assert target.state[model.weight]["step"].item() == 2
    for i, values in content["state"].items():
        for name, value in values.items():
            assert_same_bits(value, before["state"][i][name], name)


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


def test_sparse_and_other_tensors_of_wrappers_are_carried_along() -> None:
    optimizer, params = stepped(FULL[0])
    optimizer.state[params[0]]["mask"] = torch.eye(3).to_sparse()
    content = copy.deepcopy(optimizer.state_dict())
    loaded, others = stepped(FULL[0], steps=0)
    loaded.load_state_dict(content)
    assert torch.equal(loaded.state[others[0]]["mask"].to_dense(), torch.eye(3))
    loaded.step()


@pytest.mark.usefixtures("lending")
def test_a_storage_that_somebody_holds_is_not_lent() -> None:
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0], steps=0)
    content = content_of(source)
    storage = content["state"][0]["exp_avg"].untyped_storage()
    before = storage.tolist()
    target.load_state_dict(content)
    del content
    set_gradients(params, 3)
    target.step()
    assert storage.tolist() == before


@pytest.mark.usefixtures("lending")
def test_shared_sums_stay_shared_after_loading() -> None:
    source, _ = stepped(FULL[4])
    target, params = stepped(FULL[4], steps=0)
    content = content_of(source)
    target.load_state_dict(content)
    target.share_memory()
    set_gradients(params, 3)
    target.step()
    assert target.state[params[0]]["sum"].is_shared() and not content["state"][0]["sum"].is_shared()


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

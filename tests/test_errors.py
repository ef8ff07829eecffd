"""Errors name the value and the parameter, and come before anything is written."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import FULL, Case, assert_same_bits, parameters, set_gradients

import fusedoptim
from fusedoptim import _backends


def stepped(case: Case) -> tuple[fusedoptim.FusedOptimizer, list]:
    ps = parameters([(5,), (6,)])
    o = case.make(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    o.step()
    return o, ps


def fails_without_a_trace(o: fusedoptim.FusedOptimizer, ps: list, match: str) -> None:
    before = [p.detach().clone() for p in ps]
    states = copy.deepcopy([o.state.get(p) for p in ps])
    with pytest.raises(ValueError, match=match):
        o.step()
    for p, b, s in zip(ps, before, states, strict=True):
        assert_same_bits(p.detach(), b)
        for name, value in (s or {}).items():
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                assert_same_bits(o.state[p][name], value)


@pytest.mark.parametrize(
    "value", [float("nan"), torch.tensor(float("nan")), None, "0.1", torch.ones(2), torch.tensor(1)], ids=str
)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_lr_that_is_no_number(case: Case, value: object) -> None:
    o, ps = stepped(case)
    o.param_groups[0]["lr"] = value
    fails_without_a_trace(o, ps, "parameter group 0: 'lr'")


def test_other_values_that_are_no_numbers() -> None:
    for key, value in [("betas", (0.9,)), ("betas", 3.0), ("eps", float("nan")), ("weight_decay", "x")]:
        o, ps = stepped(FULL[0])
        o.param_groups[0][key] = value
        fails_without_a_trace(o, ps, f"parameter group 0: '{key}'")
    o, ps = stepped(FULL[0])
    del o.param_groups[0]["eps"]
    fails_without_a_trace(o, ps, "parameter group 0 has no 'eps'")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_sparse_gradient(case: Case) -> None:
    """Of torch's optimizer that the message names it is one that can be stepped."""
    o, ps = stepped(case)
    ps[1].grad = torch.ones(6).to_sparse()
    who, instead = r"parameter 1 of group 0 \(shape \(6,\), torch.float32, cpu\)", o.rule.sparse_alternative
    fails_without_a_trace(o, ps, rf"{who} has a sparse gradient.*use torch\.optim\.{instead} for it")
    with torch.sparse.check_sparse_tensor_invariants():  # asked for, so that torch does not warn that it does not check
        getattr(torch.optim, instead)([ps[1]]).step()


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "complex.*view_as_real"),
        (lambda: torch.ones(1).expand(3), "expanded tensor"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "unsupported dtype"),
    ],
    ids=["complex", "expanded", "float8"],
)
def test_parameters_that_cannot_be_stepped(case: Case, make: Callable[[], torch.Tensor], match: str) -> None:
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(make())
    with pytest.raises(ValueError, match=f"parameter 1 of group 0.*{match}"):
        case.make([good, bad])
    o = case.make([good])
    with pytest.raises(ValueError, match=f"parameter 0 of group 1.*{match}"):
        o.add_param_group({"params": [bad]})
    assert len(o.param_groups) == 1
    good.grad = torch.ones(2)
    o.step()


@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer != "NormAdaptive"], ids=str)
def test_states_of_another_shape(case: Case) -> None:
    o, ps = stepped(case)
    name = next(n for n in o.state[ps[1]] if n != "step")
    o.state[ps[1]][name] = torch.ones(4)
    fails_without_a_trace(o, ps, rf"state '{name}' of parameter 1 of group 0.*shape \(4,\)")
    o, ps = stepped(case)
    d = copy.deepcopy(o.state_dict())
    d["state"][1][name] = torch.ones(4)
    before = o.state_dict()
    with pytest.raises(ValueError, match=rf"state '{name}' of parameter 1.*shape \(4,\)"):
        o.load_state_dict(d)
    assert o.state_dict() == before


def test_states_of_unusable_kinds() -> None:
    for value, match in [
        (torch.ones(5, dtype=torch.int64), "unsupported dtype"),
        (torch.ones(5, device="meta"), "is on meta"),
        ("gone", "must be a tensor"),
        (torch.ones(1).expand(5), "memory of its own"),
    ]:
        o, ps = stepped(FULL[0])
        o.state[ps[0]]["exp_avg"] = value
        fails_without_a_trace(o, ps, f"state 'exp_avg' of parameter 0.*{match}")


def test_foreign_and_corrupt_checkpoints() -> None:
    sgd, _ = stepped(FULL[2])
    adam, ps = stepped(FULL[0])
    norm, _ = stepped(FULL[5])
    before = [p.detach().clone() for p in ps]
    for other in (sgd, norm):
        with pytest.raises(ValueError, match="not one of Adam"):
            adam.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="not one of"):
            other.load_state_dict(adam.state_dict())
    for bad in ({}, {"state": {}}, [1], "x"):
        with pytest.raises(ValueError, match="not an optimizer's state_dict"):
            adam.load_state_dict(bad)
    corrupt = copy.deepcopy(adam.state_dict())
    corrupt["state"][0] = "gone"
    with pytest.raises(ValueError, match="corrupt"):
        adam.load_state_dict(corrupt)
    half = copy.deepcopy(adam.state_dict())
    del half["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match="not one of Adam"):
        adam.load_state_dict(half)
    fewer = fusedoptim.Adam(ps[:1]).state_dict()
    with pytest.raises(ValueError, match="group"):
        adam.load_state_dict(fewer)
    adam.step()
    assert not torch.equal(ps[0].detach(), before[0])


def test_backends() -> None:
    with pytest.raises(ValueError, match="Invalid backend: 'gpu'; choose one of 'cuda', 'triton', 'cpu', 'reference'"):
        fusedoptim.SGD(parameters([(2,)]), backend="gpu")
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot be used"):
            fusedoptim.SGD(parameters([(2,)]), backend=name)
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        fusedoptim.SGD(parameters([(2,)]), state_dtype=torch.float64)


def test_a_missing_library_is_explained_once_and_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusedoptim._native, "problem", "they were not built: no C++ compiler")
    ps, qs = parameters([(5,)]), parameters([(5,)])
    o, twin = fusedoptim.AdamW(ps), fusedoptim.AdamW(qs, backend="reference")
    for p in ps + qs:
        p.grad = torch.ones(5)
    with pytest.warns(UserWarning, match=r"cpu: they were not built: no C\+\+ compiler.*python -m fusedoptim"):
        o.step()
    o.step()  # a second warning would be an error
    twin.step()
    twin.step()
    assert_same_bits(ps[0].detach(), qs[0].detach())
    with pytest.raises(RuntimeError, match="they were not built"):
        fusedoptim.AdamW(ps, backend="cpu")
    assert _backends.choose("reference", torch.device("cpu")) == "reference"


def test_a_backend_for_another_device() -> None:
    with pytest.raises(ValueError, match=r"backend='cpu' cannot step parameters on cuda:0.*backend=None"):
        _backends.choose("cpu", torch.device("cuda:0"))


def test_params_of_wrong_types() -> None:
    with pytest.raises(TypeError):
        fusedoptim.SGD(torch.ones(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        fusedoptim.SGD([])
    with pytest.raises(TypeError):
        fusedoptim.SGD([1, 2])
    p = parameters([(2,)])
    o = fusedoptim.SGD(p)
    with pytest.raises(ValueError, match="more than one parameter group"):
        o.add_param_group({"params": p})
    fusedoptim.SGD([{"params": []}, {"params": p}]).step()  # an empty group is none


def test_gradients_without_memory() -> None:
    o, ps = stepped(FULL[0])
    ps[1].grad = torch._efficientzerotensor(6)
    fails_without_a_trace(o, ps, "parameter 1 of group 0.*gradient without memory")


def test_entries_of_others_in_the_state_are_left_alone() -> None:
    o, ps = stepped(FULL[0])
    o.state["global"] = 5
    o.state["more"] = {"x": torch.ones(2)}
    o.step()
    runners = o._runners
    o.step()
    assert o._runners is runners
    saved = o.state_dict()
    o.load_state_dict(saved)
    assert o.state["global"] == 5 and torch.equal(o.state["more"]["x"], torch.ones(2))
    o.step()
    o.state[ps[0]] = 5
    with pytest.raises(ValueError, match=r"the state of parameter 0.*must be a dict"):
        o.step()


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match="82 dimensions"):
        fusedoptim.SGD([torch.nn.Parameter(torch.ones([2, 3] + [1] * 80))])


def test_parameters_that_come_after_a_step_without_any() -> None:
    o = fusedoptim.SGD([{"params": []}], lr=0.5)
    o.step()
    p = torch.nn.Parameter(torch.ones(2))
    o.add_param_group({"params": [p]})
    p.grad = torch.ones(2)
    o.step()
    assert (p == 0.5).all()


def test_a_tensor_lr_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="1-element"):
        fusedoptim.SGD(parameters([(2,)]), lr=torch.ones(2))
    with pytest.raises(ValueError, match="float32, float64"):
        fusedoptim.SGD(parameters([(2,)]), lr=torch.tensor(1))


def test_the_reference_computes_numbers_before_it_writes() -> None:
    """1/(1 - beta**0) of the second group: torch's own error, and the first group is as it was."""
    params = parameters([(3,), (4,)])
    optimizer = fusedoptim.Adam([{"params": [p]} for p in params], backend="reference")
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["step"].fill_(-1.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"].item() == 1


def test_groups_and_parameters_must_be_lists() -> None:
    optimizer, params = stepped(FULL[0])
    optimizer.param_groups[0]["params"] = tuple(params)
    with pytest.raises(ValueError, match="'params' of parameter group 0 must be a list, but are a tuple"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = params
    optimizer.param_groups = tuple(optimizer.param_groups)
    with pytest.raises(ValueError, match="param_groups must be a list"):
        optimizer.step()
    optimizer.param_groups = list(optimizer.param_groups)
    optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_none_is_an_option_left_out(backend: str) -> None:
    params, twins = parameters([(5,)]), parameters([(5,)])
    a = fusedoptim.SGD(params, lr=0.1, maximize=None, nesterov=None, backend=backend)
    b = fusedoptim.SGD(twins, lr=0.1)
    for _ in range(2):
        set_gradients(params, 0)
        set_gradients(twins, 0)
        a.step()
        b.step()
    assert_same_bits(params[0].detach(), twins[0].detach())


@pytest.mark.parametrize("options", [{"lr": None}, {"weight_decay": None}, {"lr": 10**400}], ids=str)
def test_numbers_that_are_none_or_too_large(options: dict) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        fusedoptim.SGD(parameters([(3,)]), **options)
    optimizer, _ = stepped(FULL[2])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=r"must be (a number|finite)"):
        optimizer.step()


def test_an_interrupt_while_looking_at_gradients_is_not_swallowed() -> None:
    class Interrupting(torch.nn.Parameter):
        armed = False

        @property
        def grad(self) -> torch.Tensor | None:  # type: ignore[override]
            if Interrupting.armed:
                raise KeyboardInterrupt
            return torch.ones(3)

    p = Interrupting(torch.zeros(3))
    optimizer = fusedoptim.SGD([p], lr=1.0)
    optimizer.step()
    Interrupting.armed = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    Interrupting.armed = False
    optimizer.step()
    assert (p.detach() == -2.0).all()


def test_a_cycle_through_a_group_is_collected() -> None:
    optimizer, params = stepped(FULL[0])
    optimizer.param_groups[0]["owner"] = optimizer
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer, params
    gc.collect()
    assert gone() is None


def test_many_parameters_of_a_subclass() -> None:
    """Their sizes may be Python code, which the thread that checks addresses must not call."""

    class Sub(torch.nn.Parameter):
        pass

    params = [Sub(torch.ones(2)) for _ in range(300)]
    optimizer = fusedoptim.SGD(params, lr=0.5)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
    assert all((p.detach() == -0.5).all() for p in params)


@pytest.mark.parametrize("case", [c for c in FULL if c.cls.rule.has_step], ids=str)
def test_looking_at_parameters_changes_nothing(case: Case) -> None:
    """What was to be converted of one parameter stays as it is, where another cannot be stepped."""
    o, ps = stepped(case)
    grad = ps[0].grad = torch.ones(5, dtype=torch.complex64).conj().imag
    o.state[ps[0]]["step"] = 1
    ps[1].grad = torch.ones(6).to_sparse()
    fails_without_a_trace(o, ps, "parameter 1 of group 0 .* has a sparse gradient")
    assert ps[0].grad is grad and grad.is_neg() and o.state[ps[0]]["step"] == 1
    ps[1].grad = torch.ones(6)
    o.step()
    assert not ps[0].grad.is_neg() and o.state[ps[0]]["step"].item() == 2

"""The contract of a torch optimizer: signatures, groups, states, hooks, closures."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import (
    BY_NAME,
    FULL,
    IN_TORCH,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    parameters,
    set_gradients,
)

import fusedoptim
from benchmarks.witness import ieee_sqrt
from fusedoptim._options import StepOptions

NAMES = sorted({case.optimizer for case in IN_TORCH})
#: With the arguments that torch.optim's optimizers have beside their rules'.
AS_TORCHS = [case for case in FULL if "foreach" in inspect.signature(case.cls).parameters]
EXTRA = {"bias_correction", "eps_inside_root", "fused", "capturable", *StepOptions.__annotations__}


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs(name: str) -> None:
    mine = inspect.signature(getattr(fusedoptim, name).__init__).parameters
    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    assert [n for n in mine if n in theirs] == list(theirs)
    assert mine.keys() - theirs.keys() <= EXTRA
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for n, p in theirs.items():
        assert mine[n].default == p.default, n


def test_norm_adaptive_signature() -> None:
    parameters = inspect.signature(fusedoptim.NormAdaptive).parameters
    head = [(n, p.default) for n, p in parameters.items()][:6]
    assert head == [
        ("params", inspect.Parameter.empty),
        ("lr", 1e-2),
        ("beta", 0.9),
        ("eps", 1e-8),
        ("weight_decay", 0.0),
        ("maximize", False),
    ]


@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_groups_and_states_are_torchs(case: Case) -> None:
    mine, theirs = parameters([(3,)]), parameters([(3,)])
    a, b = case.make(mine), case.make_torch(theirs)
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    a.step()
    b.step()
    off = set(a.rule.extensions)
    assert set(a.param_groups[0]) - {key for key in case.options if key in off} == set(b.param_groups[0])
    assert list(a.state[mine[0]]) == list(b.state[theirs[0]])
    for name, value in b.state[theirs[0]].items():
        assert a.state[mine[0]][name].dtype == value.dtype and a.state[mine[0]][name].shape == value.shape
    assert set(a.defaults) - off == set(b.defaults)


BAD = {
    "Adam": [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -1.0},
        {"lr": float("nan")},
    ],
    "AdamW": [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (0.9, 1.5)},
        {"weight_decay": -0.1},
        {"betas": (float("nan"), 0.9)},
    ],
    "SGD": [
        {"lr": -1.0},
        {"momentum": -0.5},
        {"weight_decay": -1.0},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ],
    "RMSprop": [{"lr": -1.0}, {"eps": -1.0}, {"momentum": -1.0}, {"weight_decay": -1.0}, {"alpha": -0.1}],
    "Adagrad": [
        {"lr": -1.0},
        {"lr_decay": -1.0},
        {"weight_decay": -1.0},
        {"initial_accumulator_value": -1.0},
        {"eps": -1.0},
    ],
    "Adadelta": [{"lr": -1.0}, {"rho": 1.5}, {"rho": -0.1}, {"eps": -1.0}, {"weight_decay": -1.0}],
    "Adamax": [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}],
    "ASGD": [{"lr": -1.0}, {"weight_decay": -1.0}],
    "NAdam": [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -1.0},
        {"momentum_decay": -1.0},
    ],
    "RAdam": [{"lr": -1.0}, {"eps": -1.0}, {"betas": (-1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}],
    "Rprop": [{"lr": -1.0}, {"etas": (0.5, 1.0)}, {"etas": (0.0, 1.2)}, {"etas": (1.0, 1.2)}],
}


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, rows in BAD.items() for o in rows], ids=str)
def test_messages_for_invalid_values_are_torchs(name: str, options: dict) -> None:
    with pytest.raises(ValueError) as theirs:
        getattr(torch.optim, name)(parameters([(2,)]), **options)
    with pytest.raises(ValueError) as mine:
        getattr(fusedoptim, name)(parameters([(2,)]), **options)
    assert str(mine.value) == str(theirs.value)
    with pytest.raises(ValueError, match=r"Invalid|Nesterov"):  # torch does not look at a group's own values
        getattr(fusedoptim, name)([{"params": parameters([(2,)]), **options}])


@pytest.mark.parametrize("case", AS_TORCHS, ids=str)
def test_any_fused_is_accepted(case: Case) -> None:
    for fused in (None, True, False):
        case.make(parameters([(2,)]), fused=fused)


@pytest.mark.parametrize("case", AS_TORCHS, ids=str)
@pytest.mark.parametrize("option", ["foreach", "differentiable"])
def test_options_that_cannot_be(case: Case, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=True.*torch.optim"):
        case.make(parameters([(2,)]), **{option: True})


def test_hooks_closures_and_profiler_label() -> None:
    p = parameters([(5,)])
    o = fusedoptim.SGD(p, lr=0.1)
    calls = []
    o.register_step_pre_hook(lambda *a: calls.append("pre"))
    o.register_step_post_hook(lambda *a: calls.append("post"))

    def closure() -> torch.Tensor:
        o.zero_grad()
        loss = (p[0] ** 2).sum()
        loss.backward()
        calls.append("closure")
        return loss

    before = (p[0].detach() ** 2).sum()
    with torch.profiler.profile(acc_events=True) as profile:
        assert o.step(closure).item() == before.item()
    assert calls == ["pre", "closure", "post"]
    assert any(e.key == "Optimizer.step#SGD.step" for e in profile.key_averages())


def test_closure_runs_with_gradients_enabled_under_no_grad() -> None:
    p = parameters([(5,)])
    o = fusedoptim.SGD(p, lr=0.1)
    with torch.no_grad():
        o.step(lambda: (p[0] ** 2).sum().backward())
    assert p[0].grad is not None


def test_groups_with_their_own_options_and_groups_added_later() -> None:
    mine, theirs = parameters([(5,), (6,), (7,)]), parameters([(5,), (6,), (7,)])

    def build(cls: type, p: list, **more: object) -> torch.optim.Optimizer:
        return cls(
            [{"params": p[:1], "lr": 0.1, "amsgrad": True}, {"params": p[1:2], "betas": (0.5, 0.6)}],
            weight_decay=0.1,
            **more,
        )

    a, b = build(fusedoptim.AdamW, mine), build(torch.optim.AdamW, theirs, foreach=False)
    for step in range(6):
        if step == 3:
            for o, p in ((a, mine), (b, theirs)):
                o.add_param_group({"params": p[2:], "lr": 0.01, "maximize": True})
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        with ieee_sqrt():
            b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_group_added_later_has_the_defaults_and_not_what_the_first_group_was_set_to(case: Case) -> None:
    first, added = parameters([(5,)]), parameters([(6,)])
    o = case.make(first)
    of_torch = case.make_torch(parameters([(5,)])) if case.in_torch else None
    defaults = dict(o.defaults)
    for optimizer in filter(None, (o, of_torch)):
        optimizer.param_groups[0].update(lr=0.7, weight_decay=0.6)
        optimizer.add_param_group({"params": added})
    new = o.param_groups[1]
    assert new["lr"] == defaults["lr"] != 0.7 and new.get("weight_decay") == defaults.get("weight_decay") != 0.6
    if of_torch:
        assert all(new[key] == of_torch.param_groups[1][key] for key in defaults.keys() & of_torch.defaults.keys())
    alone = parameters([(6,)])
    same = case.make(alone)
    for step in range(2):
        set_gradients(first + added, step)
        alone[0].grad = added[0].grad.clone()
        o.step()
        same.step()
    assert_same_bits(added[0].detach(), alone[0].detach())


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    o = fusedoptim.AdamW(model.named_parameters())
    assert o.param_groups[0]["param_names"] == ["weight", "bias"]
    model.weight.grad = torch.ones(2, 3)
    model.bias.grad = torch.ones(2, dtype=torch.float32)
    model.bias.data = torch.zeros(3)
    with pytest.raises(ValueError, match="parameter 1 'bias' of group 0"):
        o.step()


def test_options_switched_on_in_mid_training() -> None:
    p = parameters([(5,)])
    o = fusedoptim.RMSprop(p)
    for step in range(4):
        if step == 2:
            o.param_groups[0].update(momentum=0.9, centered=True)
        set_gradients(p, step)
        o.step()
    assert {"momentum_buffer", "grad_avg"} <= set(o.state[p[0]])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_state_dtype(case: Case, state_dtype: torch.dtype) -> None:
    p = parameters([(5,)], torch.float16)
    o = case.make(p, state_dtype=state_dtype, **case.as_it_is)
    set_gradients(p, 0)
    o.step()
    for name, s in o.state[p[0]].items():
        assert s.dtype == (torch.float32 if name in ("step", *o.rule.number_names) else state_dtype)


def test_autograd_notices_that_parameters_changed() -> None:
    p = parameters([(5,)])
    o = fusedoptim.SGD(p, lr=0.1)
    loss = (p[0] ** 2).sum()
    p[0].grad = torch.ones(5)
    o.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_without_gradient_are_left_alone(case: Case) -> None:
    p = parameters([(5,), (6,)])
    before = p[1].detach().clone()
    o = case.make(p)
    p[0].grad = torch.ones(5)
    o.step()
    assert_same_bits(p[1].detach(), before)
    assert not o.state.get(p[1]) or case.optimizer == "Adagrad"


@pytest.mark.parametrize("case", FULL, ids=str)
def test_zero_gradients_and_zero_lr_change_nothing(case: Case) -> None:
    """Distributed checkpointing makes states by such a step."""
    p = parameters([(5,), (0,)])
    still = {key: 0.0 for key in ("lr", "weight_decay") if key in case.make(p).defaults}
    o = case.make(p, **still, **case.as_it_is)
    before = p[0].detach().clone()
    for q in p:
        q.grad = torch.zeros_like(q)
    o.step(closure=None)
    assert_same_bits(p[0].detach(), before)
    for s in o.state[p[0]].values():
        assert torch.isfinite(s).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_empty_states_are_left(backend: str) -> None:
    params = parameters([(3,), (4,)])
    optimizer = fusedoptim.SGD(params, backend=backend)
    for _ in range(2):
        set_gradients(params[:1], 0)
        optimizer.step()
    assert optimizer.state_dict()["state"] == torch.optim.SGD(params).state_dict()["state"] == {}


def test_zero_grad_and_repr() -> None:
    p = parameters([(5,)])
    o = BY_NAME["adamw"].make(p)
    set_gradients(p, 0)
    o.zero_grad()
    assert p[0].grad is None
    assert "AdamW" in repr(o) and "weight_decay: 0.01" in repr(o)

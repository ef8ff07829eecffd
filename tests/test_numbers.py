"""The numbers of a group: what a constructor says of them, and the reference's against the compiled kernels."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import FULL, Case, assert_same_bits, parameters, set_gradients
from number_tests import *  # noqa: F403
from number_tests import KINDS, beyond, hypers

import fusedoptim
from fusedoptim import _selfcheck
from fusedoptim._rule import Hyper
from fusedoptim._values import number


class Reference:
    backend, slow = "reference", False

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        raise NotImplementedError


@pytest.fixture
def kernels() -> Reference:
    return Reference()


class Integer:
    """Of a library that Python knows nothing about."""

    def __index__(self) -> int:
        return 3


def test_what_is_a_number() -> None:
    for value in (3, 3.0, np.float32(3), np.int64(3), Decimal(3), Fraction(3), torch.tensor(3.0), Integer()):
        assert type(number(value)) is float and number(value) == 3.0
    assert number(True) == number(np.bool_(True)) == number(torch.tensor([[1.0]], requires_grad=True)) == 1.0
    assert number(Decimal("1e-400")) == 0.0 and math.isnan(number(Decimal("nan")))
    for value in ("3", b"3", None, 3j, [3.0], torch.ones(2)):
        with pytest.raises((TypeError, RuntimeError)):
            number(value)


@pytest.mark.parametrize(("case", "hyper"), hypers())
def test_constructors_and_groups_refuse_what_steps_do(case: Case, hyper: Hyper) -> None:
    cls = case.cls
    if hyper.key == "decoupled_weight_decay" and cls is fusedoptim.AdamW:
        pytest.skip("AdamW has no such argument")
    label = hyper.label or hyper.key
    for value in (*beyond(hyper), "0.5", torch.ones(2), torch.tensor(1), 1j, [0.5]):
        of_key = [0.5] * hyper.count
        of_key[hyper.index] = value
        given = value if hyper.index < 0 else tuple(of_key)
        match = "Tensor lr must be" if hyper.key == "lr" and torch.is_tensor(value) and value.sum() in (1, 2) else label
        with pytest.raises(ValueError, match=f"{match}"):
            cls(parameters([(3,)]), **{hyper.key: given})
        optimizer = cls(parameters([(3,)]))
        with pytest.raises(ValueError, match=f"{match}"):
            optimizer.add_param_group({"params": parameters([(2,)]), hyper.key: given})
        assert len(optimizer.param_groups) == 1


def test_a_constructor_says_what_a_number_must_be() -> None:
    for options, message in [
        ({"lr": math.inf}, r"^Invalid learning rate: inf \(it must be finite, and at most 1e\+18 in size\)$"),
        ({"lr": Decimal("nan")}, "^Invalid learning rate: NaN$"),
        ({"lr": 10**5000}, r"^Invalid learning rate: 0x\w{38}\.\.\. \(it must be finite"),
        ({"lr": "0.1"}, r"^Invalid learning rate: '0\.1' \(it must be a number\)$"),
        ({"weight_decay": 1e39}, r"^Invalid weight_decay value: 1e\+39 \(it must be finite"),
        ({"betas": (0.9,)}, r"^Invalid betas: \(0\.9,\) \(it must be two numbers\)$"),
        ({"betas": 0.9}, r"^Invalid betas: 0\.9 \(it must be two numbers\)$"),
        ({"betas": (0.9, 0.99, 0.999)}, r"^Invalid betas: \(0\.9, 0\.99, 0\.999\) \(it must be two numbers\)$"),
        ({"betas": (Decimal(1), 0.9)}, "^Invalid beta parameter at index 0: 1$"),
        ({"amsgrad": "yes"}, r"^Invalid amsgrad: 'yes' \(it must be a number\)$"),
        ({"max_grad_norm": Decimal(0)}, r"^Invalid max_grad_norm: 0 \(it must be above 0; None is off\)$"),
        (
            {"lr": torch.tensor(0.1, device="meta")},
            r"^Invalid learning rate: a tensor of shape \(\) .* on meta \(it must",
        ),
        ({"eps": torch.tensor(0.1, device="meta")}, "^Invalid epsilon value: a tensor .* on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            fusedoptim.Adam(parameters([(3,)]), **options)
    with pytest.raises(ValueError, match=r"^Invalid initial_accumulator_value value: inf \(it must be"):
        fusedoptim.Adagrad(parameters([(3,)]), initial_accumulator_value=math.inf)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_group_with_three_betas(backend: str) -> None:
    params = parameters([(3,)])
    optimizer = fusedoptim.Adam(params, backend=backend)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99, 0.999)
    with pytest.raises(
        ValueError, match=r"parameter group 0: 'betas' is \(0.9, 0.99, 0.999\), but must be two numbers"
    ):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pairs_of_any_kind(backend: str) -> None:
    results = []
    for betas in ((0.5, 0.75), [0.5, 0.75], np.array([0.5, 0.75]), torch.tensor([0.5, 0.75])):
        params = parameters([(33,)])
        optimizer = fusedoptim.Adam(params, betas=betas, backend=backend)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append(params[0].detach())
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_follow_the_number_not_the_object(backend: str) -> None:
    """A Decimal too small for a double is no momentum, in no backend."""
    for cls in (fusedoptim.SGD, fusedoptim.RMSprop):
        params = parameters([(3,)])
        optimizer = cls(params, momentum=Decimal("1e-400"), backend=backend)
        set_gradients(params, 0)
        optimizer.step()
        assert "momentum_buffer" not in optimizer.state[params[0]]
    adagrad = fusedoptim.Adagrad(params, initial_accumulator_value=Decimal("0.5"), backend=backend)
    assert (adagrad.state[params[0]]["sum"] == 0.5).all()
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        fusedoptim.SGD(params, momentum=Decimal("1e-400"), nesterov=True)


@pytest.mark.parametrize("kind", ["float32", "Decimal", "Fraction", "fp32 tensor"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_limits_of_clipping_outside_of_a_step(backend: str, kind: str) -> None:
    for limit in (0.25, 1e-50, 1e39):
        grads = []
        for value in (KINDS[kind](limit), float(KINDS[kind](limit))):
            params = parameters([(33,), (4,)])
            set_gradients(params, 0)
            norm = fusedoptim.clip_grad_norm_(params, value, backend=backend)
            fusedoptim.clip_grad_value_(params, value, backend=backend)
            grads.append([norm, *(p.grad for p in params)])
        for a, b in zip(*grads, strict=True):
            assert_same_bits(a, b)
    for call in (fusedoptim.clip_grad_norm_, fusedoptim.clip_grad_value_):
        with pytest.raises(TypeError):
            call(params, "0.25", backend=backend)


@pytest.mark.parametrize("lr", [np.float32(0.1), Decimal("0.1"), Fraction(1, 10)], ids=repr)
def test_a_schedule_of_any_number(lr: Any) -> None:
    rates = []
    for value in (lr, float(lr)):
        optimizer = fusedoptim.SGD(parameters([(3,)]), lr=value)
        schedule = fusedoptim.warmup_cosine(optimizer, 2, 7, min_lr=type(value)(0))
        rates.append([])
        for _ in range(8):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1] and all(type(x) is float for x in rates[0])


def test_layerwise_rates_of_any_number() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    rates = [
        [group["lr"] for group in fusedoptim.layerwise_groups(model, kind(0.1), kind(0.5))]
        for kind in (float, KINDS["Decimal"], KINDS["Fraction"])
    ]
    assert rates[0] == rates[1] == rates[2] and len(rates[0]) == 3


@pytest.mark.parametrize("case", FULL, ids=str)
def test_numbers_of_a_group_stay_the_users_objects(case: Case) -> None:
    lr = np.float32(0.1)
    params = parameters([(3,)])
    optimizer = case.make(params, lr=lr)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr and optimizer.state_dict()["param_groups"][0]["lr"] is lr


def test_the_self_check_under_a_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selfcheck, "SIZES", (5,))
    with torch.device("meta"):
        assert _selfcheck.differing("cpu", "cpu") == []

"""Learning-rate schedules: the package's own, and every one of torch's, over every optimizer."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_optimizers, parameters, set_gradients
from torch.optim import lr_scheduler

import fusedoptim
from benchmarks.witness import ieee_sqrt
from fusedoptim import warmup_cosine

STEPS = 9
Optimizer = torch.optim.Optimizer


def _cycles_momentum(o: Optimizer) -> bool:
    """torch cycles a group's momentum or its first beta, and refuses optimizers that have neither."""
    return "momentum" in o.defaults or "betas" in o.defaults


#: Settings under which each changes the learning rate, and in more than one way, within STEPS steps.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 6], 0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9 - 0.01 * e),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.9, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=_cycles_momentum(o)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3, cycle_momentum=_cycles_momentum(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 5)], [4]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=4),
    "warmup_cosine": lambda o: warmup_cosine(o, 3, 8, 1e-4),
    "warmup_cosine from 0": lambda o: warmup_cosine(o, 3, 8, start_lr=0.0),
}


def test_none_of_torchs_schedulers_is_left_out() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]


def advance(schedule: Any, step: int) -> None:
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        schedule.step([3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0][step])  # a loss with two plateaus
    else:
        schedule.step()


def scheduled(o: Optimizer) -> list[tuple[Any, ...]]:
    """What schedules write into groups."""
    return [tuple(g.get(key) for key in ("lr", "momentum", "betas")) for g in o.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_same_as_torch_under_the_same_schedule(case: Case, name: str) -> None:
    shapes = [(5,), (3, 4)]
    mine, theirs = parameters(shapes), parameters(shapes)
    a = case.make(groups(mine))
    b = (
        case.make_torch(groups(theirs), foreach=False)
        if case.in_torch
        else case.make(groups(theirs), backend="reference")
    )
    sa, sb = SCHEDULERS[name](a), SCHEDULERS[name](b)
    seen = []
    for step in range(STEPS):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        seen.append(scheduled(a))
        assert seen[-1] == scheduled(b)
        a.step()
        with ieee_sqrt():
            b.step()
        advance(sa, step)
        advance(sb, step)
    assert_same_optimizers(a, b)
    assert len({s[0][0] for s in seen}) > 1 and len({s[1][0] for s in seen}) > 1
    if name in ("OneCycleLR", "CyclicLR") and _cycles_momentum(a):
        assert len({s[0][1:] for s in seen}) > 1


# ---- warmup_cosine ----


def rates(o: Optimizer, schedule: lr_scheduler.LambdaLR, steps: int) -> list[list[float]]:
    """The learning rates of ``steps`` steps, per group."""
    seen = []
    for _ in range(steps):
        seen.append([float(g["lr"]) for g in o.param_groups])
        o.step()
        schedule.step()
    return [list(of_group) for of_group in zip(*seen, strict=True)]


def test_warmup_cosine_is_its_formula() -> None:
    warmup, total, low = 4, 12, 1e-3
    o = fusedoptim.AdamW(groups(parameters([(5,), (6,)])), lr=0.5)
    for own, of_group in zip((0.5, 0.02), rates(o, warmup_cosine(o, warmup, total, low), 20), strict=True):
        for t, lr in enumerate(of_group):
            if t < warmup:
                expected = own * (t + 1) / (warmup + 1)
            else:
                turn = math.pi * min(1.0, (t - warmup) / (total - warmup))
                expected = low + (own - low) * (1 + math.cos(turn)) / 2
            assert lr == pytest.approx(expected, rel=1e-14)
        assert of_group[warmup] == max(of_group) == pytest.approx(own, rel=1e-15)
        assert of_group[:warmup] == sorted(of_group[:warmup])
        assert of_group[warmup:] == sorted(of_group[warmup:], reverse=True)


@pytest.mark.parametrize("start", [0.0, 1e-3, 0.02])
def test_warmup_cosine_starts_at_start_lr(start: float) -> None:
    warmup, total = 4, 12
    o = fusedoptim.AdamW(groups(parameters([(5,), (6,)])), lr=0.5)
    usual = fusedoptim.AdamW(groups(parameters([(5,), (6,)])), lr=0.5)
    found = rates(o, warmup_cosine(o, warmup, total, 1e-3, start_lr=start), 20)
    without = rates(usual, warmup_cosine(usual, warmup, total, 1e-3), 20)
    for own, of_group, of_usual in zip((0.5, 0.02), found, without, strict=True):
        for t in range(warmup):
            expected = (
                own * (t / warmup) if start == 0 else pytest.approx(start + (own - start) * t / warmup, rel=1e-14)
            )
            assert of_group[t] == expected
        assert of_group[warmup:] == of_usual[warmup:]
        assert of_usual[:warmup] == [own * ((t + 1) / (warmup + 1)) for t in range(warmup)]


def test_warmup_cosine_without_warmup_or_minimum() -> None:
    for start in (None, 0.0, 0.1):
        o = fusedoptim.SGD(parameters([(5,)]), lr=0.1)
        (of_group,) = rates(o, warmup_cosine(o, 0, 2, start_lr=start), 4)
        assert of_group == [0.1, pytest.approx(0.05), 0.0, 0.0]


def by_lambda(o: Optimizer, rise: Callable[[int], float], warmup: int, total: int) -> lr_scheduler.LambdaLR:
    def factor(t: int) -> float:
        return rise(t) if t < warmup else (1 + math.cos(math.pi * min(1.0, (t - warmup) / (total - warmup)))) / 2

    return lr_scheduler.LambdaLR(o, factor)


def in_sequence(o: Optimizer, rise: Callable[[int], float], warmup: int, total: int) -> lr_scheduler.SequentialLR:
    cosine = lr_scheduler.CosineAnnealingLR(o, total - warmup)
    return lr_scheduler.SequentialLR(o, [lr_scheduler.LambdaLR(o, rise), cosine], [warmup])


@pytest.mark.parametrize("theirs", [by_lambda, in_sequence])
@pytest.mark.parametrize("start", [None, 0.0])
def test_warmup_cosine_is_what_torchs_schedules_make_together(start: float | None, theirs: Any) -> None:
    """``lr * t / warmup``, or one part above, then a cosine. SequentialLR's goes from one rate to the next, which adds
    their roundings."""
    warmup, total = 4, 12
    rise = (lambda t: t / warmup) if start == 0 else (lambda t: (t + 1) / (warmup + 1))
    found = []
    for schedule in (
        lambda o: warmup_cosine(o, warmup, total, start_lr=start),
        lambda o: theirs(o, rise, warmup, total),
    ):
        o = fusedoptim.AdamW(groups(parameters([(5,), (6,)])), lr=0.5)
        found.append(rates(o, schedule(o), total + 1))
    for mine, others in zip(*found, strict=True):
        assert mine == pytest.approx(others, rel=1e-13, abs=1e-15)
    assert found[0][0][0] == (0.0 if start == 0 else 0.1)


@pytest.mark.parametrize("start", [None, 0.0])
def test_the_guides_table_of_rates(start: float | None) -> None:
    guide = (Path(__file__).parent.parent / "fusedoptim" / "guides" / "schedules.md").read_text()
    call = re.search(r"AdamW\(.*lr=(\S+)\)\nschedule = warmup_cosine\(optimizer, (.*)\)", guide)
    steps = re.search(r"^\| step \| (.*) \|$", guide, re.M)
    row = re.search(rf"^\| `start_lr={start}` \| (.*) \|$", guide, re.M)
    assert call and steps and row
    o = fusedoptim.AdamW(parameters([(5,)]), lr=float(call[1]))
    options = {
        name: float(value) if "lr" in name else int(value) for name, value in re.findall(r"(\w+)=([^,]+)", call[2])
    }
    (found,) = rates(o, warmup_cosine(o, **options, start_lr=start), 150)
    chosen = [int(step.split()[0]) for step in steps[1].split(" | ")]
    assert row[1].split(" | ") == [f"{found[t]:.3g}" for t in chosen]
    assert set(found[chosen[-1] :]) == {found[chosen[-1]]}


def test_warmup_cosine_takes_a_tensor_lr_and_one_of_zero() -> None:
    p = parameters([(5,), (6,)])
    o = fusedoptim.SGD([{"params": p[:1], "lr": torch.tensor(0.5)}, {"params": p[1:], "lr": 0.0}])
    tensor = o.param_groups[0]["lr"]
    first, second = rates(o, warmup_cosine(o, 1, 3), 4)
    assert first == [0.25, 0.5, 0.25, 0.0] and second == [0.0] * 4
    assert o.param_groups[0]["lr"] is tensor


@pytest.mark.parametrize("cut", [2, 4, 7])
def test_warmup_cosine_resumes(cut: int) -> None:
    """From a file that holds plain values, before, at and after the end of the warm-up, with the same bits."""

    def make() -> tuple[list[torch.nn.Parameter], fusedoptim.AdamW, lr_scheduler.LambdaLR]:
        params = parameters([(5,), (6,)])
        o = fusedoptim.AdamW(groups(params), lr=0.5)
        return params, o, warmup_cosine(o, 4, 9, 1e-3)

    straight, a, sa = make()
    expected = []
    for step in range(12):
        if step == cut:
            file = io.BytesIO()
            values = [p.detach().clone() for p in straight]
            torch.save((a.state_dict(), sa.state_dict(), values), file)
        expected.append(scheduled(a))
        set_gradients(straight, step)
        a.step()
        sa.step()
    file.seek(0)
    of_optimizer, of_schedule, values = torch.load(file, weights_only=True)
    resumed, b, sb = make()
    b.load_state_dict(of_optimizer)
    sb.load_state_dict(of_schedule)
    for p, value in zip(resumed, values, strict=True):
        p.data.copy_(value)
    for step in range(cut, 12):
        assert scheduled(b) == expected[step]
        set_gradients(resumed, step)
        b.step()
        sb.step()
    assert_same_optimizers(a, b)


def test_a_state_dict_without_start_lr_leaves_it_as_it_is() -> None:
    """As those saved before there was one. A whole schedule pickled then starts as it did."""
    for start in (None, 0.0):
        o = fusedoptim.SGD(parameters([(5,)]), lr=0.5)
        schedule = warmup_cosine(o, 4, 9, 0.1, start_lr=start)
        content = schedule.state_dict()
        del content["lr_lambdas"][0]["start"]
        schedule.load_state_dict(content)
        assert schedule.lr_lambdas[0](0) == (0.2 if start is None else 0.0)
        factor = schedule.lr_lambdas[0]
        del factor.start
        assert pickle.loads(pickle.dumps(factor))(0) == 0.2


def test_start_lr_resumes_with_the_state_dict() -> None:
    o = fusedoptim.SGD(parameters([(5,)]), lr=0.5)
    content = warmup_cosine(o, 4, 9, start_lr=0.0).state_dict()
    schedule = warmup_cosine(o, 4, 9)
    schedule.load_state_dict(content)
    assert [schedule.lr_lambdas[0](t) for t in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_warmup_cosine_made_after_a_checkpoint_was_loaded() -> None:
    """Then the groups' lr is that of the interrupted step; their own is in ``initial_lr``."""
    a = fusedoptim.SGD(parameters([(5,)]), lr=0.5)
    rates(a, warmup_cosine(a, 4, 9, 0.1), 2)
    b = fusedoptim.SGD(parameters([(5,)]), lr=0.5)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == pytest.approx(0.3)
    assert rates(b, warmup_cosine(b, 4, 9, 0.1), 10)[0][4::5] == [0.5, pytest.approx(0.1)]


def test_warmup_cosine_can_be_pickled() -> None:
    o = fusedoptim.SGD(parameters([(5,)]), lr=0.5)
    copy = pickle.loads(pickle.dumps(warmup_cosine(o, 2, 5)))
    assert [copy.lr_lambdas[0](t) for t in range(6)] == [warmup_cosine(o, 2, 5).lr_lambdas[0](t) for t in range(6)]


def test_warmup_cosine_for_torchs_optimizers() -> None:
    o = torch.optim.SGD(parameters([(5,)]), lr=0.5)
    assert rates(o, warmup_cosine(o, 1, 3), 4) == [[0.25, 0.5, 0.25, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 10), ValueError, "warmup_steps must be at least 0, but is -1"),
        ((10, 10), ValueError, "total_steps must be more than warmup_steps, but they are 10 and 10"),
        ((1.5, 10), TypeError, "warmup_steps must be an integer, but is 1.5"),
        ((1, "10"), TypeError, "total_steps must be an integer, but is '10'"),
        ((1, 10, -1e-3), ValueError, "min_lr must be at least 0 and finite, but is -0.001"),
        ((1, 10, math.nan), ValueError, "min_lr must be at least 0 and finite, but is nan"),
        ((1, 10, math.inf), ValueError, "min_lr must be at least 0 and finite, but is inf"),
        ((1, 10, 0.03), ValueError, r"parameter group 1 is 0.02, below min_lr=0.03.*choose a smaller min_lr"),
        ((1, 10, 0.0, -1e-3), ValueError, "start_lr must be at least 0 and finite, but is -0.001"),
        ((1, 10, 0.0, math.nan), ValueError, "start_lr must be at least 0 and finite, but is nan"),
        ((1, 10, 0.0, 0.03), ValueError, r"parameter group 1 is 0.02, below start_lr=0.03.*choose a smaller start_lr"),
    ],
    ids=str,
)
def test_errors_of_warmup_cosine(arguments: tuple, error: type[Exception], message: str) -> None:
    o = fusedoptim.SGD(groups(parameters([(5,), (6,)])), lr=0.5)
    with pytest.raises(error, match=message):
        warmup_cosine(o, *arguments)
    assert "initial_lr" not in o.param_groups[0]


def test_warmup_cosine_of_something_else() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, but is a Linear"):
        warmup_cosine(torch.nn.Linear(2, 2), 1, 10)

"""Who calls, replaces or looks at a step: subclasses, wrappers, schedulers, GradScaler. All as with torch's AdamW."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
from cases import parameters
from hooked import Class, both, count, make

import fusedoptim


def as_if_alone(monkeypatch: pytest.MonkeyPatch, cls: Class) -> None:
    """As in a process that never made an AdamW itself, only a subclass. Once one was made, torch also calls the hooks
    of the step that a subclass's own step calls: twice in all. fusedoptim does not."""
    for owner in cls.__mro__:
        step = vars(owner).get("step")
        if owner.__module__.startswith("torch.") and hasattr(step, "hooked"):
            monkeypatch.setattr(owner, "step", step.__wrapped__)


@both
def test_a_subclass_with_a_step_of_its_own_calls_hooks_once(cls: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_alone(monkeypatch, cls)

    class Mine(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None, more: int = 0) -> Any:
            calls.append(f"before {more}")
            result = super().step(closure)
            calls.append("after")
            return result

    _, o = make(Mine)
    calls = count(o)
    o.step(more=1)
    assert calls == ["pre", "before 1", "after", "post"]
    with torch.profiler.profile(acc_events=True) as profile:
        o.step(lambda: 3.0)
    assert calls[4:] == ["pre", "before 0", "after", "post"]
    assert [e.name for e in profile.events() if e.name.startswith("Optimizer.step#")] == ["Optimizer.step#Mine.step"]


@both
def test_another_method_that_steps_calls_hooks_as_well(cls: Class) -> None:
    """As optimizers of two phases do, which step in a method of another name."""

    class Mine(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:
            calls.append("waits")

        def flush(self) -> None:
            super().step()

    make(cls)  # torch wraps the step of a class when the first of it is made
    _, o = make(Mine)
    calls = count(o)
    o.step()
    o.flush()
    assert calls == ["pre", "waits", "post", "pre", "post"]


def test_a_step_that_steps_twice_calls_hooks_once() -> None:
    class Mine(fusedoptim.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return super().step()

    _, o = make(Mine)
    calls = count(o)
    o.step()
    assert calls == ["pre", "post"]
    o.register_step_pre_hook(lambda *_: 1 / 0)  # one that raises leaves nothing behind
    with pytest.raises(ZeroDivisionError):
        o.step()
    with pytest.raises(ZeroDivisionError):
        o.step()


@both
def test_a_subclass_without_one(cls: Class) -> None:
    class Mine(cls):  # type: ignore[misc, valid-type]
        pass

    _, o = make(Mine)
    calls = count(o)
    o.step()
    assert calls == ["pre", "post"]


@both
@pytest.mark.parametrize("of", ["the class", "the optimizer"])
def test_a_step_that_somebody_replaced_by_one_around_it(cls: Class, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate, Lightning and schedulers do."""
    _, o = make(cls)
    calls, plain = count(o), cls.step if of == "the class" else o.step

    @functools.wraps(plain)
    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append("around")
        return plain(*args, **kwargs)

    monkeypatch.setattr(cls if of == "the class" else o, "step", around)
    for optimizer in (o, cls(parameters([(5,)]))):
        optimizer.step()
    assert calls == ["around", "pre", "post"] + (["around"] if of == "the class" else [])


@both
def test_torchs_wrapper_used_by_hand(cls: Class) -> None:
    _, o = make(cls)
    calls = count(o)
    assert cls.profile_hook_step(lambda self: calls.append("another"))(o) is None
    assert calls == ["pre", "another", "post"]
    assert cls.step.hooked  # type: ignore[attr-defined]


@both
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
def test_what_schedulers_warn_of(cls: Class, hooks: bool) -> None:
    def warned(*order: str) -> list[str]:
        _, o = make(cls)
        if hooks:
            count(o)
        schedule = torch.optim.lr_scheduler.StepLR(o, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in order:
                (o if name == "optimizer" else schedule).step()
        return [str(w.message).split(". ")[0] for w in caught]

    assert warned("optimizer", "schedule", "schedule") == []
    assert warned("schedule") == ["Detected call of `lr_scheduler.step()` before `optimizer.step()`"]


@both
def test_what_a_grad_scaler_looks_at(cls: Class) -> None:
    """It reads the step's signature, and does not call a step whose gradients are not finite."""
    params, o = make(cls)
    assert "grad_scaler" not in inspect.signature(o.step).parameters
    calls = count(o)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 2.0):
        for p in params:
            p.grad = torch.full_like(p, value)
        scaler.scale(torch.ones(()))
        scaler.step(o)
        scaler.update()
    assert calls == ["pre", "post"] * 2
    assert {s["step"].item() for s in o.state.values()} == {2}

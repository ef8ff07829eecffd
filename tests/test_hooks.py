"""Hooks of a step, ranges for profilers and what else looks at a step: all of it as around torch's own AdamW."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import parameters, set_gradients
from torch.autograd import profiler, profiler_legacy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedoptim

Class = type[torch.optim.Optimizer]
RANGE = "Optimizer.step#AdamW.step"
both = pytest.mark.parametrize("cls", [torch.optim.AdamW, fusedoptim.AdamW], ids=["torch", "fusedoptim"])


def make(cls: Class, steps: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = parameters([(5,), (2, 3)])
    optimizer = cls(params)
    set_gradients(params, 0)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def count(optimizer: torch.optim.Optimizer) -> list[str]:
    """A list that grows with every call of a hook before or after the step."""
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    return calls


@pytest.fixture
def everywhere() -> Iterator[list[Any]]:
    """Handles to be removed."""
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@both
@pytest.mark.parametrize("steps", [0, 2], ids=["at once", "later"])
def test_order_and_removal(cls: Class, steps: int, everywhere: list[Any]) -> None:
    _, o = make(cls, steps)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            assert optimizer is o and args == (o, closure) and kwargs == {}
            calls.append(name)

        return hook

    def closure() -> float:
        calls.append("closure")
        return 3.0

    everywhere += [register_optimizer_step_pre_hook(note("global pre"))]
    own = [o.register_step_post_hook(note("post")), o.register_step_pre_hook(note("pre 1"))]
    own += [o.register_step_pre_hook(note("pre 2"))]
    everywhere += [register_optimizer_step_post_hook(note("global post"))]
    assert o.step(closure) == 3.0
    assert calls == ["global pre", "pre 1", "pre 2", "closure", "post", "global post"]
    for handle in own:
        handle.remove()
    calls.clear()
    o.step(closure)
    assert calls == ["global pre", "closure", "global post"]
    while everywhere:
        everywhere.pop().remove()
    calls.clear()
    o.step(closure)
    assert calls == ["closure"]


@both
@pytest.mark.parametrize("which", ["own pre", "own post", "global pre", "global post"])
def test_each_kind_alone_is_called_with_what_the_step_was(cls: Class, which: str, everywhere: list[Any]) -> None:
    _, o = make(cls)
    seen: list[Any] = []
    register = {
        "own pre": o.register_step_pre_hook,
        "own post": o.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[which]
    everywhere.append(register(lambda optimizer, args, kwargs: seen.append((args, kwargs))))
    o.step()
    o.step(None)
    o.step(closure=None)
    assert seen == [((o,), {}), ((o, None), {}), ((o,), {"closure": None})]


@both
def test_a_pre_hook_changes_the_arguments(cls: Class) -> None:
    _, o = make(cls)
    seen: list[Any] = []
    o.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer,), {"closure": lambda: 1.0}))
    o.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(kwargs["closure"]()))
    o.register_step_pre_hook(lambda optimizer, args, kwargs: (args, {"closure": lambda: 2.0}))
    o.register_step_post_hook(lambda optimizer, args, kwargs: seen.append((len(args), kwargs["closure"]())))
    assert o.step("not even a closure") == 2.0
    assert seen == [1.0, (1, 2.0)]


@both
@pytest.mark.parametrize("result", [3, (1, 2, 3)], ids=str)
def test_a_pre_hook_that_returns_something_else(cls: Class, result: object) -> None:
    params, o = make(cls)
    before = [p.detach().clone() for p in params]
    o.register_step_pre_hook(lambda *_: result)
    with pytest.raises(
        RuntimeError, match=r"step at .* must return None or a tuple of \(new_args, new_kwargs\), but got"
    ):
        o.step()
    assert all(map(torch.equal, before, params)) and not o.state


@both
def test_hooks_that_raise(cls: Class) -> None:
    params, o = make(cls)
    before = [p.detach().clone() for p in params]

    def fail(*_: object) -> None:
        raise KeyError("of a hook")

    handle = o.register_step_pre_hook(fail)
    with pytest.raises(KeyError, match="of a hook"):
        o.step()
    assert all(map(torch.equal, before, params)) and not o.state
    handle.remove()
    handle = o.register_step_post_hook(fail)
    with pytest.raises(KeyError, match="of a hook"):
        o.step()
    assert [o.state[p]["step"].item() for p in params] == [1, 1]
    handle.remove()
    o.step()
    assert [o.state[p]["step"].item() for p in params] == [2, 2]


@both
def test_arguments_that_a_step_does_not_take(cls: Class) -> None:
    _, o = make(cls)
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3 were given"):
        o.step(None, None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        o.step(scale=1)  # type: ignore[call-arg]


# ---- who surrounds a step ----


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
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_have_hooks_of_their_own(cls: Class, how: Callable[[Any], Any]) -> None:
    _, o = make(cls, 1)
    calls: list[str] = []
    o.register_step_pre_hook(lambda *_: calls.append("original"))
    other = how(o)
    other.register_step_post_hook(lambda *_: calls.append("copy"))
    other.step()
    assert calls == ["copy"]
    o.step()
    assert calls == ["copy", "original"]


@pytest.mark.parametrize("own", [False, True], ids=["AdamW", "a step of its own"])
def test_hooks_of_a_compiled_step(own: bool) -> None:
    class Mine(fusedoptim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    _, o = make(Mine if own else fusedoptim.AdamW)
    step = torch.compile(o.step, fullgraph=True, backend="eager")
    step()
    calls = count(o)
    step()
    step()
    assert calls == ["pre", "post"] * 2
    assert {s["step"].item() for s in o.state.values()} == {3}


# ---- profilers ----


@both
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
@pytest.mark.parametrize("which", ["torch.profiler", "autograd.profiler", "legacy", "emit_itt"])
def test_the_range_around_a_step(cls: Class, which: str, hooks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It surrounds the hooks, too. The profiler sees the parameters through a function that is called in it."""
    _, o = make(cls, 1)
    opened: list[str] = []
    known = {"calls": 0}

    class Recorded(profiler.record_function):
        def __enter__(self) -> Any:
            opened.append(self.name)
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            opened.append(f"end of {self.name}")
            super().__exit__(*error)

    monkeypatch.setattr(profiler, "record_function", Recorded)
    monkeypatch.setattr(cls, "_optimizer_step_code", lambda self: known.update(calls=known["calls"] + 1))
    if hooks:
        o.register_step_pre_hook(lambda *_: opened.append("pre"))
        o.register_step_post_hook(lambda *_: opened.append("post"))
    start: Callable[..., Any] = {
        "torch.profiler": functools.partial(torch.profiler.profile, acc_events=True),
        "autograd.profiler": profiler.profile,
        "legacy": profiler_legacy.profile,
        "emit_itt": profiler.emit_itt,
    }[which]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            profile = start()
            profile.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    o.step()
    profile.__exit__(None, None, None)
    inner = [name for name in opened if "fusedoptim." not in name]
    assert inner == [RANGE, *(["pre", "post"] if hooks else []), f"end of {RANGE}"]
    assert known["calls"] == 1
    if which == "torch.profiler":
        assert [e.name for e in profile.events()].count(RANGE) == 1


@both
def test_a_step_in_a_thread_that_did_not_start_the_profiler(cls: Class) -> None:
    _, o = make(cls, 1)
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(acc_events=True, experimental_config=config) as profile:
        thread = threading.Thread(target=o.step)
        thread.start()
        thread.join()
    assert [e.name for e in profile.events()].count(RANGE) == 1


@both
def test_a_range_ends_with_an_error(cls: Class) -> None:
    _, o = make(cls, 1)
    with torch.profiler.profile(acc_events=True) as profile:
        o.step()
        with pytest.raises(ZeroDivisionError):
            o.step(lambda: 1 / 0)
        torch.ones(3).add(1)
    steps = [e for e in profile.events() if e.name == RANGE]
    (add,) = (e for e in profile.events() if e.name == "aten::add")
    assert len(steps) == 2 and all(e.time_range.end <= add.time_range.start for e in steps)


# ---- schedulers, GradScaler ----


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
    assert list(inspect.signature(o.step).parameters) == ["closure"]
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

"""Hooks of a step: as around torch's own AdamW."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hooked import Class, both, count, make
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedoptim


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

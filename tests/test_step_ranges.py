"""The range that profilers show around a step: that of torch's own AdamW."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked import Class, both, make
from torch.autograd import profiler, profiler_legacy

RANGE = "Optimizer.step#AdamW.step"


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

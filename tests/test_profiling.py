"""The range that a profiler shows for a step."""

from __future__ import annotations

import pytest
import torch
from cases import FULL, Case, parameters, set_gradients
from torch.autograd import profiler

import fusedoptim

SHAPES = [(5,), (6,), (7,)]


def stepped_names(profile: torch.profiler.profile) -> list[str]:
    return [e.name for e in profile.events() if e.name.startswith("fusedoptim.")]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_step_has_a_name_and_a_number(case: Case) -> None:
    params = parameters(SHAPES)
    o = case.make([{"params": params[:1]}, {"params": params[1:]}])
    with torch.profiler.profile(acc_events=True) as profile:
        set_gradients(params, 0)
        o.step()
        params[1].grad = None
        o.step()
        o.zero_grad()
        o.step()
    expected = [f"fusedoptim.{case.optimizer}.step({n} tensors)" for n in (3, 2, 0)]
    assert stepped_names(profile) == expected


def test_a_subclass_has_its_own_name_and_a_closure_comes_before_the_range() -> None:
    class Mine(fusedoptim.SGD):
        pass

    params = parameters(SHAPES)
    o = Mine(params)

    def closure() -> torch.Tensor:
        loss = sum((p * 2).sum() for p in params)
        loss.backward()
        return loss

    with torch.profiler.profile(acc_events=True) as profile:
        o.step(closure)
    assert stepped_names(profile) == ["fusedoptim.Mine.step(3 tensors)"]
    (ours,) = (e for e in profile.events() if e.name.startswith("fusedoptim."))
    assert all(e.time_range.end <= ours.time_range.start for e in profile.events() if e.name == "aten::sum")


def test_an_error_ends_the_range() -> None:
    params = parameters(SHAPES)
    o = fusedoptim.SGD(params)
    set_gradients(params, 0)
    o.param_groups[0]["lr"] = float("nan")
    with torch.profiler.profile(acc_events=True) as profile:
        with pytest.raises(ValueError, match="'lr' is NaN"):
            o.step()
        torch.ones(3).add(1)
    (ours,) = (e for e in profile.events() if e.name.startswith("fusedoptim."))
    (add,) = (e for e in profile.events() if e.name == "aten::add")
    assert ours.time_range.end <= add.time_range.start


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all ranges that are opened from here on."""
    names: list[str] = []

    class Recorded(profiler.record_function):
        def __init__(self, name: str, args: str | None = None) -> None:
            names.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(profiler, "record_function", Recorded)
    return names


def test_without_a_profiler_no_range_is_opened(recorded: list[str]) -> None:
    params = parameters(SHAPES)
    o = fusedoptim.SGD(params)
    set_gradients(params, 0)
    o.step()
    assert recorded == []
    with torch.profiler.profile(acc_events=True):
        o.step()
    assert recorded == ["Optimizer.step#SGD.step", "fusedoptim.SGD.step(3 tensors)"]
    o.step()
    assert len(recorded) == 2


@pytest.mark.gpu
def test_under_emit_nvtx(recorded: list[str]) -> None:
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(SHAPES)]
    o = fusedoptim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.autograd.profiler.emit_nvtx():
        o.step()
    assert "fusedoptim.AdamW.step(3 tensors)" in recorded

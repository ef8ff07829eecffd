"""Autograd's version counters: a backward pass through what a step has overwritten raises an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import ALL, FULL, LOW, Case, parameters, set_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from versions import Saved, check_versions

import fusedoptim
from fusedoptim import _native, _versions

needs_library = pytest.mark.skipif(_native._C is None, reason="needs the library")


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_of_all_that_a_step_writes_and_of_nothing_else(case: Case, backend: str, options: dict[str, Any]) -> None:
    check_versions(case, backend, options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", LOW, ids=str)
def test_of_what_is_kept_beside_in_fewer_bits(case: Case, backend: str) -> None:
    check_versions(case, backend, ALL, [(64, 65), (3, 1400), (7,), (66, 63)], torch.bfloat16)


@needs_library
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_raised_by_torch_where_they_are_not_found(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[torch.Tensor] = []
    monkeypatch.setattr(_versions, "find_counters", lambda: False)
    monkeypatch.setattr(_versions, "by_torch", lambda all_: (told.extend(all_), torch._C._increment_version(all_)))
    check_versions(case, "cpu", options)
    assert told


@needs_library
def test_are_found_in_this_torch_whatever_surrounds_the_search() -> None:
    look = _versions.find_counters.__wrapped__
    assert look() and _versions.find_counters()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(look())  # where autograd has been left behind
            return func(*args, **(kwargs or {}))

    found: list[bool] = []
    for around in (torch.inference_mode(), torch.device("meta"), FakeTensorMode(), Mode()):
        with around:
            found.append(look())
            torch.zeros(3)
    torch.vmap(lambda x: (found.append(look()), x)[1])(torch.zeros(2))
    assert len(found) >= 6 and all(found)


@needs_library
def test_a_search_that_fails_leaves_them_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(_native._C.VersionProbe):  # type: ignore[misc,name-defined]
        def find(self, versions: list[int]) -> bool:
            return False

    class Careless(_native._C.VersionProbe):  # type: ignore[misc,name-defined]
        def raise_(self, tensor: int) -> None:
            super().raise_(0)

    for probe in (Blind, Careless):
        monkeypatch.setattr(_native, "_C", SimpleNamespace(VersionProbe=probe))
        assert not _versions.find_counters.__wrapped__()


@needs_library
def test_a_search_among_tensors_that_are_not_as_promised_finds_nothing() -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    for kind in (
        [x, x.data, x.data, y, y.data, y.data],  # none shares its counter
        [x, x.detach(), x.detach(), y, y.detach(), y.detach()],  # all do
        [x, x.detach(), y.data],
        [x],
        [],
    ):
        probe = _native._C.VersionProbe()
        torch.ops.fusedoptim._hand_over(kind, probe.number)
        assert not probe.find([x._version, y._version][: max(1, len(kind) // 3)])


@needs_library
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_long_steps_and_of_many_tensors(backend: str) -> None:
    for shapes in ([(300_000,)], [(3,)] * 300):
        params = parameters(shapes)
        optimizer = fusedoptim.AdamW(params, backend=backend, max_grad_norm=1.0)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        before = [(t, t._version) for p in params for t in (p, *optimizer.state[p].values())]
        optimizer.step()
        assert all(t._version == version + 1 for t, version in before)


@needs_library
@pytest.mark.parametrize("counted_by_torch", [False, True], ids=["in the library", "by torch"])
def test_of_steps_that_release_the_interpreter(counted_by_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of 2^20 elements and more do, so that other threads of Python can run meanwhile."""
    if counted_by_torch:
        monkeypatch.setattr(_versions, "find_counters", lambda: False)
    for zeroes in (False, True):
        params = parameters([((1 << 21) + 5,), (3,)])
        optimizer = fusedoptim.SGD(params, momentum=0.9, backend="cpu", zero_grad_in_step=zeroes)
        for active in (params, params, params[:1]):  # the tables' first step, and others with them
            for p in params:
                p.grad = torch.ones_like(p) if p in set(active) else None
            before = [(t, t._version) for p in active for t in (p, *optimizer.state[p].values())]
            grads = [(p.grad, p.grad._version) for p in active]
            others = [(t, t._version) for p in set(params) - set(active) for t in (p, *optimizer.state[p].values())]
            optimizer.step()
            assert all(t._version == version + 1 for t, version in before)
            assert all(t._version == version + zeroes for t, version in grads)
            assert all(t._version == version for t, version in others)


def test_of_a_parameter_that_its_backward_pass_steps() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedoptim.AdamW([p])
    with fusedoptim.step_in_backward(optimizer):
        p.sum().backward()
        saved = [Saved(t) for t in (p, *optimizer.state[p].values())]
        p.sum().backward()
    for s in saved:
        s.check(True, "stepped in the backward pass")


def test_of_clipped_gradients() -> None:
    for clip in (
        lambda p: fusedoptim.clip_grad_norm_(p, 0.1),
        lambda p: fusedoptim.clip_grad_value_(p, 0.1),
    ):
        params = parameters([(5,), (3, 4)])
        set_gradients(params, 0)
        params[1].grad = None
        saved, untouched = Saved(params[0].grad), Saved(params[1])
        clip(params)
        saved.check(True, "clipped")
        untouched.check(False, "without a gradient")


def test_inference_tensors_have_none() -> None:
    params = parameters([(5,)])
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    with torch.inference_mode():
        optimizer.step()
        optimizer.step()
    assert params[0]._version == 2
    assert all(t.is_inference() for t in optimizer.state[params[0]].values())
    optimizer.step()
    assert params[0]._version == 3


# ---- the operator that hands tensors to the library ----


@needs_library
def test_no_operator_takes_an_address_on_trust() -> None:
    probe = _native._C.VersionProbe()
    for number in (0, 16, -1, 2**62, id(probe)):
        with pytest.raises((RuntimeError, ValueError), match=f"nothing waits for tensors under the number {number}"):
            torch.ops.fusedoptim._hand_over([], number)
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fusedoptim::")]
    assert {s.name.split("::")[1] for s in schemas} >= {"_hand_over", "step_"}
    assert not [s for s in schemas if "address" in str(s)]


@needs_library
def test_tensors_are_handed_over_once_and_to_the_living_only() -> None:
    optimizer = fusedoptim.AdamW(parameters([(5,)]), backend="cpu")
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    gone, waiting = _native._C.VersionProbe(), _native._C.VersionProbe()
    torch.ops.fusedoptim._hand_over([torch.zeros(1)], waiting.number)
    numbers = [optimizer._runners[0].plan.number, waiting.number, gone.number]
    del gone
    for number in numbers:
        with pytest.raises((RuntimeError, ValueError), match="nothing waits"):
            torch.ops.fusedoptim._hand_over([torch.zeros(3)], number)
    optimizer.step()

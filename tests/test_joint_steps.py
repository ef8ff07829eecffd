"""Norms of what lies on several devices of a process, and norms that somebody else has measured."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import ALL, BY_NAME, FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from torch import Tensor

import fusedoptim
from fusedoptim import _members
from fusedoptim._exchange import RefusedElsewhere, tree_sum
from fusedoptim._joint_runner import JointRunner, Notice

SHAPES = [(5,), (), (0,), (7, 11), (2000,)]
BACKENDS = ["cpu", "reference"]


class Event:
    """Of a GPU that has come so far as ``done`` says."""

    done = 0
    made = 0

    def record(self) -> None:
        Event.made += 1
        self.number = Event.made

    def query(self) -> bool:
        assert not Gpu.capturing, "not to be asked then"
        return self.number <= Event.done


class Gpu:
    Event = Event
    capturing = False

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return Gpu.capturing


def test_the_host_learns_of_refusals_when_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.done, Event.made, empty = 0, 0, torch.empty
    monkeypatch.setattr(torch, "get_device_module", lambda _: Gpu)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    notice = Notice()
    for refusals in (0.0, 1.0, 0.0):  # before it looks, as a host does that is ahead
        notice.send(torch.tensor(refusals))
    notice.look()
    Event.done = 1
    notice.look()
    Gpu.capturing = True
    Event.done = 3
    notice.look()
    notice.send(torch.tensor(1.0))
    Gpu.capturing = False
    with pytest.raises(RefusedElsewhere):
        notice.look()
    notice.look()


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second parameter counts as one of another device: ``cpu:0``, which is not ``cpu`` where devices are told
    apart, and has the same memory."""

    def by_device(found: _members.Found) -> dict[torch.device, list[_members.BoundParam]]:
        ready = {torch.device("cpu"): found.ready[::2], torch.device("cpu", 0): found.ready[1::2]}
        return {device: members for device, members in ready.items() if members}

    monkeypatch.setattr(_members.Found, "by_device", by_device)


def pair(case: Case, dtypes: list[torch.dtype], **options: Any) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    both = []
    for _ in range(2):
        params = [p for dtype in dtypes for p in parameters(SHAPES, dtype)]
        both += [params, case.make(params, **options)]
    return both[0], both[2], both[1], both[3]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64], [torch.bfloat16]], ids=str)
@pytest.mark.parametrize("options", [{}, ALL, {"max_grad_norm": 0.1}], ids=["plain", "all options", "clipped"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_several_devices_have_a_common_norm(
    case: Case, backend: str, options: dict[str, Any], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    mine, theirs, a, b = pair(case, dtypes, backend=backend, **options)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for params in (mine, theirs):
            params[step].grad = None
        if step == 2 and options.get("skip_nonfinite"):
            mine[3].grad[0] = theirs[3].grad[0] = math.inf
        b.step()
        with monkeypatch.context():
            request.getfixturevalue("two_devices")
            a.step()
        monkeypatch.undo()
    assert_same_optimizers(a, b)
    if options:
        assert a.last_grad_norm.dtype == b.last_grad_norm.dtype
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)
        assert a.skipped_steps == b.skipped_steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_is_as_wide_as_the_widest_tensor_on_any_device(backend: str, request: pytest.FixtureRequest) -> None:
    both = []
    for fixture in (None, "two_devices"):
        if fixture is not None:
            request.getfixturevalue(fixture)  # one has fp32, the other fp64
        params = [p for _ in range(4) for dtype in (torch.float32, torch.float64) for p in parameters([(99,)], dtype)]
        optimizer = BY_NAME["adamw_amsgrad"].make(params, backend=backend, max_grad_norm=0.1)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
        both.append(optimizer)
    assert_same_optimizers(*both)
    assert_same_bits(both[0].last_grad_norm, both[1].last_grad_norm)


def test_steps_over_several_devices_are_joint(two_devices: None) -> None:
    params = parameters(SHAPES)
    set_gradients(params, 0)
    optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    (joint,) = optimizer._runners
    assert isinstance(joint, JointRunner) and len(joint.runners) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_norm_from_elsewhere(case: Case, backend: str) -> None:
    """Two optimizers with halves of the parameters, and the norm of all, make the step of one with all of them."""
    mine, theirs, _, whole = pair(case, [torch.float32], backend=backend, max_grad_norm=0.1)
    halves = [case.make(part, backend=backend, max_grad_norm=0.1) for part in (mine[:3], mine[3:])]
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        whole.step()
        norm = fusedoptim.grad_norm(mine, backend=backend)
        assert_same_bits(norm, whole.last_grad_norm)
        for half in halves:
            half.step(grad_norm=norm)
            assert_same_bits(half.last_grad_norm, norm)
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p, q)


def test_a_norm_from_elsewhere_is_not_finite() -> None:
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = fusedoptim.AdamW(params, skip_nonfinite=True)
    set_gradients(params, 0)
    optimizer.step(grad_norm=math.inf)
    assert not optimizer.state and optimizer.skipped_steps == 1
    optimizer.step()
    optimizer.step(grad_norm=torch.tensor(math.nan))
    assert optimizer.skipped_steps == 2 and optimizer.state[params[0]]["step"] == 1
    assert not all(map(torch.equal, before, params))


def test_a_norm_that_nobody_asks_for_or_that_is_none() -> None:
    params = parameters(SHAPES)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="neither"):
        fusedoptim.AdamW(params).step(grad_norm=1.0)
    optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0)
    for norm in (torch.ones(2), torch.ones((), dtype=torch.int64)):
        with pytest.raises(ValueError, match="must be one number"):
            optimizer.step(grad_norm=norm)
    with pytest.raises(RuntimeError, match="cannot be traced"):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            optimizer.step(grad_norm=1.0)
    assert not optimizer.state


@pytest.mark.parametrize("group", [3, "world", [None]], ids=str)
def test_what_is_no_process_group(group: object) -> None:
    with pytest.raises(ValueError, match="Invalid norm_group"):
        fusedoptim.AdamW(parameters(SHAPES), norm_group=group)
    with pytest.raises(ValueError, match="Invalid norm_group"):
        fusedoptim.clip_grad_norm_(parameters(SHAPES), 1.0, norm_group=group)


class Group:
    """As much of a process group as an optimizer keeps."""

    group_name = "stages"


def test_copies_keep_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    optimizer = fusedoptim.AdamW(parameters(SHAPES), norm_group=group)
    assert copy.deepcopy(optimizer)._options["norm_group"] == (group,)
    from torch.distributed import distributed_c10d

    monkeypatch.setattr(distributed_c10d, "_resolve_process_group", {"stages": group}.__getitem__)
    assert pickle.loads(pickle.dumps(optimizer))._options["norm_group"] == (group,)
    assert "norm_group: <process group stages>" in repr(optimizer)


@pytest.mark.parametrize("n", [*range(1, 10), 127, 128, 1000])
def test_rows_are_added_by_halving(n: int) -> None:
    """As a tile is, padded with zeros."""
    rows = torch.rand(n, 3, dtype=torch.float64) + 1
    width = 1 << (n - 1).bit_length()
    expected = torch.zeros(width, 3, dtype=torch.float64)
    expected[:n] = rows
    while len(expected) > 1:
        expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
    assert torch.equal(tree_sum(rows.clone()), expected[0])

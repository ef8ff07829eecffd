"""Steps of fake tensors, which get states and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import ALL, FULL, Case, assert_same_optimizers, parameters, set_gradients
from modes import SHAPES, Log, pair
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedoptim

pytestmark = pytest.mark.filterwarnings("ignore:.*non-leaf Tensor")


def fakes(mode: FakeTensorMode, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    with mode:
        params = [torch.nn.Parameter(torch.ones(s, device=device, dtype=dtype)) for s in SHAPES]
        for p in params[:2]:
            p.grad = torch.ones_like(p)
    return params


@pytest.fixture(params=["within the mode", "outside of it"])
def within(request: pytest.FixtureRequest) -> Iterator[Callable[[FakeTensorMode], Any]]:
    yield (lambda mode: mode) if request.param == "within the mode" else (lambda mode: nullcontext())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, ALL, {"state_dtype": torch.bfloat16}], ids=["plain", "all options", "bf16"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_fake_parameters_get_states_and_nothing_else(
    case: Case, options: dict, dtype: torch.dtype, within: Any
) -> None:
    real = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(SHAPES)]
    for p in real[:2]:
        p.grad = torch.ones_like(p)
    expected = case.make(real, **options, **case.as_it_is)
    expected.step()
    mode = FakeTensorMode()
    params = fakes(mode, dtype=dtype)
    with within(mode):
        optimizer = case.make(params, **options)
        for _ in range(2):
            optimizer.step()
            with Log():
                optimizer.step()
    assert params[0].grad is not None
    for p, q in zip(params, real, strict=True):
        states = optimizer.state.get(p, {})
        assert states.keys() == expected.state.get(q, {}).keys()
        for name, value in states.items():
            like = expected.state[q][name]
            assert isinstance(value, FakeTensor) and value.fake_mode is mode, name
            assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device), name
    norm = optimizer.last_grad_norm
    if options is ALL:
        assert isinstance(norm, FakeTensor) and norm.shape == () and norm.dtype == torch.float32
    else:
        assert norm is None
    with within(mode):
        optimizer.zero_grad()
        optimizer.state_dict()
        assert optimizer.skipped_steps.shape == ()


def test_fake_parameters_of_a_rule_without_states_get_no_entries() -> None:
    optimizer = fusedoptim.SGD(fakes(FakeTensorMode()))
    optimizer.step()
    assert not optimizer.state


def test_fake_parameters_on_a_gpu_have_their_steps_there() -> None:
    mode = FakeTensorMode()
    params = fakes(mode, "cuda")
    optimizer = fusedoptim.AdamW(params)
    optimizer.step()
    assert all(t.device.type == "cuda" for t in optimizer.state[params[0]].values())
    eager = fusedoptim.AdamW(params, backend="reference")
    eager.step()
    assert eager.state[params[0]]["step"].device.type == "cpu"


def test_fake_parameters_with_a_scaler_and_in_the_backward_pass() -> None:
    mode = FakeTensorMode()
    params = fakes(mode)
    optimizer = fusedoptim.AdamW(params)
    with mode:
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        optimizer.step()
    assert len(optimizer.state) == 2
    with mode:
        model = torch.nn.Linear(3, 2)
        released = fusedoptim.AdamW(model.parameters())
        with fusedoptim.step_in_backward(released):
            for _ in range(2):
                model(torch.ones(1, 3)).sum().backward()
    assert all(isinstance(v, FakeTensor) for p in model.parameters() for v in released.state[p].values())
    assert len(released.state) == 2 and all(p.grad is None for p in model.parameters())


def test_a_memory_tracker_counts_the_states() -> None:
    tools = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def peak(make: Any) -> int:
        with FakeTensorMode():
            model = torch.nn.Linear(1000, 100)
            optimizer = make(model.parameters())
            tracker = tools.MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(2):
                    model(torch.ones(8, 1000)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
            (snapshot,) = tracker.get_tracker_snapshot("current").values()
            return int(snapshot[tools._MemRefType.OPT])

    assert peak(fusedoptim.AdamW) == peak(lambda p: torch.optim.AdamW(p, foreach=False)) > 2 * 4 * 100_100


def test_real_parameters_in_a_mode_for_fakes() -> None:
    """Whatever was made in it would spoil a later real step."""
    mine, theirs, a, b = pair(FULL[1], max_grad_norm=1.0)
    for params in (mine, theirs):
        set_gradients(params, 0)
    for stepped in range(2):
        with FakeTensorMode(), pytest.raises(RuntimeError, match="real parameters under a FakeTensorMode"):
            a.step()
        with FakeTensorMode(allow_non_fake_inputs=True):
            a.step()
        assert (len(a.state) == 3) == bool(stepped)
        a.step()
        b.step()
    assert_same_optimizers(a, b)
    assert a.last_grad_norm == b.last_grad_norm


def test_fake_parameters_without_gradients_are_left_alone() -> None:
    mode = FakeTensorMode()
    params = fakes(mode)
    for p in params:
        p.grad = None
    for within in (mode, nullcontext(), Log()):
        optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0)
        with within:
            optimizer.step()
        assert not optimizer.state
    real = parameters(SHAPES)
    set_gradients(real, 0)
    optimizer = fusedoptim.AdamW([*params, *real])
    for _ in range(2):
        optimizer.step()
    assert [len(optimizer.state[p]) for p in real] == [3, 3, 3] and len(optimizer.state) == 3


def test_fake_and_real_tensors_are_not_mixed() -> None:
    mode = FakeTensorMode()
    real = parameters(SHAPES)
    set_gradients(real, 0)
    optimizer = fusedoptim.AdamW([*fakes(mode), *real])
    with pytest.raises(ValueError, match="2 of the 5 parameters that have gradients are fake"):
        optimizer.step()
    assert not optimizer.state
    optimizer = fusedoptim.AdamW(real)
    with mode:
        real_state = torch.zeros(5)
    optimizer.state[real[0]] = {"step": torch.zeros(()), "exp_avg": real_state, "exp_avg_sq": torch.zeros(5)}
    before = real[0].detach().clone()
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 .* is a fake tensor"):
        optimizer.step()
    assert torch.equal(real[0].detach(), before)

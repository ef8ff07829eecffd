"""GradScaler's protocol: gradients unscaled and steps skipped, by the step itself or in the ordinary way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable

import pytest
import torch
from cases import CASES, FULL, Case, assert_same_bits, assert_same_optimizers, parameters
from scaled import train

from benchmarks.witness import ieee_sqrt


@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "before the step"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [c for c in CASES if c.in_torch], ids=str)
def test_the_same_as_torch_under_the_same_scaler(case: Case, backend: str, in_step: bool) -> None:
    mine, theirs = parameters([(5,), (40,)]), parameters([(5,), (40,)])
    a, b = case.make(mine, backend=backend, amp_in_step=in_step), case.make_torch(theirs, foreach=False)
    overflow = {0, 4, 5}
    scales = train(a, mine, 12, overflow)
    with ieee_sqrt():
        assert scales == train(b, theirs, 12, overflow)
    assert scales[0] < 1024.0 < max(scales[3:]) * 4
    assert_same_optimizers(a, b)
    assert not hasattr(a, "found_inf")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_overflow_on_the_first_step_leaves_nothing(case: Case) -> None:
    params = parameters([(5,), (40,)])
    before = [p.detach().clone() for p in params]
    optimizer = case.make(params, amp_in_step=True)
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    train(optimizer, params, 1, {0})
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert optimizer.state.keys() == states.keys()  # Adagrad's exist from the start
    for p, state in states.items():
        for name, value in state.items():
            assert_same_bits(optimizer.state[p][name], value)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_option_is_the_programs_and_not_the_trainings(case: Case) -> None:
    """Copies and pickles keep it; a state_dict, which others may load, has no trace of it."""
    for option in ("amp_in_step", "zero_grad_in_step"):  # the second asks for the first
        params = parameters([(5,)])
        optimizer = case.make(params, **{option: True})
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), loaded):
            assert o._step_supports_amp_scaling
        assert not any(option in group for group in optimizer.state_dict()["param_groups"])
        plain = case.make(parameters([(5,)]))
        plain.load_state_dict(optimizer.state_dict())
        assert not plain._step_supports_amp_scaling and not type(optimizer)._step_supports_amp_scaling
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer._step_supports_amp_scaling
    with pytest.raises(ValueError, match="a group cannot have its own amp_in_step"):
        case.make([{"params": parameters([(5,)]), "amp_in_step": True}])


def test_the_scalers_own_mark_can_still_be_set() -> None:
    both = []
    for mark in (True, False):
        params = parameters([(5,), (40,)])
        optimizer = FULL[1].make(params, amp_in_step=not mark)
        optimizer._step_supports_amp_scaling = mark
        found: list[bool] = []
        optimizer.register_step_pre_hook(lambda o, *_, found=found: found.append(hasattr(o, "found_inf")))
        train(optimizer, params, 4, {2})
        assert found == ([True] * 4 if mark else [False] * 3)  # else the scaler skips the step itself
        both.append(optimizer)
    assert_same_optimizers(*both)


# ---- training a model under autocast ----

#: Of AUTOCAST_STEPS, those with an infinite gradient. The scale halves at each, and doubles after three steps without.
AUTOCAST_OVERFLOWS = (0, 5)
AUTOCAST_STEPS = 10
SCALES = [512.0, 512.0, 512.0, 1024.0, 1024.0, 512.0, 512.0, 512.0, 1024.0, 1024.0]
MAX_NORM = 0.5

#: Per step, one for each parameter.
Gradients = list[list[torch.Tensor]]


def small_model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.GELU(), torch.nn.LayerNorm(40), torch.nn.Linear(40, 3)
    ).to(device)


def new_scaler(device: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=3)


def copies(params: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.detach().cpu().clone() for p in params]


def train_under_autocast(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: str, dtype: torch.dtype, clip: bool
) -> tuple[Gradients, Gradients, list[float]]:
    """Returns the gradients as the backward passes left them, those that were stepped with, and the scales."""
    scaler, params = new_scaler(device), list(model.parameters())
    left, stepped, scales, norms = [], [], [], []
    for step in range(AUTOCAST_STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(device)
        with torch.autocast(device, dtype=dtype):
            y = model(x)
            assert y.dtype == dtype
            loss = (y.float() ** 2).mean()
        scaler.scale(loss).backward()
        if step in AUTOCAST_OVERFLOWS:
            params[step % len(params)].grad.view(-1)[0] = float("inf")
        left.append(copies(params))
        if clip:
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(params, MAX_NORM).item())
        stepped.append(copies(params))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert not clip or any(norm > MAX_NORM for norm in norms[1:5])
    return left, stepped, scales


def replay(
    params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, left: Gradients, stepped: Gradients, clip: bool
) -> list[float]:
    """The same steps by another optimizer, on the CPU, in the ordinary way. Returns the scales."""
    scaler, scales = new_scaler("cpu"), []
    for before, after in zip(left, stepped, strict=True):
        scaler.scale(torch.ones(()))  # makes the scale
        for p, grad in zip(params, before, strict=True):
            p.grad = grad.clone()
        if clip:
            scaler.unscale_(optimizer)
            for p, grad in zip(params, after, strict=True):
                p.grad.copy_(grad)
        with ieee_sqrt():
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def check_autocast(case: Case, device: str, dtype: torch.dtype, clip: bool, in_step: bool, **options: object) -> None:
    model = small_model(device)
    mine, theirs = list(model.parameters()), list(small_model("cpu").parameters())
    a = case.make(mine, amp_in_step=in_step, **options)
    b = case.make_torch(theirs, foreach=False) if case.in_torch else case.make(theirs, backend="reference")
    left, stepped, scales = train_under_autocast(model, a, device, dtype, clip)
    assert scales == replay(theirs, b, left, stepped, clip) == SCALES
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach())
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert_same_bits(value.cpu(), b.state[q][name], name)


@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "before the step"])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_model_under_autocast(case: Case, clip: bool, in_step: bool) -> None:
    check_autocast(case, "cpu", torch.bfloat16, clip, in_step)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "before the step"])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_model_under_autocast_on_a_gpu(case: Case, clip: bool, in_step: bool, backend: str) -> None:
    check_autocast(case, "cuda", torch.float16, clip, in_step, backend=backend)

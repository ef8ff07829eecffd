"""Steps within the backward pass: the bits of ordinary steps."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, CASES, FULL, Case, assert_same_bits, assert_same_optimizers, parameters
from released import (
    NEVER,
    SHAPES,
    Params,
    assert_same_state_dicts,
    both_ways,
    in_groups,
    loss_of,
    make,
    ordinary,
    released,
    stack,
)

import fusedoptim
from fusedoptim import step_in_backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_ordinary_steps(case: Case) -> None:
    """With several groups, a schedule, and parameters used twice, not always, never, and frozen."""
    (one, a), (two, b) = make(case), make(case)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (a, b)]
    step_in_backward(a)
    for step in range(6):
        released(one, step)
        if step % 2:
            a.step()
        ordinary(b, two, step)
        for schedule in schedules:
            schedule.step()
        assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_other_dtypes_and_states_in_fp32(case: Case, dtype: torch.dtype) -> None:
    one, two = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a, b = (case.make(in_groups(ps), state_dtype=torch.float32) for ps in (one, two))
    both_ways(one, a, two, b, 3)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_with_clipped_values_and_averages(case: Case) -> None:
    (one, a), (two, b) = (make(case, clip_grad_value=0.1, ema_decay=0.8) for _ in range(2))
    both_ways(one, a, two, b, 4)
    assert_same_state_dicts(a, b)
    assert "ema" in a.state[one[0]]
    with a.ema_weights(), pytest.raises(RuntimeError, match=r"step\(\) within ema_weights"):
        loss_of(one, 4).backward()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_reference_does_it_too(case: Case) -> None:
    (one, a), (two, b) = make(case, backend="reference"), make(case)
    both_ways(one, a, two, b, 3)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_loading_a_state_dict_in_between(case: Case) -> None:
    (one, a), (two, b) = make(case), make(case)
    other, c = make(case)
    for step in range(2):
        ordinary(c, other, step)
    with step_in_backward(a):
        for step in range(2, 6):
            if step == 4:
                for o in (a, b):
                    o.load_state_dict(c.state_dict())
            released(one, step)
            ordinary(b, two, step)
    assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


def test_states_are_the_owners_whoever_makes_or_changes_them() -> None:
    case = BY_NAME["adamw"]
    (one, a), (two, b) = make(case), make(case)
    ordinary(a, one, 0)
    ordinary(b, two, 0)
    step_in_backward(a)
    for step in range(1, 8):
        for o, params in ((a, one), (b, two)):
            if step == 2:
                o.state[params[0]]["exp_avg"] = torch.full((5,), 0.5)
            if step == 3:
                del o.state[params[0]]
            if step == 4:
                o.state.clear()
            if step == 5:
                o.param_groups[0]["betas"] = (0.5, 0.6)
                o.param_groups[1]["amsgrad"] = True
            if step == 6:
                o.param_groups[1] = {**o.param_groups[1], "lr": 0.3}
                o.param_groups = list(o.param_groups)
        released(one, step)
        ordinary(b, two, step)
        assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


def test_a_tensor_lr_changed_in_place() -> None:
    def with_tensor() -> tuple[Params, fusedoptim.FusedOptimizer]:
        params = parameters([(5,), (6,)])
        return params, fusedoptim.AdamW(params, lr=torch.tensor(0.1))

    (one, a), (two, b) = with_tensor(), with_tensor()
    step_in_backward(a)
    for step in range(3):
        released(one, step)
        ordinary(b, two, step)
        for o in (a, b):
            o.param_groups[0]["lr"].mul_(0.5)
    assert_same_optimizers(a, b)


def test_gradients_that_were_there_before_are_part_of_the_sum() -> None:
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    for params in (one, two):
        loss_of(params, 7).backward()
    step_in_backward(a)
    assert not a.state
    loss_of(one, 0).backward()
    one[NEVER].grad = two[NEVER].grad = torch.ones(17)
    a.step()  # what the pass has not reached is left to it
    ordinary(b, two, 0)
    assert_same_optimizers(a, b)


def test_a_closure() -> None:
    (one, a), (two, b) = make(BY_NAME["sgd_momentum"]), make(BY_NAME["sgd_momentum"])
    step_in_backward(a)

    def closure() -> torch.Tensor:
        loss = loss_of(one, 0)
        loss.backward()
        return loss

    assert torch.equal(a.step(closure), loss_of(two, 0))
    ordinary(b, two, 0)
    assert_same_optimizers(a, b)


def test_post_hooks_run_where_step_is_called() -> None:
    params, o = make(BY_NAME["sgd"])
    seen = []
    o.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
    step_in_backward(o)
    released(params, 0)
    assert not seen
    o.step()
    assert_same_bits(seen[0], params[0].detach())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_on_a_gpu(case: Case, backend: str) -> None:
    """The bits of ordinary steps, and the allocator's word that gradients do not pile up."""
    one, two = (stack(20, 512).cuda() for _ in range(2))
    a, b = (case.make(model.parameters(), backend=backend) for model in (one, two))
    step_in_backward(a)
    peaks = []
    for _ in range(3):
        peaks.clear()
        for model, o in ((one, a), (two, b)):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(torch.ones(2, 512, device="cuda")).sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            o.step()
            o.zero_grad()
        assert_same_optimizers(a, b)
    gradients = sum(p.numel() * p.element_size() for p in one.parameters())
    assert peaks[1] >= gradients > 4 * peaks[0]

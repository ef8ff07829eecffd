"""Schedule-free AdamW's two modes: what the parameters are, who may step, and what checkpoints say of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same_bits, assert_same_optimizers, gradient, parameters, set_gradients
from ranks import run
from test_ema_sharded import fsdp1, fsdp2, make, x_of
from torch import Tensor, nn

import fusedoptim
from fusedoptim.reference import decode

CASE = Case("", "AdamWScheduleFree", {"lr": 0.01, "warmup_steps": 3, "weight_decay": 0.1}, in_torch=False)
SHAPES = [(5,), (7, 11), ()]
BF16 = torch.bfloat16


def trained(dtype: torch.dtype = torch.float64, steps: int = 4, **options: Any) -> tuple[list, Any]:
    params = parameters(SHAPES, dtype)
    optimizer = CASE.make(params, **options)
    go_on(params, optimizer, range(steps))
    return params, optimizer


def go_on(params: list, optimizer: Any, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def values(params: list) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


def test_parameters_are_the_average_after_eval_and_the_mix_after_train() -> None:
    """The average is worked out beside it, from the iterates."""
    params = parameters(SHAPES, torch.float64)
    optimizer = CASE.make(params)
    averages, total = values(params), 0.0
    for step in range(6):
        go_on(params, optimizer, range(step, step + 1))
        weight = (0.01 * min((step + 1) / 3, 1)) ** 2
        total += weight
        averages = [x + weight / total * (optimizer.state[p]["z"] - x) for x, p in zip(averages, params, strict=True)]
    mixes = values(params)
    optimizer.eval()
    for p, x in zip(params, averages, strict=True):
        assert (p.detach() - x).abs().max() < 1e-8  # the sum of weights has fp32
    once = values(params)
    optimizer.eval()
    assert_equal(values(params), once)
    optimizer.train()
    for p, y in zip(params, mixes, strict=True):
        assert (p.detach() - y).abs().max() < 1e-14
    once = values(params)
    optimizer.train()
    assert_equal(values(params), once)


def test_a_step_after_eval_is_refused_before_its_closure() -> None:
    params, optimizer = trained()
    optimizer.eval()
    before, states = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    called: list[int] = []
    for step in (optimizer.step, lambda: optimizer.step(lambda: called.append(1) or 0.0)):
        with pytest.raises(RuntimeError, match=r"step\(\) after eval\(\).*optimizer\.train\(\)"):
            step()
    assert not called and str(optimizer.state_dict()["state"]) == str(states)
    assert_equal(values(params), before)
    optimizer.train()
    optimizer.step()


def test_a_new_optimizer_steps_and_can_be_evaluated_before_that() -> None:
    params = parameters(SHAPES)
    optimizer, before = CASE.make(params), values(params)
    optimizer.eval()
    assert_equal(values(params), before)
    optimizer.train()
    go_on(params[:1], optimizer, range(1))
    untouched = values(params[1:])
    optimizer.eval()
    assert_equal(values(params[1:]), untouched)
    assert not torch.equal(params[0].detach(), before[0])


def test_checkpoints_carry_the_mode() -> None:
    params, optimizer = trained()
    optimizer.eval()
    others = parameters(SHAPES, torch.float64, seed=1)
    other = CASE.make(others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for o in (other, copied):
        with pytest.raises(RuntimeError, match="after eval"):
            o.step()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    for ps, o in ((params, optimizer), (others, other)):
        o.train()
        go_on(ps, o, range(4, 7))
    assert_same_optimizers(optimizer, other)


def test_a_group_that_is_added_after_eval() -> None:
    params, optimizer = trained()
    optimizer.eval()
    more = parameters([(3,)], torch.float64)
    optimizer.add_param_group({"params": more})
    before = values(more)
    with pytest.raises(RuntimeError, match="after eval"):
        optimizer.step()
    optimizer.train()
    assert_equal(values(more), before)
    go_on(params + more, optimizer, range(4, 6))


def test_what_cannot_be_found_again_and_what_is_an_average_already() -> None:
    params, optimizer = trained(betas=(0.0, 0.9), ema_decay=0.5)
    before = values(params)
    with pytest.raises(ValueError, match=r"betas\[0\] = 0"):
        optimizer.eval()
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with optimizer.ema_weights():
        for switch in (optimizer.eval, optimizer.train):
            averages = values(params)
            with pytest.raises(RuntimeError, match=r"(eval|train)\(\) within ema_weights\(\)"):
                switch()
            assert_equal(values(params), averages)
    assert_equal(values(params), before)
    assert optimizer.param_groups[0]["train_mode"] is True


def test_autograd_notices() -> None:
    params, optimizer = trained()
    loss = (params[0] ** 2).sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- fewer bits ----


def test_with_a_remainder_modes_have_the_bits_of_fp32() -> None:
    """Of parameters that start as the same numbers, with the same gradients."""
    low = parameters(SHAPES, BF16)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    a, b = CASE.make(low, master="remainder", state_dtype=torch.float32), CASE.make(full)

    def compare() -> None:
        for p, q in zip(low, full, strict=True):
            assert_same_bits(decode("bf16_remainder", p.detach(), a.state[p]["param_remainder"]), q.detach())

    for turn in range(3):
        for step in (2 * turn, 2 * turn + 1):
            for i, (p, q) in enumerate(zip(low, full, strict=True)):
                p.grad = gradient(p, step, i)
                q.grad = p.grad.float()
            a.step()
            b.step()
        for mode in ("eval", "train"):
            getattr(a, mode)()
            getattr(b, mode)()
            compare()


def test_without_one_they_are_rounded_once_to_nearest() -> None:
    params, optimizer = trained(BF16, rounding="stochastic", state_dtype={"exp_avg_sq": "int8"})
    wide = [p.detach().float() for p in params]
    optimizer.eval()
    for p, x in zip(params, wide, strict=True):
        expected = x.lerp(optimizer.state[p]["z"].float(), 1 - 1 / 0.9).to(BF16)
        assert_same_bits(p.detach(), expected)


def test_8_bits_are_not_for_iterates() -> None:
    for dtype in ("int8", {"z": "int8"}):
        with pytest.raises(ValueError, match=r"state_dtype='int8' is not for 'z'.*'exp_avg_sq': 'int8'"):
            CASE.make(parameters(SHAPES, BF16), state_dtype=dtype)


# ---- what steps otherwise ----


def test_steps_in_the_backward_pass_are_refused_too() -> None:
    params, optimizer = trained()
    for p in params:
        p.grad = None
    with fusedoptim.step_in_backward(optimizer):
        optimizer.eval()
        with pytest.raises(RuntimeError, match="after eval"):
            sum(p.square().sum() for p in params).backward()
        optimizer.train()
        sum(p.square().sum() for p in params).backward()
    assert optimizer.state[params[0]]["step"] == 5


def test_traced_steps_are_refused_too() -> None:
    params, optimizer = trained(torch.float32)
    step = torch.compile(optimizer.step, backend="eager")
    step()
    optimizer.eval()
    # A compiled function that raises leaves gradients off, as it had them within.
    with torch.enable_grad(), pytest.raises(RuntimeError, match="after eval"):
        step()
    optimizer.train()
    step()
    assert optimizer.state[params[0]]["step"] == 6


def test_an_evaluation_that_raises_has_written_nothing() -> None:
    params, optimizer = trained(torch.float32)
    before = [p.detach().clone() for p in params]
    last = optimizer.state[params[-1]]
    last["z"] = last["z"].flatten()[:1]
    with pytest.raises(ValueError, match=r"eval\(\): the state 'z' has shape \(1,\).*nothing was written"):
        optimizer.eval()
    group = optimizer.param_groups[0]
    group["betas"] = (1.5, 0.9)
    with pytest.raises(ValueError, match="beta"):
        optimizer.eval()
    assert group["train_mode"] is True
    assert_equal(params, before)


# ---- sharded models, whose root keeps whole parameters after an evaluation ----


def losses(model: nn.Module, optimizer: Any, given: tuple[nn.Module, ...]) -> list[Tensor]:
    found = []
    for turn in range(3):
        for step in (2 * turn, 2 * turn + 1):
            optimizer.zero_grad()
            model(x_of(step, torch.float32)).square().mean().backward()
            optimizer.step()
        for mode in (optimizer.eval, optimizer.train):
            mode(*given)
            with torch.no_grad():
                found.append(model(x_of(9, torch.float32)).square().mean())
    return found


def of_ranks(way: str) -> list[Tensor]:
    model = {"fsdp2": fsdp2, "fsdp1": fsdp1}[way](make())
    optimizer = CASE.make(model.parameters())
    model(x_of(0, torch.float32)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"pass the model, eval\(model\)"):
        optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"] is True
    return losses(model, optimizer, (model,))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_every_forward_of_a_sharded_model_has_the_right_weights(way: str) -> None:
    """Those of one process: means of equal gradients are exact."""
    model = make()
    optimizer = CASE.make(model.parameters())
    model(x_of(0, torch.float32)).square().mean().backward()
    optimizer.step()
    expected = losses(model, optimizer, ())
    for found in run(2, of_ranks, way):
        assert_equal(found, expected)

"""What a step does around its rule, against the same operations as separate calls, in sequence: bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ALL,
    BY_NAME,
    CAPABILITIES,
    FULL,
    IN_TORCH,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    gradient,
    parameters,
    set_gradients,
)

import fusedoptim
from benchmarks.witness import ieee_sqrt

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Separately:
    """An optimizer without options, with a call of torch's for each option instead. Gradients are fp32 copies, which
    clipping rounds as the step does."""

    def __init__(self, case: Case, params: list, options: dict[str, Any], make: Callable[..., Any]) -> None:
        self.params, self.options = params, options
        self.optimizer = make(params)
        self.ema: dict[torch.Tensor, torch.Tensor] = {}

    def step(self) -> None:
        o, grads = self.options, [p.grad for p in self.params]
        if "max_grad_norm" in o or "skip_nonfinite" in o:
            self.norm = fusedoptim.clip_grad_norm_(self.params, math.inf)
            if "skip_nonfinite" in o and not self.norm.isfinite():
                torch._foreach_zero_(grads) if "zero_grad_in_step" in o else None
                return
        if "max_grad_norm" in o:
            torch.nn.utils.clip_grads_with_norm_(self.params, o["max_grad_norm"], self.norm)
        if "clip_grad_value" in o:
            torch.nn.utils.clip_grad_value_(self.params, o["clip_grad_value"])
        for p in self.params if "ema_decay" in o else []:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            if p not in self.ema:
                self.ema[p] = p.detach().to(wide, copy=True)
        self.optimizer.step()
        for p, ema in self.ema.items():
            ema.lerp_(p.detach().to(ema.dtype), 1 - o["ema_decay"])
        if "zero_grad_in_step" in o:
            self.optimizer.zero_grad(set_to_none=False)


def assert_same(optimizer: Any, separately: Separately) -> None:
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    for p, q in zip(mine, separately.params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        if "zero_grad_in_step" in separately.options:
            assert not p.grad.any() and not q.grad.any()
        state = dict(optimizer.state[p])
        if q in separately.ema:
            assert_same_bits(state.pop("ema"), separately.ema[q])
        others = separately.optimizer.state.get(q, {})
        assert state.keys() == others.keys()
        for name, value in state.items():
            assert_same_bits(value, others[name], name)


SUBSETS = [dict(chosen) for n in range(1, len(ALL) + 1) for chosen in itertools.combinations(ALL.items(), n)]


@pytest.mark.parametrize("options", SUBSETS, ids=lambda o: "+".join(o))
def test_every_combination_is_torchs_calls_in_sequence(options: dict[str, Any]) -> None:
    """With torch's own optimizer as the witness."""
    case = BY_NAME["adamw_amsgrad"]
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    a = case.make(mine, **options)
    b = Separately(case, theirs, options, lambda params: case.make_torch(params, foreach=False))
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 3 and "skip_nonfinite" in options:
            mine[5].grad[3] = theirs[5].grad[3] = math.inf
        a.step()
        with ieee_sqrt():
            b.step()
    assert_same(a, b)
    if "max_grad_norm" in options:
        assert_same_bits(a.last_grad_norm, b.norm)
    assert a.skipped_steps.item() == ("skip_nonfinite" in options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capability", [*CAPABILITIES, "reference"])
@pytest.mark.parametrize("case", [*FULL, BY_NAME["sgd"]], ids=str)
def test_all_at_once(case: Case, capability: str, dtype: torch.dtype) -> None:
    backend = None
    if capability == "reference":
        backend = "reference"
    elif case.own and (capability != CAPABILITIES[0] or dtype == torch.float64):
        pytest.skip("a function is compiled for one instruction set and dtype")
    else:
        assert fusedoptim._native._C.set_cpu_capability(capability)
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a = case.make(mine, **ALL, **({"backend": backend} if backend else {}))
    b = Separately(case, theirs, ALL, lambda params: case.make(params, backend="reference"))
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step in (0, 3):  # also on the first step, which then leaves no states
            mine[-1].grad[3, 3] = theirs[-1].grad[3, 3] = math.nan
        a.step()
        b.step()
        if step == 0 and case.optimizer != "Adagrad":
            assert not a.state
    assert_same(a, b)
    assert a.skipped_steps.item() == 2 and a.skipped_steps.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_kernels_have_the_references_bits_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    """16-bit gradients are not rounded between clipping and the update."""
    if case.own and dtype != torch.bfloat16:
        pytest.skip("a function is compiled for one dtype")
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    more = {} if case.optimizer == "NormAdaptive" else {"state_dtype": torch.float32}
    a, b = case.make(mine, **ALL, **more), case.make(theirs, **{**ALL, **more, "backend": "reference"})
    for step in range(4):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = gradient(p, step, i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)
    assert_same_optimizers(a, b)
    assert all(not p.grad.any() for p in mine)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_clipping_in_the_step_is_clipping_before_it(case: Case) -> None:
    """And the gradients stay as they are. Groups have limits of their own, over one norm; one has none."""

    def groups(params: list) -> list[dict[str, Any]]:
        return [
            {"params": params[:5], "max_grad_norm": 0.3},
            {"params": params[5:9], "lr": 0.02},
            {"params": params[9:], "max_grad_norm": 0.05},
        ]

    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    a, b = case.make(groups(mine)), case.make([{**g, "max_grad_norm": None} for g in groups(theirs)])
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[4].grad = theirs[4].grad = None
        kept = [None if p.grad is None else p.grad.clone() for p in mine]
        a.step()
        norm = fusedoptim.clip_grad_norm_(theirs, math.inf)
        for group in groups(theirs):
            if "max_grad_norm" in group:
                torch.nn.utils.clip_grads_with_norm_(group["params"], group["max_grad_norm"], norm)
        b.step()
        assert_same_bits(a.last_grad_norm, norm)
        for p, g in zip(mine, kept, strict=True):
            assert (p.grad is None) == (g is None)
            assert g is None or torch.equal(p.grad, g)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_clipping_differs_from_torchs_by_the_error_of_its_norm(case: Case) -> None:
    """In fp64 its norm of 4,000 numbers is within 1e-14; steps follow by as much, and what Adam makes of it."""
    mine, theirs = parameters([(64, 65)], torch.float64), parameters([(64, 65)], torch.float64)
    a, b = case.make(mine, max_grad_norm=0.1), case.make_torch(theirs, foreach=False)
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1)
        with ieee_sqrt():
            b.step()
        assert a.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-14)
    torch.testing.assert_close(mine[0].detach(), theirs[0].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads: int) -> None:
    shapes = [(3_000_001,), (70_000,), *[(100 + i,) for i in range(300)]]
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        params = parameters(shapes)
        optimizer = fusedoptim.NormAdaptive(params, **ALL)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append((optimizer.last_grad_norm, optimizer))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_optimizers(results[0][1], results[1][1])


@pytest.mark.parametrize("case", FULL, ids=str)
def test_memory_layouts_do_not_matter(case: Case) -> None:
    """The norm is that of the logical order."""

    def permuted(t: torch.Tensor) -> torch.Tensor:
        return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    shape = (40, 30, 20)
    plain = parameters([shape, shape, shape])
    others = [
        torch.nn.Parameter(permuted(plain[0].detach())),
        torch.nn.Parameter(torch.zeros(40, 30, 60)[:, :, ::3].copy_(plain[1].detach())),
        torch.nn.Parameter(plain[2].detach().clone()),
    ]
    a, b = case.make(plain, **ALL), case.make(others, **ALL)
    for step in range(4):
        set_gradients(plain, step)
        for i, (p, q) in enumerate(zip(others, plain, strict=True)):
            p.grad = permuted(q.grad) if i != 1 else torch.zeros(40, 30, 40)[:, :, ::2].copy_(q.grad)
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)
        assert all(not p.grad.any() for p in others)
    assert_same_optimizers(a, b)
    assert others[1].grad.stride() == (1200, 40, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("found", ["by the norm", "by a scaler"])
def test_a_skipped_step_zeroes_gradients_in_any_memory_order(found: str, backend: str, dtype: torch.dtype) -> None:
    """And nothing between their elements; large enough for several chunks."""
    shape, gaps = (40, 30, 20), torch.full((40, 30, 41), 7.0, dtype=dtype)
    params = parameters([shape, shape, (3,), shape], dtype)
    before = [p.detach().clone() for p in params]
    options = {"zero_grad_in_step": True, "skip_nonfinite": found == "by the norm"}
    optimizer = BY_NAME["adamw"].make(params, backend=backend, **options)
    for step in range(3):
        set_gradients(params, step)
        params[0].grad = params[0].grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        params[1].grad = gaps[:, :, 1::2].copy_(params[1].grad)
        if step == 1:
            for p in params:
                p.grad.fill_(0.5)
            optimizer.step()
            before = [p.detach().clone() for p in params]
            continue
        if found == "by the norm":
            params[1].grad[-1, -1, -1] = math.inf
            optimizer.step()
        else:
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            del optimizer.found_inf
        assert not any(p.grad.any() for p in params)
        assert (gaps[:, :, ::2] == 7.0).all()
        for p, q in zip(params, before, strict=True):
            assert_same_bits(p.detach(), q)
        assert all(state["step"] == (step > 0) for state in optimizer.state.values())
    assert not params[0].grad.is_contiguous() and not params[1].grad.is_contiguous()


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("in_step", [True, False])
def test_under_a_scaler(case: Case, in_step: bool) -> None:
    """Unscale, then clip; an overflow zeroes the gradients and changes nothing else."""
    options = {"max_grad_norm": 0.5, "clip_grad_value": 0.1, "ema_decay": 0.5, "zero_grad_in_step": True}
    mine, theirs = parameters([(5,), (40,)]), parameters([(5,), (40,)])
    a = case.make(mine, **options)
    assert a._step_supports_amp_scaling
    b = Separately(case, theirs, options, case.make)
    scalers = [torch.amp.GradScaler("cpu", init_scale=3.0 * 2**9, growth_interval=3) for _ in range(2)]
    for step in range(8):
        for params, optimizer, scaler in zip((mine, theirs), (a, b.optimizer), scalers, strict=True):
            for i, p in enumerate(params):
                g = torch.Generator().manual_seed(10 * step + i)
                loss = (p * torch.randn(p.shape, generator=g)).sum()
                scaler.scale(loss).backward()
            if step in (0, 4):
                params[1].grad[7] = math.inf
            if optimizer is a and in_step:
                scaler.step(a)
            else:
                scaler.unscale_(optimizer)
                if optimizer is a:
                    scaler.step(a)
                elif step not in (0, 4):
                    b.step()
            scaler.update()
            if optimizer is not a:
                optimizer.zero_grad(set_to_none=False)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same(a, b)


def test_options_switched_on_in_mid_training() -> None:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    case = BY_NAME["adamw"]
    a, b = case.make(mine), case.make(theirs, backend="reference")
    for step in range(8):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for o in (a, b):
            group = o.param_groups[0]
            group["max_grad_norm"] = {2: 0.1, 3: 0.1, 5: math.inf}.get(step)
            group["clip_grad_value"] = 0.01 if step in (3, 4) else None
            group["ema_decay"] = 0.8 if step >= 4 and step != 6 else None
        a.step()
        b.step()
        assert (a.last_grad_norm is None) == (step not in (2, 3, 5))
    assert_same_optimizers(a, b)

"""The CUDA and Triton kernels on a GPU: bits, launches, graphs, streams, sizes. ``pytest -m gpu``."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    EVERY,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    gradient,
    parameters,
    set_gradients,
)
from gpu import DTYPES, backend, kernels_of, on_gpu, pair, set_both, steady
from layouts import LAYOUTS

import fusedoptim

pytestmark = pytest.mark.gpu
__all__ = ["backend"]  # a fixture, which every test here uses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(backend: str, case: Case, dtype: torch.dtype) -> None:
    mine, theirs, a, b = pair(backend, case, [*SHAPES, (70_001,)], dtype)
    for step in range(50):
        if dtype != torch.float32 and step == 10:
            break
        set_both(mine, theirs, step)
        a.step()
        b.step()
        if step in (0, 1):
            assert_same_optimizers(a, b)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_layouts(backend: str, case: Case, dtype: torch.dtype) -> None:
    shapes = [(4, 3, 5, 6), (2, 8, 17, 9), (1, 3, 1, 700)]
    combinations = [(p, g, s) for p in LAYOUTS for g in LAYOUTS for s in shapes]
    values = [gradient(torch.empty(s), 99, i).to(dtype) for i, (_, _, s) in enumerate(combinations)]
    theirs = [torch.nn.Parameter(x.clone()) for x in values]
    mine = [
        torch.nn.Parameter(LAYOUTS[layout](x.cuda())) for x, (layout, _, _) in zip(values, combinations, strict=True)
    ]
    a, b = case.make(mine, backend=backend), case.make(theirs, backend="cpu")
    for step in range(3):
        set_gradients(theirs, step)
        for p, q, (_, layout, _) in zip(mine, theirs, combinations, strict=True):
            p.grad = LAYOUTS[layout](q.grad.cuda())
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_large_tensors(backend: str, case: Case) -> None:
    mine, theirs, a, b = pair(backend, case, [(5_000_011,), (16_385,), (1_234_567,)], torch.float32)
    for step in range(3):
        set_both(mine, theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "rmsprop_all", "adagrad", "norm_adaptive"])
def test_one_launch(backend: str, name: str) -> None:
    case = BY_NAME[name]
    for shapes, groups, dtypes in (
        ([(300,)] * 300, 1, DTYPES[:1]),
        ([(300,)] * 300, 1, [torch.float32, torch.bfloat16, torch.float16]),
        ([(64,)] * 465, 465, DTYPES[:1]),
        ([(1 + i % 50,) for i in range(5000)], 1, DTYPES[:1]),
        ([(1 + i % 50,) for i in range(10_000)], 3, DTYPES[:1]),
    ):
        theirs = [p for i, s in enumerate(shapes) for p in parameters([s], dtypes[i % len(dtypes)])]
        params = on_gpu(theirs)
        set_both(params, theirs, 0)
        optimizer = case.make([{"params": params[i::groups]} for i in range(groups)], backend=backend)
        steady(optimizer)
        assert len(kernels_of(optimizer.step)) == 1, (len(shapes), groups)


def test_fp64_takes_a_second_launch(backend: str) -> None:
    params = on_gpu([*parameters([(30,)] * 3), *parameters([(30,)] * 3, torch.float64)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedoptim.AdamW(params, backend=backend)
    steady(optimizer)
    assert len(kernels_of(optimizer.step)) == 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "norm_adaptive"])
def test_beyond_two_to_the_32_elements(backend: str, name: str) -> None:
    """The ends of one tensor, against a small tensor with the same elements."""
    n, edge = (1 << 32) + 3, 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 5 * 2 * n:
        pytest.skip("needs 43 GB of free memory")
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    small = torch.nn.Parameter(torch.zeros(2 * edge, dtype=torch.bfloat16, device="cuda"))
    values = torch.randn(2, 2 * edge, device="cuda").bfloat16()
    small.data.copy_(values[0])
    small.grad = values[1].clone()
    for target, source in ((p.data, values[0]), (p.grad, values[1])):
        target[:edge] = source[:edge]
        target[-edge:] = source[edge:]
    optimizers = [BY_NAME[name].make([x], backend=backend) for x in (p, small)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(p.data[:edge], small.data[:edge])
    assert_same_bits(p.data[-edge:], small.data[edge:])
    assert not p.data[edge : n - edge].any()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_grad_scaler(backend: str, case: Case) -> None:
    """Overflow on the first step and later; the kernel unscales and skips."""
    mine, theirs, a, b = pair(backend, case, [(50,), (20_000,)], torch.float32, amp_in_step=True)
    b._step_supports_amp_scaling = False  # the scaler itself unscales and skips
    scalers = [torch.amp.GradScaler(d, init_scale=1024.0, growth_interval=3) for d in ("cuda", "cpu")]
    for step in range(10):
        for params, optimizer, scaler in ((mine, a, scalers[0]), (theirs, b, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(torch.zeros((), device=params[0].device))
            for i, p in enumerate(params):
                p.grad = (gradient(torch.empty(p.shape), step, i) * scaler.get_scale()).to(p.device)
                if step in (0, 4):
                    p.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_new_memory_takes_effect_at_once(backend: str, case: Case) -> None:
    mine, theirs, a, b = pair(backend, case, [(500,), (33,)], torch.float32)
    for step in range(6):
        set_both(mine, theirs, step)
        if step == 2:
            mine[0].data = mine[0].data.clone()
        if step == 3:
            for p in mine:
                a.state[p] = {k: v.clone() for k, v in a.state[p].items()}
        if step == 4:
            a.load_state_dict(copy.deepcopy(a.state_dict()))
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", [c for c in EVERY if c.optimizer in ("Adam", "AdamW", "SGD", "Adagrad")], ids=str)
def test_a_state_dict_of_torchs_fused_optimizer(backend: str, case: Case) -> None:
    params = on_gpu(parameters([(50,), (7, 3)]))
    for p in params:
        p.grad = torch.ones_like(p)
    theirs = case.make_torch(params, fused=case.optimizer != "Adagrad")
    theirs.step()
    mine = case.make(params, backend=backend)
    mine.load_state_dict(theirs.state_dict())
    mine.step()
    theirs.load_state_dict(mine.state_dict())
    theirs.step()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_default_backend_is_cuda(backend: str) -> None:
    params = on_gpu(parameters([(5,)]))
    params[0].grad = torch.ones_like(params[0])
    optimizer = fusedoptim.AdamW(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert type(optimizer._runners[0]).__name__ == "GpuRunner"
    assert optimizer.state[params[0]]["step"].is_cuda


# Last, so that bits come first where a GPU is at hand for minutes.
from stream_tests import *  # noqa: E402, F403

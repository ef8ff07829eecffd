"""clip_grad_norm_ and clip_grad_value_ against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CAPABILITIES, SHAPES, assert_same_bits, gradient, parameters, set_gradients

import fusedoptim
from fusedoptim import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = [None, "reference"]


def exact_norm(params: list) -> float:
    return math.sqrt(math.fsum(x * x for p in params for x in p.grad.double().flatten().tolist()))


@pytest.mark.parametrize("max_norm", [0.3, 1e9, math.inf, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_scales_as_torch_does_with_the_same_norm(backend: str | None, dtype: torch.dtype, max_norm: float) -> None:
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    expected = exact_norm(mine)
    versions = [p.grad._version for p in mine]
    norm = fusedoptim.clip_grad_norm_(mine, max_norm, backend=backend)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norm.shape == ()
    assert norm.item() == pytest.approx(expected, rel=1e-15 if dtype == torch.float64 else 6e-8)
    torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, norm)
    for p, q, version in zip(mine, theirs, versions, strict=True):
        assert_same_bits(p.grad, q.grad)
        assert p.grad._version > version or max_norm == math.inf


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_norm_is_the_references(capability: str) -> None:
    assert fusedoptim._native._C.set_cpu_capability(capability)
    for dtypes in (DTYPES, DTYPES[:1], DTYPES[2:]):
        params = [p for d in dtypes for p in parameters([*SHAPES, (70_001,)], d)]
        set_gradients(params, 1)
        wide = [p.grad.double() if p.dtype == torch.float64 else p.grad.float() for p in params]
        assert_same_bits(fusedoptim.clip_grad_norm_(params, math.inf), reference.global_norm(wide))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_no_finite_norm(backend: str | None) -> None:
    for bad in (math.inf, math.nan):
        mine, theirs = parameters(SHAPES), parameters(SHAPES)
        for params in (mine, theirs):
            set_gradients(params, 0)
            params[9].grad[1, 1, 1] = bad
        with pytest.raises(RuntimeError, match="non-finite"):
            fusedoptim.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True, backend=backend)
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.grad, q.grad)
        norm = fusedoptim.clip_grad_norm_(mine, 1.0, backend=backend)
        assert_same_bits(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.grad, q.grad)


@pytest.mark.parametrize("value", [0.01, 0.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_by_value(backend: str | None, dtype: torch.dtype, value: float) -> None:
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    for params in (mine, theirs):
        set_gradients(params, 0)
        params[7].grad[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    fusedoptim.clip_grad_value_(mine, value, backend=backend)
    torch.nn.utils.clip_grad_value_(theirs, value)
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p.grad, q.grad)


@pytest.mark.parametrize("norm_type", [math.inf, 1.0, 3.5, "inf"])
def test_other_norms_are_torchs(norm_type: float) -> None:
    mine, theirs = parameters(SHAPES[2:]), parameters(SHAPES[2:])
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    a = fusedoptim.clip_grad_norm_(mine, 0.1, norm_type)
    assert_same_bits(a, torch.nn.utils.clip_grad_norm_(theirs, 0.1, norm_type))
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p.grad, q.grad)


def test_any_memory_layout() -> None:
    plain = parameters([(40, 30, 20)] * 3)
    others = parameters([(40, 30, 20)] * 3)
    set_gradients(plain, 0)
    others[0].grad = plain[0].grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    others[1].grad = torch.zeros(40, 30, 60)[:, :, ::3].copy_(plain[1].grad)
    others[2].grad = plain[2].grad[:1, :1, :1].clone().expand(40, 30, 20).clone()
    plain[2].grad = others[2].grad.clone()
    rest = others[1].grad._base.clone()
    a = fusedoptim.clip_grad_norm_(plain, 0.2)
    assert_same_bits(a, fusedoptim.clip_grad_norm_(others, 0.2))
    for p, q in zip(plain, others, strict=True):
        assert_same_bits(p.grad, q.grad)
    rest[:, :, ::3] = others[1].grad
    assert_same_bits(others[1].grad._base, rest)  # nothing between the elements was touched


def test_what_parameters_may_be() -> None:
    p = parameters([(5,)])[0]
    assert fusedoptim.clip_grad_norm_([p], 1.0).item() == 0.0
    assert fusedoptim.clip_grad_norm_([], 1.0).item() == 0.0
    fusedoptim.clip_grad_value_([p], 1.0)
    p.grad = gradient(p, 0, 0)
    norm = fusedoptim.clip_grad_norm_(iter([p]), 0.1)
    assert norm > 0.1
    assert fusedoptim.clip_grad_norm_(p, math.inf).item() == pytest.approx(0.1, rel=1e-4)
    twice = [p, p]
    assert fusedoptim.clip_grad_norm_(twice, math.inf).item() == pytest.approx(0.1 * math.sqrt(2), rel=1e-4)


def test_gradients_that_share_memory_are_torchs() -> None:
    p, q = parameters([(2000,), (2000,)])
    p.grad = torch.ones(1).expand(2000)
    with pytest.raises(RuntimeError, match="single memory location"):
        fusedoptim.clip_grad_norm_([p], 1.0)
    memory = torch.ones(3000)
    p.grad, q.grad = memory[:2000], memory[1000:]
    fusedoptim.clip_grad_value_([p, q], 0.5)
    assert torch.equal(memory, torch.full((3000,), 0.5))


@pytest.mark.parametrize("max_norm", [math.nan, -1.0])
def test_odd_limits_are_torchs(max_norm: float) -> None:
    p, q = parameters([(5,), (5,)])
    p.grad, q.grad = torch.ones(5), torch.ones(5)
    assert_same_bits(fusedoptim.clip_grad_norm_(p, max_norm), torch.nn.utils.clip_grad_norm_(q, max_norm))
    assert_same_bits(p.grad, q.grad)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_within_a_compiled_function() -> None:
    p = parameters([(5,)])[0]
    p.grad = torch.full((5,), 3.0)
    norm = torch.compile(lambda: fusedoptim.clip_grad_norm_([p], 1.0), fullgraph=True, backend="eager")()
    torch.testing.assert_close(norm.item(), 45.0**0.5)
    torch.testing.assert_close(p.grad.norm().item(), 1.0)


def test_sparse_and_complex_gradients_are_torchs() -> None:
    p, q = torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64)
    p.grad = torch.tensor([3 + 4j, 0, 0], dtype=torch.complex64)
    q.grad = p.grad.clone()
    assert fusedoptim.clip_grad_norm_(p, 1.0).item() == torch.nn.utils.clip_grad_norm_(q, 1.0).item() == 5.0
    assert torch.equal(p.grad, q.grad)

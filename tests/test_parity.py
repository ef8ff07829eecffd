"""Bit equality: with torch.optim's own code, between backends, instruction sets, thread counts and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from cases import (
    BY_NAME,
    CAPABILITIES,
    CASES,
    EVERY,
    FULL,
    IN_TORCH,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    force_grad,
    parameters,
    set_gradients,
)

from benchmarks.witness import ieee_sqrt
from fusedoptim import _native

STEPS = 100
BACKENDS = ["cpu", "reference"]


def schedule(step: int, lr: float) -> float:
    return lr * (1.0 if step < 20 else 0.1 + 0.9 * (STEPS - step) / STEPS)


def run_against_torch(
    case: Case, dtype: torch.dtype, backends: Sequence[str], steps: int, shapes: list, tensor_lr: object = None
) -> None:
    """One witness for all backends, of which each has parameters and gradients of its own."""
    backends = [backend for backend in backends if case.runs_on(backend)] or backends
    every = [parameters(shapes, dtype) for _ in (*backends, "torch")]
    mine = [case.make(params, backend=backend) for params, backend in zip(every, backends, strict=False)]
    witness = case.make_torch(every[-1], foreach=False)
    base = mine[0].defaults["lr"]
    if tensor_lr is not None:
        for o in (*mine, witness):
            o.param_groups[0]["lr"] = torch.tensor(base, dtype=tensor_lr)
    for step in range(steps):
        for params in every:
            set_gradients(params, step)
        for o in (*mine, witness):
            if tensor_lr is not None:
                o.param_groups[0]["lr"].fill_(schedule(step, base))
            else:
                o.param_groups[0]["lr"] = schedule(step, base)
        for o in mine:
            o.step()
        with ieee_sqrt():
            witness.step()
        if step in (0, 1, steps - 1):
            for o, backend in zip(mine, backends, strict=True):
                assert_same_optimizers(o, witness, f"{backend}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_equals_torch_for_loop(case: Case, dtype: torch.dtype) -> None:
    """For a while in all shapes; a schedule to its end in one."""
    run_against_torch(case, dtype, BACKENDS, 30, SHAPES)
    run_against_torch(case, dtype, BACKENDS, STEPS, [(33,)])


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in EVERY if c.in_torch] + [BY_NAME["adamw"], BY_NAME["rmsprop"]], ids=str)
def test_equals_torch_with_a_tensor_lr(case: Case, dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    run_against_torch(case, dtype, BACKENDS, 12, SHAPES[-4:], tensor_lr=lr_dtype)


@pytest.mark.parametrize("case", [c for c in EVERY if c.in_torch], ids=str)
def test_equals_torch_on_large_tensors(case: Case) -> None:
    run_against_torch(case, torch.float32, ["cpu"], 3, [(3_000_017,), (1_000_003,), (129, 1031)])


# torch's fused kernels take the scalar path for what is left of each thread's share after whole vectors, and round
# differently there; a tensor of whole vectors per thread has no such tail. Its Adagrad computes 1 + (step-1)*lr_decay
# as an fma, unlike its eager code: in fp64 up to 0.5 % of the elements then differ in the last place, at the steps
# where that product is inexact.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [c for c in IN_TORCH if not c.own and c.optimizer != "RMSprop" and not c.options.get("decoupled_weight_decay")],
    ids=str,
)
def test_equals_untouched_torch_fused(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and case.options.get("lr_decay"):
        pytest.skip("torch's fused Adagrad contracts its lr's denominator")
    shapes = [(64,), (128, 128), (1 << 20,)]
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    a, b = case.make(mine), case.make_torch(theirs, fused=True)
    for step in range(10):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def runs_here(case: Case, dtype: torch.dtype, capability: str) -> bool:
    """A function is compiled anew for each: what it may use has all bits in test_rule_operations.py, and its loops are
    those of the other rules. So all rows meet the best instruction set, and one of each kind the others."""
    best = capability == CAPABILITIES[0]
    wide = dtype in (torch.float32, torch.float64)
    return not case.own or (best and (wide or case in EVERY)) or (case in FULL and dtype == torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype", "capability"),
    [
        pytest.param(case, dtype, capability, id=f"{case}-{dtype}-{capability}")
        for case in CASES
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for capability in CAPABILITIES
        if runs_here(case, dtype, capability)
    ],
)
def test_equals_reference_on_every_instruction_set(case: Case, dtype: torch.dtype, capability: str) -> None:
    assert _native._C.set_cpu_capability(capability)
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a, b = case.make(mine, backend="cpu"), case.make(theirs, backend="reference")
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_thread_count_changes_nothing(case: Case) -> None:
    shapes = [*SHAPES, (300_001,), (70_000,)] + [(5,)] * 400
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        params = parameters(shapes)
        o = case.make(params, backend="cpu")
        for step in range(3):
            set_gradients(params, step)
            o.step()
        results.append(o)
    for other in results[1:]:
        assert_same_optimizers(results[0], other)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rounded_witness_step(
    params: list[torch.Tensor],
    work: list[torch.nn.Parameter],
    o: torch.optim.Optimizer,
    state_dtype: torch.dtype | None,
    kept: Sequence[str] = ("step",),
) -> None:
    """One step of torch.optim on fp32 copies, then one rounding of parameters and states: what 16 bits are to give."""
    for p, w in zip(params, work, strict=True):
        w.grad = p.grad.to(w.dtype)
    with ieee_sqrt():
        o.step()
    for p, w in zip(params, work, strict=True):
        w.data.copy_(w.data.to(p.dtype))
        for name, s in o.state[w].items():
            if name not in kept and s is not None:
                s.copy_(s.to(state_dtype or p.dtype))


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("adamw", "sgd_dampening", "rmsprop_all", "adagrad_all")], ids=str
)
def test_mixed_dtypes_round_once(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype | None, state_dtype: torch.dtype | None
) -> None:
    shapes = [(1025,), (33,), (7, 11)]
    mine = parameters(shapes, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    work = [torch.nn.Parameter(p.detach().to(compute, copy=True)) for p in mine]
    a, b = case.make(mine, state_dtype=state_dtype, rounding="nearest"), case.make_torch(work, foreach=False)
    for step in range(10):
        set_gradients(mine, step)
        grads = [p.grad.to(grad_dtype) if grad_dtype else p.grad for p in mine]
        for p, g in zip(mine, grads, strict=True):
            p.grad = None
            force_grad(p, g)
        a.step()
        rounded_witness_step(mine, work, b, state_dtype)
    for p, w in zip(mine, work, strict=True):
        assert_same_bits(p.detach(), w.detach().to(dtype), "parameter")
        for name, s in a.state[p].items():
            if name != "step":
                assert s.dtype == (state_dtype or dtype)
                assert_same_bits(s, b.state[w][name].to(s.dtype), name)


def test_dtypes_mixed_in_one_group() -> None:
    def build() -> list[torch.nn.Parameter]:
        return [q for i, d in enumerate(DTYPES) for q in parameters([(100,), (3, 5)], d, seed=i)]

    together, apart = build(), build()
    a = BY_NAME["adamw"].make(together)
    alone = [BY_NAME["adamw"].make([p]) for p in apart]
    for step in range(5):
        set_gradients(together, step)
        set_gradients(apart, step)
        a.step()
        for o in alone:
            o.step()
    for p, q in zip(together, apart, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_not_a_number_and_infinity_pass_through(case: Case) -> None:
    mine, theirs = parameters([(40,)]), parameters([(40,)])
    a, b = case.make(mine, backend="cpu"), case.make(theirs, backend="reference")
    for step in range(3):
        for p in (mine[0], theirs[0]):
            set_gradients([p], step)
            p.grad[3], p.grad[17], p.grad[39] = torch.nan, torch.inf, -torch.inf
        a.step()
        b.step()
        assert_same_optimizers(copy.copy(a), copy.copy(b))


@pytest.mark.parametrize("case", [c for c in EVERY if c.in_torch and not c.cls.rule.numbers], ids=str)
def test_default_dtype_double_counts_steps_in_double(case: Case) -> None:
    """Other states that are one number have fp32 then, too, unlike torch's."""
    torch.set_default_dtype(torch.float64)
    try:
        run_against_torch(case, torch.float64, BACKENDS, 3, [(17,)])
    finally:
        torch.set_default_dtype(torch.float32)


def test_ieee_root_is_correctly_rounded() -> None:
    numpy = pytest.importorskip("numpy")
    from fusedoptim.reference import correctly_rounded_sqrt

    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7FF0_0000_0000_0000, (1_000_000,), generator=g, dtype=torch.int64)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, torch.nan, -1.0, 5e-324, 2.0**-1022, 1.0, 4.0, 1.7976931348623157e308]
    )
    x = torch.cat([bits.view(torch.float64), special.double()])
    with numpy.errstate(invalid="ignore"):
        expected = torch.from_numpy(numpy.sqrt(x.numpy()))
        single = torch.from_numpy(numpy.sqrt(x.float().numpy()))
    assert_same_bits(correctly_rounded_sqrt(x), expected)
    assert_same_bits(correctly_rounded_sqrt(x.float()), single)

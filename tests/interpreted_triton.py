"""Triton's kernels in its interpreter, on the CPU. Run with TRITON_INTERPRET=1, which has to be set before anything
imports Triton; test_triton.py does so in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME, FULL, Case, assert_same_optimizers, gradient, parameters, set_gradients
from device import pair
from device_memory_tests import *  # noqa: F403
from device_option_tests import *  # noqa: F403
from device_tests import *  # noqa: F403
from low_precision_tests import *  # noqa: F403
from number_tests import *  # noqa: F403
from parts_tests import *  # noqa: F403
from storage_tests import *  # noqa: F403
from triton_power_tests import *  # noqa: F403
from triton_program_tests import *  # noqa: F403
from triton_sum_tests import *  # noqa: F403

from fusedoptim import FusedOptimizer, Rule, State, _backends, _members, _native, _prepare
from fusedoptim._native_runner import GpuRunner
from fusedoptim._random_places import Place
from fusedoptim._reference_runner import ReferenceRunner
from fusedoptim.triton_kernels import kernels as code
from fusedoptim.triton_kernels.arithmetic import hyper, lr_value, spread
from fusedoptim.triton_kernels.device import RuleFunctions, TritonDevice

assert os.environ["TRITON_INTERPRET"] == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and overflow


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Any, b: Any) -> tuple[Any, Any]:
    def split(x: Any) -> tuple[Any, Any]:
        c = 134217729.0 * x
        high = c - (c - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def sum_to_odd(a: Any, b: Any) -> Any:
    """a + b rounded to odd: if inexact, to the neighbour whose last bit is 1."""
    s, e = two_sum(a, b)
    bits = np.ascontiguousarray(s).view(np.int64)
    outwards = (e > 0) == (s > 0)
    moved = np.where(outwards, bits + 1, bits - 1).view(np.float64)
    return np.where((e != 0) & (bits % 2 == 0) & np.isfinite(s), moved, s)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a*b + c rounded once (Boldo and Melquiond, 2008), which interpreters before 3.9 do not do."""
    with np.errstate(all="ignore"):
        x, y, z = (np.asarray(t, np.float64) for t in (a, b, c))
        if a.dtype == np.float32:
            return np.where(np.isfinite(x * y + z), sum_to_odd(x * y, z), x * y + z).astype(np.float32)
        uh, ul = two_product(x, y)
        th, tl = two_sum(z, ul)
        vh, vl = two_sum(uh, th)
        exact = vh + sum_to_odd(tl, vl)
        return np.where(np.isfinite(exact), exact, x * y + z)


class Interpreted:
    backend, slow = "triton", True

    def __init__(self) -> None:
        self.count = 0

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        before = self.count
        optimizer.step()
        return self.count - before


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter replaces the language's functions before a kernel and, which takes two thirds of its time, before
    every function that the kernel calls: here only in modules where they are not replaced yet."""
    from triton import language
    from triton.runtime import interpreter

    patch, languages = interpreter._patch_lang, (language, language.core)
    used: dict[Any, set[int]] = {}  # modules, by function
    replaced: list[tuple[set[int], Any]] = []  # of the kernel that runs: modules, and how to undo it

    def once(function: Any) -> Any:
        if function not in used:
            used[function] = {id(m) for m in languages if any(value is m for value in function.__globals__.values())}
        modules = used[function]
        if replaced and modules <= set().union(*(done for done, _ in replaced)):
            return None
        scope = patch(function)
        replaced.append((modules, scope.restore))
        if len(replaced) == 1:  # the kernel's own, which the interpreter restores in the end
            scope.restore = restore
        return scope

    def restore() -> None:
        while replaced:
            replaced.pop()[1]()

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def remember_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter makes a dict of all dtypes to look one up, for every operation: a tenth of its time."""
    from triton.runtime import interpreter

    find, known = interpreter._get_np_dtype, {}

    def found(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", found)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    """Counts the launches of every kernel there is."""
    from triton.runtime import interpreter

    found = Interpreted()
    run = interpreter.InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.count += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    if hasattr(interpreter, "_LangPatchScope"):
        patch_once(monkeypatch)
    remember_dtypes(monkeypatch)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):

        def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
            return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    assert isinstance(code.step_kernel, interpreter.InterpretedFunction)
    yield found


def test_the_stand_in_for_fma_is_exact() -> None:
    from fractions import Fraction

    draw = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        a, b, c = (draw.standard_normal(2000).astype(dtype) * 10.0 ** draw.integers(-8, 8, 2000) for _ in range(3))
        a, b, c = (x.astype(dtype) for x in (a, b, c))
        c[:1000] = -(a * b)[:1000]
        exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
        got = fma(a, b, c)
        for value, result in zip(exact, got, strict=True):
            below, above = np.nextafter(result, dtype(-np.inf)), np.nextafter(result, dtype(np.inf))
            error = abs(Fraction(float(result)) - value)
            assert error <= abs(Fraction(float(below)) - value) and error <= abs(Fraction(float(above)) - value)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_memory_orders(kernels: Interpreted, case: Case) -> None:
    shapes = [(7, 11), (2, 3, 5), (40, 60)]
    mine, theirs, a, b = pair(kernels, case, shapes, torch.float32)
    for p, q in zip(mine, theirs, strict=True):
        for t in (p, q):
            t.data = t.data.transpose(0, -1).contiguous().transpose(0, -1)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for p, q in zip(mine, theirs, strict=True):
            if step == 1:
                p.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
            if step == 2:
                p.grad = p.grad[..., :1].expand(p.shape)
                q.grad = p.grad.contiguous()
        assert kernels.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


#: Where a shard's first element, or element of a row, is in the whole tensor, and the strides there.
PLACES = [
    Place(2**64 - 3, 2**32 - 500, None),  # the counter's upper half changes within a tile
    Place(1, 3 * 2**32 - 1, None),
    Place(2**63, 2**40 + 12_345, None),
    Place(7, 2**32 - 1_100, (5_001, 1_000, 1)),
]


def test_random_bits_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the index, the parameter, the seed and the step; where elements are in a tile, a piece or a block."""
    monkeypatch.setattr(_members, "place_of", lambda p, its_id: PLACES[its_id % len(PLACES)])
    found = []
    for backend in ("triton", "cpu"):
        shapes = [(1_100,)] * 3 + [(3, 2, 40)]
        options = {"rounding": "stochastic", "rounding_seed": 2**53 - 1, "state_dtype": "int8"}
        params = parameters(shapes, torch.bfloat16) + parameters([(4, 1, 1_024)] * 2 + [(3, 1_370)], torch.bfloat16)
        found.append(BY_NAME["adamw"].make(params, backend=backend, **options))
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            found[-1].step()
            for state in found[-1].state.values():
                state["step"] += 2**23
    assert_same_optimizers(*found)


def test_a_step_that_cannot_be_launched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedoptim.triton_kernels import device

    params = parameters([(5,), (40,)])
    before = [p.detach().clone() for p in params]
    optimizer = FULL[1].make(params, backend="triton")
    set_gradients(params, 0)

    def fails(*args: object) -> None:
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(device, "kernel_for", fails)
    with pytest.raises(RuntimeError, match="no compiler today"):
        optimizer.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True)) and not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(params[0].detach(), before[0])


# ---- a rule that is written by hand ----


@triton.jit
def fading_numbers(row, inputs, VARIANT: tl.constexpr):
    return (inputs[4] * hyper(row, 6),)


@triton.jit
def fading_scalars(row, inputs, T: tl.constexpr, VARIANT: tl.constexpr):
    length = fading_numbers(row, inputs, VARIANT)[0] * lr_value(row)
    if VARIANT == 14:
        length = length * 2.0
    return ((length / inputs[7] * -1.0).to(T),)


@triton.jit
def fading_update(p, g, s, c, VARIANT: tl.constexpr):
    return tl.fma(spread(c[0], g), g, p), s


def fading(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    s["length"] = length = s["length"] * h["fade"]
    p.add_(g, alpha=-(length * h["lr"] * (2.0 if h["twice"] else 1.0) / p.numel()))


class Fading(FusedOptimizer):
    rule = Rule("fading", fading, numbers=(State("length", initial=1.0),), has_step=False)

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, "fade": 0.5, "twice": False}, options)


def test_functions_that_are_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a number, which the last program of a tensor writes, and a variant of its own for some groups."""
    twice = [("column", 7.0)]
    rest = [([("constant", 0.0)], 0, 0, [])] * 14
    handle = _native._C.RuleHandle(
        "fading", ["fade", "twice"], [], ["length"], False, 0, False, -1, [*rest, (twice, 0, 0, []), ([], 0, 0, [])]
    )
    functions = RuleFunctions(fading_scalars, fading_update, fading_numbers)

    def make_runner(backend: str, rule: Any, device: torch.device, settings: Any) -> Any:
        if backend == "reference":
            return ReferenceRunner(rule, settings)
        return GpuRunner(rule, settings, device, TritonDevice(device, functions), handle)

    monkeypatch.setattr(_backends, "is_own", lambda rule: False)
    monkeypatch.setattr(_prepare, "make_runner", make_runner)
    found = []
    for backend in ("triton", "reference"):
        params = parameters([(5,), (70_001,), (33, 7)])
        found.append((params, Fading([{"params": params[:2]}, {"params": params[2:], "twice": True}], backend=backend)))
    for step in range(3):
        for params, optimizer in found:
            set_gradients(params, step)
            optimizer.step()
    assert_same_optimizers(found[0][1], found[1][1])

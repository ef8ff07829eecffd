"""The CUDA kernels, compiled for the host and run there: the same sources, the same tables, the reference's bits."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    FULL,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    gradient,
    parameters,
    set_gradients,
)
from cuda_host import ROOT, SANITIZE, build
from test_amp import train

import fusedoptim
from fusedoptim import _native

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or _native._C is None, reason="needs g++ and the library")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Model:
    """What the library tells and takes beyond the optimizers' own interface."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.cuda_on_host_launches.restype = ctypes.c_int64
        self.set_capturing = library.cuda_on_host_set_capturing
        self.only_blocks = library.cuda_on_host_only_blocks
        self.count = library.cuda_on_host_launches

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        before = self.count()
        optimizer.step()
        return int(self.count() - before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = build(tmp_path_factory.mktemp("cuda") / "host.so")
    before = os.environ.get("FUSEDOPTIM_CUDA_LIBRARY")
    os.environ["FUSEDOPTIM_CUDA_LIBRARY"] = str(path)
    _native.cuda_problem.cache_clear()
    assert _native.cuda_problem() is None
    yield Model(path)
    assert _native._C is not None
    _native._C.set_cuda_api(0)
    _native.cuda_problem.cache_clear()
    if before is None:
        del os.environ["FUSEDOPTIM_CUDA_LIBRARY"]
    else:
        os.environ["FUSEDOPTIM_CUDA_LIBRARY"] = before


def pair(case: Case, shapes: list, dtype: torch.dtype, **options: object) -> tuple[list, list, object, object]:
    mine, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    return mine, theirs, case.make(mine, backend="cuda", **options), case.make(theirs, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(model: Model, case: Case, dtype: torch.dtype) -> None:
    mine, theirs, a, b = pair(case, SHAPES, dtype)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert model.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_mixed_dtypes_take_one_launch_and_fp64_a_second(model: Model, case: Case) -> None:
    for dtypes, expected in ((DTYPES[2:] + DTYPES[:1], 1), (DTYPES, 2)):
        both = []
        for backend in ("cuda", "cpu"):
            params = [p for d in dtypes for p in parameters([(5,), (300,), (33, 40)], d)]
            both.append((params, case.make(params, backend=backend)))
        (mine, a), (theirs, b) = both
        for step in range(4):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                # the gradient's dtype goes round as well
                p.grad, q.grad = (torch.nn.Parameter(gradient(x, step, i)).detach() for x in (p, q))
                if step > 1 and expected == 2:
                    p.grad = torch.Tensor.clone(p.grad)
            assert model.launches(a) == expected
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_state_dtype(model: Model, case: Case, dtype: torch.dtype) -> None:
    if case.optimizer == "NormAdaptive":
        pytest.skip("has no state of the parameter's shape")
    for state_dtype in (torch.float32, torch.bfloat16):
        mine, theirs, a, b = pair(case, [(9,), (1500,)], dtype, state_dtype=state_dtype)
        for step in range(4):
            set_gradients(mine, step)
            set_gradients(theirs, step)
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_alignment(model: Model, case: Case) -> None:
    """Heads of every length; operands that agree in their alignment and that do not."""

    def at(x: torch.Tensor, offset: int) -> torch.Tensor:
        return torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:].copy_(x)

    for dtype in (torch.float32, torch.bfloat16):
        offsets = [(p, g) for p in range(9) for g in (p, 0, p + 1)]
        mine = [
            torch.nn.Parameter(at(gradient(torch.empty(2100), 9, i).to(dtype), p)) for i, (p, _) in enumerate(offsets)
        ]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
        a, b = case.make(mine, backend="cuda"), case.make(theirs, backend="cpu")
        for step in range(3):
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                q.grad = gradient(q, step, i)
                p.grad = at(q.grad, offsets[i][1])
            a.step()
            b.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("count", [(1 << 14) + 1, 100_003, (1 << 20) + 5, 2_200_000])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_tensors_are_cut_into_chunks_and_parts(model: Model, case: Case, count: int) -> None:
    """Above 1,048,576 elements a sum of squares has a third level."""
    if count > 1 << 20 and case.optimizer != "NormAdaptive":
        count //= 8
    mine, theirs, a, b = pair(case, [(count,), (17,), (count // 3,)], torch.float32)
    for step in range(2):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert model.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer in ("AdamW", "SGD")], ids=str)
def test_more_gradients_than_fit_the_arguments(model: Model, case: Case) -> None:
    shapes = [(1 + i % 3,) for i in range(4200)]
    mine, theirs, a, b = pair(case, shapes, torch.float32)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert model.launches(a) == 1
        b.step()
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_more_groups_than_fit_the_arguments(model: Model, case: Case) -> None:
    both = []
    for backend in ("cuda", "cpu"):
        params = parameters([(7,)] * 465)
        groups = [{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)]
        both.append((params, case.make(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for i in range(465):
            a.param_groups[i]["lr"] = b.param_groups[i]["lr"] = 1e-3 * (1 + (i + step) % 7)
        assert model.launches(a) == 1
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_without_gradients_and_late_ones(model: Model, case: Case) -> None:
    mine, theirs, a, b = pair(case, [(5,), (40_000,), (33,)], torch.float32)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[step % 3].grad = theirs[step % 3].grad = None
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_lr_is_read_from_the_device(model: Model, case: Case, lr_dtype: torch.dtype) -> None:
    """By its address: here the device's memory is the host's."""
    mine, theirs, a, b = pair(case, [(50,), (3,)], torch.float32, lr=torch.tensor(0.01, dtype=lr_dtype))
    for step in range(4):
        for o in (a, b):
            o.param_groups[0]["lr"].fill_(0.01 / (step + 1))
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def test_the_first_step_cannot_be_captured_and_leaves_nothing(model: Model) -> None:
    params = parameters([(5,)])
    optimizer = fusedoptim.AdamW(params, backend="cuda")
    set_gradients(params, 0)
    before = params[0].detach().clone()
    model.set_capturing(1)
    try:
        with pytest.raises(RuntimeError, match="take a step before"):
            optimizer.step()
    finally:
        model.set_capturing(0)
    assert_same_bits(params[0].detach(), before)
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 1


def test_a_captured_step_has_tables_of_its_own(model: Model) -> None:
    """4,200 gradients and 465 groups do not fit the arguments: while capturing, kernels write them."""
    params = parameters([(3,)] * 4200)
    groups = [{"params": params[i::465]} for i in range(465)]
    optimizer = fusedoptim.AdamW(groups, backend="cuda")
    others = parameters([(3,)] * 4200)
    expected = fusedoptim.AdamW([{"params": others[i::465]} for i in range(465)], backend="cpu")
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        model.set_capturing(int(step == 1))
        try:
            launches = model.launches(optimizer)
        finally:
            model.set_capturing(0)
        assert launches == (1 if step != 1 else 1 + 2 + 2)  # 33 KB of gradients and 37 KB of rows
        expected.step()
    assert optimizer._runners is not None and optimizer._runners[0].captured
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())
    optimizer.add_param_group({"params": parameters([(2,)])})
    optimizer.step()
    assert len(optimizer._captured) == 1


@pytest.mark.parametrize("name", ["SGD", "NormAdaptive"])
def test_beyond_two_to_the_32_elements(model: Model, name: str) -> None:
    """Nothing is allocated: of the tensors, only the pages of the blocks that run."""
    n = (1 << 32) + 3
    p = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16))
    p.grad = torch.empty(n, dtype=torch.bfloat16)
    ends = [slice(0, 64), slice(n - 64, n)]
    for s in ends:
        p.data[s] = 1.0
        p.grad[s] = 0.5
    optimizer = fusedoptim.SGD([p], lr=1.0, backend="cuda")
    if name == "NormAdaptive":
        optimizer = fusedoptim.NormAdaptive([p], lr=1.0, backend="cuda")
        blocks = 2 * -(-n // (1 << 14))
        # Tickets are handed out in order, so that a few blocks can only be the first: parts of the sum.
        model.only_blocks(blocks - 4, blocks - 1)
        try:
            optimizer.step()
        finally:
            model.only_blocks(0, 2**32 - 1)
        return
    blocks = -(-n // (1 << 14))
    for first, last in ((0, 0), (blocks - 2, blocks - 1)):  # the last one has three elements
        model.only_blocks(first, last)
        try:
            optimizer.step()
        finally:
            model.only_blocks(0, 2**32 - 1)
    for s in ends:
        assert (p.data[s] == 0.5).all()


def test_scalars_agree_with_the_cpu_over_many_steps(model: Model) -> None:
    """Powers are computed in another way than the C library's."""
    shapes = [(1,)] * 12
    betas = [(0.9, 0.999), (0.5, 0.9), (0.95, 0.98), (0.0, 0.9999), (0.99, 0.9), (0.123, 0.77)]
    both = []
    for backend in ("cuda", "cpu"):
        params = parameters(shapes)
        groups = [{"params": params[i::6], "betas": b} for i, b in enumerate(betas)]
        both.append((params, fusedoptim.Adam(groups, backend=backend)))
    (mine, a), (theirs, b) = both
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    for step in range(1500):
        a.step()
        b.step()
        if step % 100 == 0:
            for optimizer in (a, b):
                for state in optimizer.state.values():
                    state["step"] += step * 7
    assert_same_optimizers(a, b)


def test_powers_differ_from_the_c_librarys_in_fp64_at_most(tmp_path: Path) -> None:
    """The extent of the one difference from the CPU: the last place of an fp64 scalar, at 1 step in 250 or fewer."""
    target, source = tmp_path / "powers.so", ROOT / "tests" / "cuda_host" / "count_powers.cpp"
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    counts = (ctypes.c_int64 * 5)()
    ctypes.CDLL(str(target)).count_powers(counts)
    powers, power64, power32, root64, root32 = counts
    assert powers == 400_000
    assert power32 == root32 == 0
    assert power64 <= powers / 1000 and root64 <= powers / 250


@pytest.mark.parametrize("case", FULL, ids=str)
def test_unscaling_and_skipping_in_the_kernel(model: Model, case: Case) -> None:
    mine, theirs, a, b = pair(case, [(5,), (40,), (20_000,)], torch.float32)
    a._step_supports_amp_scaling = b._step_supports_amp_scaling = True
    overflow = {0, 4, 5}
    assert train(a, mine, 10, overflow) == train(b, theirs, 10, overflow)
    assert_same_optimizers(a, b)


@pytest.mark.slow
def test_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """The kernels' own accesses, with the memory that torch allocates guarded on both sides."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("needs libasan")
    path = build(tmp_path / "host.so", *SANITIZE)
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUSEDOPTIM_CUDA_LIBRARY": str(path),
        "FUSEDOPTIM_TEST_BACKEND": "cuda",
    }
    tests = ["tests/test_layout.py", "tests/test_staleness.py", "tests/test_norm.py"]
    chosen = "not ten_thousand and not allocates and not threads and not capabilit and not contiguous-contiguous"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=env)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout

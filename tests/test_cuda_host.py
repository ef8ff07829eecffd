"""The CUDA kernels, compiled for the host and run there: the same sources, the same tables, the reference's bits."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cases import BY_NAME, COVERING, FULL, Case, assert_same_bits, parameters, set_gradients
from cuda_host import ROOT, SANITIZE, build, build_once, sanitizers
from device import pair
from device_memory_tests import *  # noqa: F403
from device_option_tests import *  # noqa: F403
from device_stored_tests import *  # noqa: F403
from device_stored_tests import POLICIES, both, contiguous, drawn, give_gradients
from device_tests import *  # noqa: F403
from number_tests import *  # noqa: F403
from parts_tests import *  # noqa: F403
from random_bits_tests import *  # noqa: F403
from storage_tests import *  # noqa: F403

import fusedoptim
from fusedoptim import _native
from fusedoptim._device_memory import DeviceMemory

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or _native._C is None, reason="needs g++ and the library")


class Model:
    """What the library tells and takes beyond the optimizers' own interface."""

    backend, slow = "cuda", False

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.cuda_on_host_launches.restype = ctypes.c_int64
        self.set_capturing = library.cuda_on_host_set_capturing
        self.only_blocks = library.cuda_on_host_only_blocks
        self.count = library.cuda_on_host_launches
        library.cuda_on_host_streamed.restype = ctypes.c_int64
        self.streamed = library.cuda_on_host_streamed

    def launches(self, optimizer: torch.optim.Optimizer) -> int:
        before = self.count()
        optimizer.step()
        return int(self.count() - before)

    @contextmanager
    def blocks(self, first: int, last: int) -> Iterator[None]:
        """Within it only these run, of every launch."""
        self.only_blocks(first, last)
        try:
            yield
        finally:
            self.only_blocks(0, 2**32 - 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    before = os.environ.get("FUSEDOPTIM_CUDA_LIBRARY")
    path = Path(before) if before and COVERING else build_once(tmp_path_factory)
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


@pytest.fixture(scope="module")
def kernels(model: Model) -> Model:
    return model


@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer in ("AdamW", "SGD")], ids=str)
def test_more_gradients_than_fit_the_arguments(model: Model, case: Case) -> None:
    shapes = [(1 + i % 3,) for i in range(4200)]
    mine, theirs, a, b = pair(model, case, shapes, torch.float32)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        assert model.launches(a) == 1
        b.step()
    for p, q in zip(mine, theirs, strict=True):
        assert_same_bits(p.detach(), q.detach())


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
        assert launches == (1 if step != 1 else 1 + 2 + 2)  # 33 KB of gradients and 48 KB of rows
        expected.step()
    assert optimizer._runners is not None and optimizer._runners[0].captured
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())
    optimizer.add_param_group({"params": parameters([(2,)])})
    with model.blocks(0, 0):
        optimizer.step()
    assert len(optimizer._captured) == 1


def test_the_allocator_is_told_of_every_stream_that_uses_tables(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once of each, for each table, and of the one where a captured step is usually replayed."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(DeviceMemory, "used_on", lambda self, memory, stream: told.append((memory.data_ptr(), stream)))
    params = parameters([(3,)] * 4200)  # whose gradients need a table: with entries, counters and sums the fourth
    optimizer = fusedoptim.AdamW(params, backend="cuda", max_grad_norm=1.0)
    set_gradients(params, 0)
    with model.blocks(0, 0):  # what the kernels do with the tables is nothing to the allocator
        optimizer.step()
        assert optimizer._runners is not None
        (runner,) = optimizer._runners
        for stream in (7, 7, 9, 0, 7):
            assert runner.refresh(optimizer.param_groups, optimizer.state)
            runner.plan.run(stream)
        assert [stream for _, stream in told] == [7] * 4 + [9] * 4
        assert len({address for address, _ in told}) == 4
        told.clear()
        params[0].data = params[0].data.clone()  # tables are made anew, on another stream
        optimizer.step()
        (runner,) = optimizer._runners
        assert runner.refresh(optimizer.param_groups, optimizer.state)
        model.set_capturing(1)
        try:
            runner.plan.run(11)
        finally:
            model.set_capturing(0)
    assert [stream for _, stream in told] == [11] * 4  # 0, where they were made, need not be told


#: Bytes per element that a step of bf16 parameters reads, but for scales.
READ = {
    "states": 8,
    "stochastic": 8,
    "remainder": 10,
    "remainder, fp32 states": 14,
    "remainder, 8 bits": 8,
    "8-bit remainder, 8 bits": 7,
    "fp32 master": 16,
    "all stochastic": 8,
    "fp32 master, 8 bits": 10,
    "all stochastic, 8 bits": 6,
    "stochastic, fp32 states": 12,
}


@pytest.mark.parametrize(
    ("policy", "dtype", "each"),
    [*((name, torch.bfloat16, each) for name, each in READ.items()), ("remainder, 8 bits", torch.float32, 10)],
    ids=str,
)
def test_groups_of_elements_are_fetched_at_once(model: Model, policy: str, dtype: torch.dtype, each: int) -> None:
    """Each element once: where numbers are ordinary and addresses aligned, hardly any is left to slow paths."""
    shape = (64, 256)
    a, b = both(model, BY_NAME["adamw"], [POLICIES[policy]], lambda i: drawn([shape], dtype, contiguous, i))
    for step in range(2):
        give_gradients(a, b, step)
        before = model.streamed()
        a.step()
        assert model.streamed() - before == each * 64 * 256


def test_the_allocator_is_told_of_the_default_stream_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is 0, for which torch.cuda.ExternalStream would be a stream of torch's pool."""

    class Recorded:
        streams: ClassVar[list[str]] = []

        def record_stream(self, stream: str) -> None:
            self.streams.append(stream)

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: f"{address} on {device}")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"the default one on {device}")
    memory: Any = Recorded()
    for stream in (7, 0):
        DeviceMemory(torch.device("cuda", 1)).used_on(memory, stream)
    assert memory.streams == ["7 on cuda:1", "the default one on cuda:1"]


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
        with model.blocks(blocks - 4, blocks - 1):
            optimizer.step()
        return
    blocks = -(-n // (1 << 14))
    for first, last in ((0, 0), (blocks - 2, blocks - 1)):  # the last one has three elements
        with model.blocks(first, last):
            optimizer.step()
    for s in ends:
        assert (p.data[s] == 0.5).all()


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


@pytest.mark.slow
def test_frozen_parameters_and_checkpoints_of_others(model: Model) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    tests = [
        f"tests/test_{name}.py"
        for name in ("frozen", "checkpoints_of_others", "checkpoint_entries", "checkpoint_memory")
    ]
    env = {**os.environ, "FUSEDOPTIM_TEST_BACKEND": "cuda", "OMP_NUM_THREADS": "1"}  # with the model's library
    result = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, timeout=3600, env=env)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.mark.slow
def test_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """The kernels' own accesses, with the memory that torch allocates guarded on both sides."""
    preload = sanitizers()
    if preload is None:
        pytest.skip("needs libasan")
    path = build(tmp_path / "host.so", *SANITIZE)
    env = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUSEDOPTIM_CUDA_LIBRARY": str(path),
        "FUSEDOPTIM_TEST_BACKEND": "cuda",
        "FUSEDOPTIM_TEST_COVERING": "1",
    }
    tests = ["tests/test_layout.py", "tests/test_staleness.py", "tests/test_norm.py::test_equals_numpy"]
    tests.append("tests/test_norm.py::test_bits_of_large_norms[1-portable]")  # threads and instructions are the CPU's
    tests.append("tests/test_composition.py::test_memory_layouts_do_not_matter")
    for name in ("every_policy_in_one_launch", "memory_layouts", "what_surrounds_a_rule"):
        tests.append(f"tests/test_cuda_host.py::test_{name}")
    chosen = "not ten_thousand and not allocates"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=env)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout

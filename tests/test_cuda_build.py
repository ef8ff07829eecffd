"""The CUDA library as it was built: what it needs, and what its machine code does. No GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from variants import STATES, rule_called

import fusedoptim
from benchmarks import machine_code
from benchmarks.gpu.toolkit import cuobjdump
from benchmarks.machine_code import Kernel
from fusedoptim import _backends, _installation, _native

LIBRARY = _native.cuda_library()
needs_cuda_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"no CUDA kernels: {_installation.build_report().get('cuda')}"
)


def _read(stored: bool) -> dict[tuple[str, bool], Kernel]:
    """By rule, and whether it is the kernel for tensors with operands of 64 bits; for the GPU that all figures are of,
    else the newest one built for. ``stored``: those for storages that may be no dtypes."""
    if cuobjdump() is None or not LIBRARY.exists():
        pytest.skip("needs the CUDA library and cuobjdump")
    built = machine_code.architectures(LIBRARY)
    found = machine_code.read(LIBRARY, "sm_90" if "sm_90" in built else built[-1])
    keys = {name: key for name in found if (key := machine_code.rule_and_width(name, stored)) is not None}
    return {(rule_called(struct), wide): found[name] for name, (struct, wide) in keys.items()}


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, bool], Kernel]:
    return _read(stored=False)


@pytest.fixture(scope="module")
def stored_kernels() -> dict[tuple[str, bool], Kernel]:
    return _read(stored=True)


@needs_cuda_library
def test_library_loads_without_a_gpu_and_needs_only_the_driver() -> None:
    assert _native.cuda_problem() is None
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", str(LIBRARY)], capture_output=True, text=True).stdout
        assert "libtorch" not in needed and "libcudart" not in needed and "libpython" not in needed
    assert fusedoptim._native._C is not None and not fusedoptim._native._C.cuda_on_host()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
            fusedoptim.SGD([torch.nn.Parameter(torch.ones(1))], backend="cuda")


def test_a_library_that_does_not_load_is_explained_and_something_else_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.version.hip is not None:
        pytest.skip("a ROCm build of torch")
    broken = tmp_path / "_C_cuda.so"
    gpu = torch.device("cuda", 0)
    for content, cause in ((None, "there is no .*unset FUSEDOPTIM_CUDA_LIBRARY"), (b"not a library", "does not load")):
        if content is not None:
            broken.write_bytes(content)
        monkeypatch.setenv("FUSEDOPTIM_CUDA_LIBRARY", str(broken))
        _native.cuda_problem.cache_clear()
        _backends._warned.clear()
        try:
            with pytest.warns(UserWarning, match=f"cuda: .*{cause}.*python -m fusedoptim"):
                assert _backends.choose(None, gpu) == "reference"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert _backends.choose(None, gpu) == "reference"  # said once
            with pytest.raises(RuntimeError, match=cause):
                fusedoptim.SGD([torch.nn.Parameter(torch.ones(1))], backend="cuda")
            fusedoptim.SGD([torch.nn.Parameter(torch.ones(1))]).step()  # the CPU is not touched by it
        finally:
            monkeypatch.undo()
            _native.cuda_problem.cache_clear()


def test_a_gpu_that_the_kernels_do_not_fit_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the driver answers for a GPU that the build has no code for."""
    monkeypatch.setattr(_native, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a new GPU")
    monkeypatch.setattr(
        _native._C, "cuda_problem", lambda i: "no kernel image is available for execution on the device"
    )
    monkeypatch.setattr(_native._C, "cuda_on_host", lambda: False)
    _native.cuda_device_problem.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"on a new GPU: no kernel image.*TORCH_CUDA_ARCH_LIST=12\.0 \S+ -m pip install"
        ):
            assert _backends.choose(None, torch.device("cuda", 0)) != "cuda"
        with pytest.raises(RuntimeError, match="no kernel image"):
            _backends.choose("cuda", torch.device("cuda", 0))
    finally:
        _native.cuda_device_problem.cache_clear()


def test_every_rule_has_both_kernels(kernels: dict[tuple[str, bool], Kernel]) -> None:
    assert kernels.keys() == {(rule, mixed) for rule in STATES for mixed in (False, True)}
    for optimizer in (fusedoptim.Adam, fusedoptim.SGD, fusedoptim.RMSprop, fusedoptim.NormAdaptive):
        assert max(STATES[optimizer.rule.name]) == len(optimizer.rule.states)


@pytest.mark.parametrize("rule", STATES)
def test_memory_is_accessed_16_bytes_at_once(kernels: dict[tuple[str, bool], Kernel], rule: str) -> None:
    """In the loops of tensors whose dtypes are known when compiled; 16-bit operands beside 32-bit ones have 8 bytes."""
    params = 0 if rule == "clip" else 1  # it does not look at them
    expected = {(states + 1 + params, states + 1) for states in STATES[rule]}
    for dtypes in ("fp32", "bf16"):
        found = {
            (loop.count(r"LDG\.E\.EF\.128") // loop.groups, loop.count(r"STG\.E\.EF\.128") // loop.groups)
            for loop in kernels[rule, False].loops()
            if loop.dtypes == dtypes and loop.count(r"(LDG|STG)\.E\.EF") == loop.count(r"(LDG|STG)\.E\.EF\.128")
        }
        assert expected <= found, dtypes
    # Nothing else is streamed, and hyper-parameters are read as words.
    assert not kernels[rule, False].addresses(r"(LDG|STG)\.E\.EF(?!\.(128|64)\b)")
    assert not [a for mixed in (False, True) for a in kernels[rule, mixed].addresses(r"(LD|LDG)\.(E\.)?[US]8")]


@pytest.mark.parametrize("rule", STATES)
def test_fp32_kernels_compute_in_fp32(kernels: dict[tuple[str, bool], Kernel], rule: str) -> None:
    """Scalars and norms are worked out in fp64, elements are not: between the first and the last access that streams
    there is none of it."""
    kernel = kernels[rule, False]
    streamed = kernel.addresses(r"(LDG|STG)\.E\.EF")
    wide = kernel.addresses(r"D(FMA|MUL|ADD|SETP|MNMX)\b|MUFU\.(RCP|RSQ)64H|F2F\.F(32\.F64|64\.F32)")
    assert wide, "the scalars' own arithmetic should show here"
    assert not [address for address in wide if streamed[0] < address < streamed[-1]]


@pytest.mark.parametrize("mixed", [False, True], ids=["up to 32 bits", "64 bits"])
@pytest.mark.parametrize("rule", STATES)
def test_registers_and_spills(kernels: dict[tuple[str, bool], Kernel], rule: str, mixed: bool) -> None:
    kernel = kernels[rule, mixed]
    assert kernel.blocks >= (4 if mixed or rule == "norm_adaptive" else 5)
    assert kernel.local_bytes == 0
    # A called function keeps its return address there; a spill would show within the loops.
    streamed = kernel.addresses(r"(LDG|STG)\.E\.EF")
    assert not [a for a in kernel.addresses(r"LDL|STL") if streamed[0] < a < streamed[-1]]


@pytest.mark.parametrize(
    ("rule", "dtypes", "stores", "most"),
    [("adam", "fp32", 3, 45), ("adam", "bf16", 3, 46), ("adam", "bf16 and fp32", 3, 48), ("sgd", "fp32", 2, 12)],
)
def test_what_the_main_loops_execute(
    kernels: dict[tuple[str, bool], Kernel], rule: str, dtypes: str, stores: int, most: int
) -> None:
    """Instructions per element, and the branches that keep groups of elements from overlapping."""
    if "sm_90" not in machine_code.architectures(LIBRARY):
        pytest.skip("the figures are of sm_90")
    loops = [
        loop
        for loop in kernels[rule, False].loops()
        if loop.dtypes == dtypes and loop.groups == 2 and loop.count(r"STG\.E\.EF") == stores * loop.groups
    ]
    best = min(loops, key=lambda loop: loop.each)
    assert best.each <= most
    assert best.branches <= (4 if rule == "adam" else 5.5)


def test_registers_and_spills_of_loops_for_storages(stored_kernels: dict[tuple[str, bool], Kernel]) -> None:
    """The loop that looks storages up may spill a little, and so may what does single elements: nothing else does."""
    assert stored_kernels.keys() == {(rule, mixed) for rule in STATES if rule != "clip" for mixed in (False, True)}
    for (rule, mixed), kernel in stored_kernels.items():
        assert kernel.blocks >= (4 if mixed or rule == "norm_adaptive" else 5), rule
        known = [loop for loop in kernel.loops() if not machine_code.looks_storages_up(loop)]
        assert not [loop.spills for loop in known if loop.spills], rule
        assert len(known) >= (0 if mixed else 2), rule


#: Instructions per element of AdamW's loops, in sm_90 code, at most.
MOST = {
    "fp32": 55,
    "bf16": 50,
    "bf16, v stochastic": 60,
    "bf16 stochastic, v as well": 62,
    "bf16 stochastic, all states as well": 72,
    "remainder, v stochastic": 64,
    "remainder, fp32 states": 55,
    "remainder, 8 bits": 97,
    "8-bit remainder, 8 bits": 100,
    "fp32 master and states": 65,
    "fp32, states in bf16": 60,
    "fp32, 8 bits": 105,
}


def test_what_the_loops_for_storages_execute(stored_kernels: dict[tuple[str, bool], Kernel]) -> None:
    """Of accesses, all 16 bytes wide but those of four 16-bit or 8-bit and of eight 8-bit numbers; the rest by their
    names."""
    if "sm_90" not in machine_code.architectures(LIBRARY):
        pytest.skip("the figures are of sm_90")
    loops = stored_kernels["adam", False].loops(every_way=True)
    found = {mix: len(loop.path) for loop in loops if (mix := machine_code.known_mix(loop, states=2))}
    assert {name for name, _ in found} == MOST.keys()
    for (name, elements), instructions in found.items():
        assert instructions / elements <= MOST[name], name

"""The CUDA library as it was built: what it needs, and what its machine code does. No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import fusedoptim
from fusedoptim import _backends, _native

LIBRARY = _native.cuda_library()
needs_cuda_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"no CUDA kernels: {_native.build_report().get('cuda')}"
)
#: Threads of a multiprocessor's 65,536 registers that must fit: see kBlocksPerSM in csrc/cuda/table.h.
THREADS_PER_SM = 4 * 128
#: The name of a rule in C++, and as the library lists it.
RULES = {
    "Adam": "adam",
    "SGD": "sgd",
    "RMSprop": "rmsprop",
    "Adagrad": "adagrad",
    "NormAdaptive": "norm_adaptive",
    "Clip": "clip",
}
#: How many states of the parameter's shape each variant of a rule has.
STATES = {"Adam": (2, 3), "SGD": (0, 1), "RMSprop": (1, 2, 2, 3), "Adagrad": (1,), "NormAdaptive": (0,), "Clip": (0,)}


def cuobjdump() -> str | None:
    """The one of the toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return found


@dataclass
class Kernel:
    registers: int
    local_bytes: int
    #: (address, instruction without its predicate)
    code: list[tuple[int, str]] = field(default_factory=list)

    def addresses(self, pattern: str) -> list[int]:
        return [address for address, instruction in self.code if re.match(pattern, instruction)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[tuple[str, bool], Kernel]]:
    """By rule, and whether it is the kernel for tensors with operands of 64 bits; for the newest GPU built for."""
    tool = cuobjdump()
    if tool is None or not LIBRARY.exists():
        pytest.skip("needs the CUDA library and cuobjdump")
    files = subprocess.run([tool, "-lelf", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    newest = max(re.findall(r"sm_(\d+)", files), key=int)
    command = [tool, "-arch", f"sm_{newest}", "-sass", "-res-usage", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, bool], Kernel] = {}
    usage = {
        name: (int(registers), int(local))
        for name, registers, local in re.findall(r"Function (\S+):\n\s*REG:(\d+) .*?LOCAL:(\d+)", listing)
    }
    current: Kernel | None = None
    for line in listing.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = None
            name = match[1]
            if kind := re.search(r"step_kernelINS_\d+(\w+?)ELb([01])E", name):
                current = found[kind[1], kind[2] == "1"] = Kernel(*usage[name])
        elif current is not None and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(.*?);", line)):
            current.code.append((int(match[1], 16), match[2].strip()))
    yield found


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
    for content, cause in ((None, "they were not built"), (b"not a library", "does not load")):
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
        with pytest.warns(UserWarning, match=r"on a new GPU: no kernel image.*TORCH_CUDA_ARCH_LIST=12\.0 pip install"):
            assert _backends.choose(None, torch.device("cuda", 0)) != "cuda"
        with pytest.raises(RuntimeError, match="no kernel image"):
            _backends.choose("cuda", torch.device("cuda", 0))
    finally:
        _native.cuda_device_problem.cache_clear()


def test_every_rule_has_both_kernels(kernels: dict[tuple[str, bool], Kernel]) -> None:
    assert kernels.keys() == {(rule, mixed) for rule in RULES for mixed in (False, True)}
    assert STATES.keys() == RULES.keys()
    for name in RULES:
        optimizer = getattr(fusedoptim, name, None)
        assert max(STATES[name]) == (0 if optimizer is None else len(optimizer.rule.slots))


@pytest.mark.parametrize("rule", RULES)
def test_memory_is_accessed_16_bytes_at_once(kernels: dict[tuple[str, bool], Kernel], rule: str) -> None:
    """Per variant: a loop over fp32 (and mixed) tensors in groups of four, and one over 16-bit tensors in groups of
    eight, with two groups under way; each reads gradient, parameter and states, and writes all but the gradient."""
    kernel = kernels[rule, False]
    loads, stores = kernel.addresses(r"LDG\.E\.EF\.128"), kernel.addresses(r"STG\.E\.EF\.128")
    params = 0 if rule == "Clip" else 1  # it does not look at them
    assert len(loads) >= sum(4 * (states + 1 + params) for states in STATES[rule])
    assert len(stores) >= sum(4 * (states + 1) for states in STATES[rule])
    # 16-bit operands beside 32-bit ones; nothing else is streamed
    assert not kernel.addresses(r"(LDG|STG)\.E\.EF(?!\.(128|64)\b)")


@pytest.mark.parametrize("rule", RULES)
def test_fp32_kernels_compute_in_fp32(kernels: dict[tuple[str, bool], Kernel], rule: str) -> None:
    """Scalars and norms are worked out in fp64, elements are not: between the first and the last access that streams
    there is none of it."""
    kernel = kernels[rule, False]
    streamed = kernel.addresses(r"(LDG|STG)\.E\.EF")
    wide = kernel.addresses(r"D(FMA|MUL|ADD|SETP|MNMX)\b|MUFU\.(RCP|RSQ)64H|F2F\.F(32\.F64|64\.F32)")
    assert wide, "the scalars' own arithmetic should show here"
    assert not [address for address in wide if streamed[0] < address < streamed[-1]]


@pytest.mark.parametrize("mixed", [False, True], ids=["up to 32 bits", "64 bits"])
@pytest.mark.parametrize("rule", RULES)
def test_registers_and_spills(kernels: dict[tuple[str, bool], Kernel], rule: str, mixed: bool) -> None:
    kernel = kernels[rule, mixed]
    assert kernel.registers * THREADS_PER_SM <= 65536
    assert kernel.local_bytes == 0
    # A called function keeps its return address there; a spill would show within the loops.
    streamed = kernel.addresses(r"(LDG|STG)\.E\.EF")
    assert not [a for a in kernel.addresses(r"LDL|STL") if streamed[0] < a < streamed[-1]]

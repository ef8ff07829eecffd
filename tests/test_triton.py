"""The Triton backend: its kernels in the interpreter, the code that Triton generates from them, when it is chosen."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME

import fusedoptim
from benchmarks import machine_code
from benchmarks.gpu.toolkit import cuobjdump
from benchmarks.triton_compile import OPTIMIZERS, SCHEMES, Code, clipper, figures, generate, kind, printed, stored
from fusedoptim import _backends, _native

needs_triton = pytest.mark.skipif(_native.triton_problem() is not None, reason=f"Triton: {_native.triton_problem()}")
F32, F64, BF16, F16 = range(4)
HERE = Path(__file__).parent


@needs_triton
@pytest.mark.slow
def test_every_case_in_the_interpreter() -> None:
    """In a process of its own: Triton has to be told before it is imported."""
    tests = str(HERE / "interpreted_triton.py")
    # Without the repository's own -q, which would leave out the count.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-p", "no:cacheprovider", tests]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 250


@needs_triton
@pytest.mark.slow
def test_frozen_parameters_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-p", "no:cacheprovider", "tests/test_frozen.py"]
    chosen = "adamw_amsgrad and (uint8 or wrapper or not any_kind)"  # a kind takes a second
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FUSEDOPTIM_TEST_BACKEND": "triton"}
    done = subprocess.run([*command, "-k", chosen], env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 5


# ---- generated code ----


@dataclass
class Sass:
    registers: int
    local_bytes: int
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i) is not None for i in self.instructions)


def sass(compiled: Any, folder: Path) -> Sass:
    tool = cuobjdump()
    assert tool is not None  # Triton brings one
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    listing = subprocess.run(
        [tool, "-sass", "-res-usage", str(file)], capture_output=True, text=True, check=True
    ).stdout
    usage = re.search(r"REG:(\d+).*?LOCAL:(\d+)", listing)
    assert usage is not None
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", listing)
    return Sass(int(usage[1]), int(usage[2]), found)


def code_of(name: str) -> Code:
    """Of a row of the registry, or of the clipper."""
    return clipper() if name == "clip" else printed(BY_NAME[name].optimizer, BY_NAME[name].options)


#: One row of the registry for each number of states of every rule that has no sums.
ELEMENTWISE = [
    *("clip", "sgd", "sgd_nesterov", "adamw", "adam_amsgrad_decay_max", "adagrad_all"),
    *("rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_all"),
]
#: Of every rule, with all the states it can have.
RULES = ["clip", "adam_amsgrad_decay_max", "sgd_nesterov", "rmsprop_all", "adagrad_all", "norm_adaptive"]


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_loop_moves_16_bytes_at_once(name: str, dtype: int, tmp_path: Path) -> None:
    rule = code_of(name)
    states = len(rule.used)
    compiled = generate(rule, (kind(rule, dtype, dtype, dtype),))
    code = sass(compiled, tmp_path)
    per_operand = 2 if dtype == F32 else 1  # 8 elements per thread
    read = states + (1 if name == "clip" else 2)  # which does not look at the parameter
    assert code.count(r"LDG\.E\S*\.128") >= per_operand * read
    assert code.count(r"STG\.E\S*\.128") >= per_operand * (states + 2)  # zeros in the gradient are stored as well
    # Two numbers are rounded at once, by the device.
    assert code.count(r"F2FP\.BF16") >= (4 * (states + 1) if dtype == BF16 else 0)
    assert code.local_bytes == 0
    assert code.registers * 128 * 4 <= 65536  # four blocks to a multiprocessor
    ptx = compiled.asm["ptx"]
    assert not re.findall(r"\.ftz|\.approx|\bmad\.rn\.f|div\.full", ptx)
    assert ("div.rn.f32" in ptx) == rule.handle.divides
    assert ("sqrt.rn.f32" in ptx) == rule.handle.divides
    # fp64 is for scalars: none of it is in the loop, whose 8 elements would show.
    assert len(re.findall(r"fma\.rn\.f64", ptx)) <= (12 if name.startswith("adam") else 0)


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adam_amsgrad_decay_max", "rmsprop_all", "clip"])
def test_the_moving_average_goes_through_the_same_loop(name: str, dtype: int, tmp_path: Path) -> None:
    rule = code_of(name)
    states = len(rule.used)
    code = sass(generate(rule, (kind(rule, dtype, dtype, dtype, True),)), tmp_path)
    per_operand, average = 2 if dtype == F32 else 1, 2  # which has fp32
    read = states + (1 if name == "clip" else 2)
    assert code.count(r"LDG\.E\S*\.128") >= per_operand * read + average
    assert code.count(r"STG\.E\S*\.128") >= per_operand * (states + 2) + average
    assert code.local_bytes == 0
    assert code.registers * 128 * 3 <= 65536


@needs_triton
@pytest.mark.parametrize(
    ("name", "scheme", "instructions"),
    [
        ("AdamW", "fp32", 56.5),
        ("AdamW", "bf16", 63),
        ("SGD", "fp32", 19.1),
        ("SGD", "bf16", 24.2),
        ("LAMB", "fp32", 65),
        ("LAMB", "bf16", 71),
    ],
)
def test_what_is_printed_is_no_slower(name: str, scheme: str, instructions: float, tmp_path: Path) -> None:
    """Than functions that are written by hand: no more instructions of the loop per element, and four blocks to a
    multiprocessor, with sums as well."""
    rule = printed(name, OPTIMIZERS[name])
    registers, spilled, each = figures(generate(rule, (stored(rule, scheme),)), tmp_path)
    assert registers * 128 * 4 <= 65536 and spilled == 0
    assert each <= instructions


#: Bytes of an element, and of what is kept beside it, where these are not 2 and none.
BYTES = {"f32": (4,), "bf16_remainder": (2, 2), "bf16_remainder8": (2, 1), "bf16_master": (2, 4)}


@needs_triton
@pytest.mark.parametrize(
    ("name", "scheme", "instructions"),
    [
        ("adamw", "stochastic, bf16", 84),
        ("adamw", "remainder, bf16", 93),
        ("adamw", "stochastic, 8 bits", 136),
        ("rmsprop", "remainder8, 8 bits", 101),
        ("sgd_nesterov", "master, fp32", 40),
    ],
)
def test_what_is_stored_in_fewer_bits(name: str, scheme: str, instructions: int, tmp_path: Path) -> None:
    """Goes through the loop without spills, as wide as eight elements are; the largest of a block is found in registers
    and by shuffles among the 16 threads that have it. ``instructions``: of the loop, per element, at most."""
    file = tmp_path / "kernel.cubin"
    rule = code_of(name)
    file.write_bytes(generate(rule, (stored(rule, scheme),)).asm["cubin"])
    (kernel,) = machine_code.read(file).values()
    (loop,) = kernel.loops()
    param, grad, state, squares = SCHEMES[scheme]
    names = [param, grad, *(squares if k == rule.squares else state for k in rule.used)]
    sizes = [size for name in names for size in BYTES.get(name, (1,) if name.startswith("q8") else (2,))]
    for access in ("LDG", "STG"):  # also zeros, in the gradient
        assert loop.count(rf"{access}\.E\.EF\.128") == sum(size // 2 for size in sizes)
        assert loop.count(rf"{access}\.E\.EF\.64") == sizes.count(1)
        assert loop.count(rf"{access}\.E\.EF") == sum(max(size // 2, 1) for size in sizes)
    assert loop.spills == 0
    assert kernel.registers * 128 * 3 <= 65536
    assert loop.count("SHFL") == 4 * sum(name.startswith("q8") for name in names)
    assert len(loop.path) / 8 <= instructions


@needs_triton
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_the_norm_of_all_gradients_is_summed_without_spills(dtype: int, tmp_path: Path) -> None:
    kinds = (kind(clipper(), dtype, dtype, dtype),)
    compiled = generate(clipper(), kinds, purpose="measure")
    code = sass(compiled, tmp_path)
    assert code.local_bytes == 0
    assert code.registers * 128 * 4 <= 65536
    assert code.count(r"LDG\.E\S*\.128") >= {F32: 8, F64: 16, BF16: 4}[dtype]
    assert not re.findall(r"\.ftz|\.approx|\bmad\.rn\.f|\bfma\.|div\.full", compiled.asm["ptx"])
    assert "scratch_store" not in generate(clipper(), kinds, "hip", "gfx942", "measure").asm["amdgcn"]


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_the_norm_is_summed_without_spills(dtype: int, tmp_path: Path) -> None:
    rule = code_of("norm_adaptive_all")
    compiled = generate(rule, (kind(rule, dtype, dtype, F32),))
    code = sass(compiled, tmp_path)
    assert code.local_bytes == 0
    assert code.registers * 128 * 3 <= 65536
    assert code.count(r"LDG\.E\S*\.128") >= (8 + 4 if dtype == F32 else 4 + 2)
    assert code.count(r"SHFL") >= 2 * 5
    ptx = compiled.asm["ptx"]
    assert not re.findall(r"\.ftz|\.approx|\bmad\.rn\.f|div\.full", ptx)
    assert re.findall(r"atom\.(?:global\.)?gpu\.(?:global\.)?acq_rel", ptx)


@needs_triton
@pytest.mark.parametrize(
    ("name", "arch"), [*((name, 90) for name in RULES), ("adam_amsgrad_decay_max", 80), ("norm_adaptive", 80)]
)
def test_every_rule_compiles_with_mixed_dtypes(name: str, arch: int, tmp_path: Path) -> None:
    """For the older kind of GPU the two kernels that there are: with a sum of squares and without."""
    rule = code_of(name)
    narrow = (kind(rule, F32, F32, F32), kind(rule, BF16, F32, BF16), kind(rule, F16, F16, F32))
    assert sass(generate(rule, narrow, arch=arch), tmp_path)
    wide = (kind(rule, F64, F64, F64), kind(rule, F64, BF16, F32))
    assert sass(generate(rule, wide, arch=arch), tmp_path)


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, F32) for name in RULES), ("adam_amsgrad_decay_max", BF16), ("norm_adaptive", BF16)]
)
def test_code_for_an_amd_gpu(name: str, dtype: int) -> None:
    rule = code_of(name)
    states = len(rule.used)
    asm = generate(rule, (kind(rule, dtype, dtype, dtype),), "hip", "gfx942").asm
    code = asm["amdgcn"]
    assert len(re.findall(r"(?:global|buffer)_load_dwordx4", code)) >= states + (1 if name == "clip" else 2)
    assert len(re.findall(r"(?:global|buffer)_store_dwordx4", code)) >= states + 1
    assert set(re.findall(r"= f(?:mul|add|sub|div) ((?:fast|contract|arcp|afn|reassoc)?)", asm["llir"])) == {""}
    assert "fmuladd" not in asm["llir"]
    assert "v_div_fixup_f32" in code or not rule.handle.divides
    assert "scratch_store" not in code


@needs_triton
def test_code_for_an_amd_gpu_with_blocks() -> None:
    rule = code_of("rmsprop")
    asm = generate(rule, (stored(rule, "remainder, 8 bits"),), "hip", "gfx942").asm
    code = asm["amdgcn"]
    for access in ("load", "store"):
        assert len(re.findall(rf"(?:global|buffer)_{access}_dwordx4", code)) >= 3
        assert len(re.findall(rf"(?:global|buffer)_{access}_dwordx2", code)) >= 1
    assert set(re.findall(r"= f(?:mul|add|sub|div) ((?:fast|contract|arcp|afn|reassoc)?)", asm["llir"])) == {""}
    assert "fmuladd" not in asm["llir"]
    assert "scratch_store" not in code


@needs_triton
def test_few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for a rule and the kinds of tensors that it meets: not for their number, sizes or values."""
    code = (
        "import torch, fusedoptim\n"
        "from fusedoptim.triton_kernels import kernels\n"
        "seen = set()\n"
        "run = kernels.step_kernel.run\n"
        "def noted(*args, **kwargs):\n"
        "    seen.add(args[1:])\n"
        "    return run(*args, **kwargs)\n"
        "kernels.step_kernel.run = noted\n"
        "for n in (1, 5):\n"
        "    for size in (3, 1024, 5000):\n"
        "        params = [torch.nn.Parameter(torch.ones(size)) for _ in range(n)]\n"
        "        o = fusedoptim.AdamW(params, lr=0.1 / n, weight_decay=0.1 * n, backend='triton')\n"
        "        for p in params: p.grad = torch.ones_like(p)\n"
        "        o.step()\n"
        "        o.step()\n"
        "assert len(seen) == 1, seen\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- when it is chosen ----


def test_triton_is_not_imported_unless_used() -> None:
    code = (
        "import sys, torch\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "torch.optim.AdamW([p]).step()\n"
        "before = 'triton' in sys.modules\n"
        "import fusedoptim\n"
        "fusedoptim.AdamW([p]).step()\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not any(m.startswith('fusedoptim.triton_kernels') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    _native.triton_problem.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
            fusedoptim.AdamW([torch.nn.Parameter(torch.ones(1))], backend="triton")
    finally:
        _native.triton_problem.cache_clear()


@needs_triton
def test_chosen_where_cuda_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(name: str, problem: str | None) -> _backends.Backend:
        found = _backends.BACKENDS[name]
        return _backends.Backend(name, found.devices, lambda device: problem, found.steps_on_device)

    device = torch.device("cuda", 0)
    monkeypatch.setitem(_backends.BACKENDS, "triton", backend("triton", None))
    monkeypatch.setitem(_backends.BACKENDS, "cuda", backend("cuda", None))
    _backends._warned.clear()
    assert _backends.choose(None, device) == "cuda"
    monkeypatch.setitem(_backends.BACKENDS, "cuda", backend("cuda", "the moon is full"))
    with pytest.warns(UserWarning, match=r"Triton kernels,.*the moon is full"):
        assert _backends.choose(None, device) == "triton"
    assert _backends.choose(None, device) == "triton"  # said once
    monkeypatch.setitem(_backends.BACKENDS, "triton", backend("triton", "the sun as well"))
    _backends._warned.clear()
    with pytest.warns(UserWarning, match=r"eager reference.*the moon is full.*the sun as well"):
        assert _backends.choose(None, device) == "reference"

"""``python -m benchmarks.triton_compile``: how long Triton takes to compile the kernels of an optimizer at first use,
and what their loops execute. Needs Triton, and no GPU."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from fusedoptim import _native

from . import machine_code

#: A rule with the states of its plain variant, and that variant. Its squares come last.
RULES = {"adam": (2, 0), "sgd": (1, 1), "rmsprop": (1, 0), "adagrad": (1, 0), "norm_adaptive": (0, 0)}
#: Which of their states are squares.
SQUARES = {"adam": 1, "rmsprop": 0, "adagrad": 0}
#: How the parameter, the gradient, a state and squares are stored, by the names in csrc/core/storage_names.h.
SCHEMES = {
    "fp32": ("f32", "f32", "f32", "f32"),
    "bf16": ("bf16", "bf16", "bf16", "bf16"),
    "stochastic, bf16": ("bf16_stochastic", "bf16", "bf16", "bf16_stochastic"),
    "stochastic, 8 bits": ("bf16_stochastic", "bf16", "q8_stochastic", "q8_squares_stochastic"),
    "remainder, fp32": ("bf16_remainder", "bf16", "f32", "f32"),
    "remainder, bf16": ("bf16_remainder", "bf16", "bf16", "bf16_stochastic"),
    "remainder, 8 bits": ("bf16_remainder", "bf16", "q8", "q8_squares_stochastic"),
    "remainder8, 8 bits": ("bf16_remainder8", "bf16", "q8", "q8_squares_stochastic"),
    "master, fp32": ("bf16_master", "bf16", "f32", "f32"),
}


#: What code a tensor needs: see TritonDevice.prepare.
Kind = tuple[tuple[int, ...], int, int, int]


def kind(param: int, grad: int, state: int, variant: int, states: int, average: bool = False) -> Kind:
    """Of a tensor with an fp32 step and ``states`` states, with their dtypes."""
    used = (1 << states) - 1
    storages = (param, grad, *(state if used >> k & 1 else 0 for k in range(3)), int(param == 1))
    return storages, 0, variant, used | average << 3


def stored(rule: str, scheme: str) -> Kind:
    """Of a tensor of a rule's plain variant, and one of SCHEMES."""
    states, variant = RULES[rule]
    names = storages_of(rule, scheme)
    numbers = [_native._C.storages()[name] for name in names]
    return (*numbers, *[0] * (6 - len(numbers))), 0, variant, (1 << states) - 1


def storages_of(rule: str, scheme: str) -> list[str]:
    """The names of those of the parameter, the gradient and the states."""
    param, grad, state, squares = SCHEMES[scheme]
    return [param, grad, *(squares if SQUARES.get(rule) == k else state for k in range(RULES[rule][0]))]


def generate(rule: str | None, kinds: tuple[Kind, ...], backend: str = "cuda", arch: int | str = 90) -> Any:
    """Compiles the kernel of a rule for kinds of tensors, as Triton does at the first launch; without a rule, the one
    that measures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = importlib.import_module("fusedoptim.triton_kernels.device")
    warp = 64 if backend == "hip" else 32
    purpose = "measure" if rule is None else "update"
    code, values = device.kernel_for(purpose, rule and _native._C.find_rule(rule), kinds, device.block(warp))
    source = ASTSource(
        code,
        {"header": "i64", **dict.fromkeys(code.arg_names[1:], "constexpr")},
        {(i + 1,): value for i, value in enumerate(values)},
    )
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=device.OPTIONS)


def registers_and_instructions(compiled: Any, folder: Path) -> tuple[int, float]:
    """The latter per element of the main loop, whose threads have eight under way; see benchmarks.machine_code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (kernel,) = machine_code.read(cubin).values()
    return kernel.registers, min(len(loop.path) for loop in kernel.loops()) / 8


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.triton_compile", description=__doc__)
    p.add_argument("--arch", type=int, default=90, help="compute capability, as in 90 (default)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        generate("clip", (kind(0, 0, 0, 0, 0),), arch=args.arch)  # Triton's own start
        print("| rule | storages | seconds | registers | instructions per element |\n|---|---|---:|---:|---:|")
        for rule in RULES:
            for scheme in SCHEMES:
                begun = time.perf_counter()
                compiled = generate(rule, (stored(rule, scheme),), arch=args.arch)
                seconds = time.perf_counter() - begun
                registers, each = registers_and_instructions(compiled, Path(cache))
                print(f"| {rule} | {scheme} | {seconds:.1f} | {registers} | {each:.1f} |")


if __name__ == "__main__":
    main()

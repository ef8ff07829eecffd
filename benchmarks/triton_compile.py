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

from . import machine_code

#: As csrc/core/dtype.h numbers them.
DTYPES = {"fp32": 0, "bf16": 2}
#: A rule with the states of its plain variant, and that variant.
RULES = {"adam": (2, 0), "sgd": (1, 1), "rmsprop": (1, 0), "adagrad": (1, 0), "norm_adaptive": (0, 0)}


def kind(param: int, grad: int, state: int, variant: int, states: int, average: bool = False) -> int:
    """What code a tensor needs, as DeviceEntry in csrc/cuda/table.h has it: a byte each for the dtypes of parameter,
    gradient, step and three states, for the variant, and a bit for each state, the last for the moving average."""
    used = (1 << states) - 1
    parts = [param, grad, 0, *(state if used >> k & 1 else 0 for k in range(3)), variant, used | average << 3]
    return sum(part << 8 * i for i, part in enumerate(parts))


def generate(rule: str | None, kinds: tuple[int, ...], backend: str = "cuda", arch: int | str = 90) -> Any:
    """Compiles the kernel of a rule for kinds of tensors, as Triton does at the first launch; without a rule, that of
    the norm of all gradients, for (dtype of the parameter | dtype of the gradient << 8)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels, launcher = (importlib.import_module(f"fusedoptim.triton_kernels.{n}") for n in ("kernels", "launcher"))
    warp = 64 if backend == "hip" else 32
    values: tuple[Any, ...] = (kinds, launcher.DIGEST)
    code = kernels.norm_kernel
    if rule is not None:
        functions = launcher.plug(rule)
        values = (*functions, kinds, launcher.block(warp), launcher.DIGEST)
        code = kernels.step_kernel if functions.next_scalar_state is None else kernels.norm_step_kernel
    source = ASTSource(
        code,
        {"header": "i64", **dict.fromkeys(code.arg_names[1:], "constexpr")},
        {(i + 1,): value for i, value in enumerate(values)},
    )
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=launcher.OPTIONS)


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
        generate("sgd", (0,), arch=args.arch)  # Triton's own start
        print("| rule | dtype | seconds | registers | instructions per element |\n|---|---|---:|---:|---:|")
        for rule, (states, variant) in RULES.items():
            for name, dtype in DTYPES.items():
                begun = time.perf_counter()
                compiled = generate(rule, (kind(dtype, dtype, dtype, variant, states),), arch=args.arch)
                seconds = time.perf_counter() - begun
                registers, each = registers_and_instructions(compiled, Path(cache))
                print(f"| {rule} | {name} | {seconds:.1f} | {registers} | {each:.1f} |")


if __name__ == "__main__":
    main()

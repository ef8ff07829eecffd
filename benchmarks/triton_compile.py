"""``python -m benchmarks.triton_compile [CLASS ...]``: how long Triton takes to compile the kernel of an optimizer at
first use, and what its loop executes. Without classes, of those whose rules come with the package. Needs Triton, and no
GPU."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fusedoptim
from fusedoptim import _native
from fusedoptim._backends import is_own
from fusedoptim._values import numbers
from fusedoptim.own_rules import libraries, programs

from . import machine_code

#: Classes of the package with the options of a group.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adagrad": {"weight_decay": 0.1},
    "NormAdaptive": {"weight_decay": 0.1},
    "Adadelta": {"weight_decay": 0.1},
    "Adamax": {"weight_decay": 0.1},
    "ASGD": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1},
    "RAdam": {"weight_decay": 0.1},
    "Rprop": {},
    "Lion": {"weight_decay": 0.1},
    "LAMB": {},
    "LARS": {"momentum": 0.9, "weight_decay": 0.1},
    "AdEMAMix": {"weight_decay": 0.1},
    "ADOPT": {"weight_decay": 0.1},
    "AdamWScheduleFree": {"weight_decay": 0.1},
    "CautiousAdamW": {},
}
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


class Code(NamedTuple):
    """A rule as kernels take it, for one group."""

    handle: Any
    #: triton_kernels.device.RuleFunctions.
    functions: Any
    #: The states that are used, as bits, and the one that is squares, or -1.
    states: int = 0
    squares: int = -1

    @property
    def used(self) -> list[int]:
        """The states that are used, by number."""
        return [k for k in range(3) if self.states >> k & 1]


def printed(name: str, options: dict[str, Any]) -> Code:
    """Of an optimizer's class with options of a group."""
    from fusedoptim.own_rules.triton_module import functions_of

    optimizer = getattr(fusedoptim, name)([torch.nn.Parameter(torch.zeros(3))], backend="reference", **options)
    rule = optimizer.rule
    program = programs.program_of(rule, numbers(optimizer.param_groups[0], rule))
    handle = libraries.handle(rule, [program], None)
    return Code(handle, functions_of([program]), programs.states_mask(program), programs.second_moment(rule))


def clipper() -> Code:
    """What clips gradients outside of a step."""
    from fusedoptim.triton_kernels.device import CLIP

    return Code(_native._C.find_rule("clip"), CLIP)


#: What code a tensor needs: see TritonDevice.prepare.
Kind = tuple[tuple[int, ...], int, int, int]


def kind(code: Code, param: int, grad: int, state: int, average: bool = False) -> Kind:
    """Of a tensor with an fp32 step, with the dtypes of the parameter, the gradient and the states."""
    storages = (param, grad, *(state if k in code.used else 0 for k in range(3)), int(param == 1))
    return storages, 0, 0, code.states | average << 3


def stored(code: Code, scheme: str) -> Kind:
    """Of a tensor that is stored as one of SCHEMES."""
    param, grad, state, squares = SCHEMES[scheme]
    states = ["f32" if k not in code.used else squares if k == code.squares else state for k in range(3)]
    return tuple(_native._C.storages()[name] for name in (param, grad, *states, "f32")), 0, 0, code.states


def generate(
    code: Code, kinds: tuple[Kind, ...], backend: str = "cuda", arch: int | str = 90, purpose: str = "update"
) -> Any:
    """Compiles the kernel of a rule for kinds of tensors, as Triton does at the first launch.

    Args:
        purpose: "update", or "measure" for the one that sums squares.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fusedoptim.triton_kernels import device

    warp = 64 if backend == "hip" else 32
    kernel, values = device.kernel_for(purpose, code.handle, kinds, device.block(warp), code.functions)
    source = ASTSource(
        kernel,
        {"header": "i64", **dict.fromkeys(kernel.arg_names[1:], "constexpr")},
        {(i + 1,): value for i, value in enumerate(values)},
    )
    return compile(source, target=GPUTarget(backend, arch, warp), options=device.OPTIONS)


def figures(compiled: Any, folder: Path) -> tuple[int, int, float]:
    """Registers, bytes of spilled ones, and the instructions per element of the main loop, whose threads have eight
    under way; see benchmarks.machine_code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (kernel,) = machine_code.read(cubin).values()
    return kernel.registers, kernel.local_bytes, min(len(loop.path) for loop in kernel.loops()) / 8


def lines(name: str, schemes: list[str], arch: int, folder: Path) -> Iterator[str]:
    code = printed(name, OPTIMIZERS[name])
    for scheme in schemes:
        begun = time.perf_counter()
        compiled = generate(code, (stored(code, scheme),), arch=arch)
        seconds = time.perf_counter() - begun
        registers, spilled, each = figures(compiled, folder)
        yield f"| {name} | {scheme} | {seconds:.1f} | {registers} | {spilled} | {each:.1f} |"


def main() -> None:
    built_in = [name for name in OPTIMIZERS if not is_own(getattr(fusedoptim, name).rule)]
    p = argparse.ArgumentParser(prog="python -m benchmarks.triton_compile", description=__doc__)
    p.add_argument("classes", nargs="*", metavar="CLASS", default=built_in, help=", ".join(OPTIMIZERS))
    p.add_argument("--scheme", action="append", choices=SCHEMES, help="a way to store tensors (default: every one)")
    p.add_argument("--arch", type=int, default=90, help="compute capability, as in 90 (default)")
    args = p.parse_args()
    unknown = [name for name in args.classes if name not in OPTIMIZERS]
    if unknown:
        p.error(f"no such class: {', '.join(unknown)}; choose of {', '.join(OPTIMIZERS)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        generate(clipper(), (kind(clipper(), 0, 0, 0),), arch=args.arch)  # Triton's own start
        print("| optimizer | storages | seconds | registers | spilled bytes | instructions per element |")
        print("|---|---|---:|---:|---:|---:|")
        for name in args.classes:
            for line in lines(name, args.scheme or [*SCHEMES], args.arch, Path(cache)):
                print(line, flush=True)


if __name__ == "__main__":
    main()

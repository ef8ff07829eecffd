"""``python -m benchmarks.triton_compile``: how long Triton takes to compile the kernels of an optimizer at first use,
and what their loops execute. ``--own``: of what is printed of rules' functions, the package's own beside the kernels
that were written for them. Needs Triton, and no GPU."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Iterator
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


def generate(
    rule: Any, kinds: tuple[Kind, ...], backend: str = "cuda", arch: int | str = 90, functions: Any = None
) -> Any:
    """Compiles the kernel of a rule for kinds of tensors, as Triton does at the first launch; without a rule, the one
    that measures.

    Args:
        rule: the name of one of the package's own, or a handle, with its functions.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = importlib.import_module("fusedoptim.triton_kernels.device")
    warp = 64 if backend == "hip" else 32
    purpose = "measure" if rule is None else "update"
    handle = _native._C.find_rule(rule) if isinstance(rule, str) else rule
    code, values = device.kernel_for(purpose, handle, kinds, device.block(warp), functions)
    source = ASTSource(
        code,
        {"header": "i64", **dict.fromkeys(code.arg_names[1:], "constexpr")},
        {(i + 1,): value for i, value in enumerate(values)},
    )
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=device.OPTIONS)


def figures(compiled: Any, folder: Path) -> tuple[int, int, float]:
    """Registers, bytes of spilled ones, and the instructions per element of the main loop, whose threads have eight
    under way; see benchmarks.machine_code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (kernel,) = machine_code.read(cubin).values()
    return kernel.registers, kernel.local_bytes, min(len(loop.path) for loop in kernel.loops()) / 8


#: Classes of the package with the options of a group, and the schemes that their rules are compiled for. The package's
#: own rules come first.
OWN: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {"weight_decay": 0.1}),
    ("NormAdaptive", {"weight_decay": 0.1}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("ASGD", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {"weight_decay": 0.1}),
    ("Rprop", {}),
    ("Lion", {"weight_decay": 0.1}),
    ("LAMB", {}),
    ("LARS", {"momentum": 0.9, "weight_decay": 0.1}),
    ("AdEMAMix", {"weight_decay": 0.1}),
    ("ADOPT", {"weight_decay": 0.1}),
    ("AdamWScheduleFree", {"weight_decay": 0.1}),
    ("CautiousAdamW", {}),
]
OWN_SCHEMES = ("fp32", "bf16", "remainder, 8 bits")


def own_lines(name: str, options: dict[str, Any], scheme: str, arch: int, folder: Path) -> Iterator[str]:
    """Of the functions written for a rule, if there are any, and of those that are printed."""
    import torch

    import fusedoptim
    from fusedoptim._backends import is_own
    from fusedoptim._values import numbers
    from fusedoptim.own_rules import libraries, programs, triton_module

    optimizer = getattr(fusedoptim, name)([torch.nn.Parameter(torch.zeros(3))], backend="reference", **options)
    rule, group = optimizer.rule, numbers(optimizer.param_groups[0], optimizer.rule)
    program = programs.program_of(rule, group)
    param, grad, state, squares = SCHEMES[scheme]
    second, mask = programs.second_moment(rule), programs.states_mask(program)
    kinds = ["f32" if not mask >> k & 1 else squares if k == second else state for k in range(3)]
    storages = tuple(_native._C.storages()[s] for s in (param, grad, *kinds, "f32"))
    ways: list[tuple[str, Any, int, Any]] = []
    if not is_own(rule):
        handle = _native._C.find_rule(rule.name)
        row = [float(number(group[h.key], h)) for h in rule.row]
        ways.append(("written", handle, handle.program_of([row[0], 0.0, *row[1:]]), None))
    own = libraries.handle(rule, [program], None)
    ways.append(("printed", own, 0, triton_module.functions_of([program])))
    for way, handle, variant, functions in ways:
        begun = time.perf_counter()
        compiled = generate(handle, ((storages, 0, variant, mask),), arch=arch, functions=functions)
        seconds = time.perf_counter() - begun
        registers, spilled, each = figures(compiled, folder)
        yield f"| {name} | {scheme} | {way} | {seconds:.1f} | {registers} | {spilled} | {each:.1f} |"


def number(value: Any, hyper: Any) -> Any:
    """A group's value of one column, for a row as kernels take it."""
    if value is None:
        return hyper.off_number
    return value if hyper.index < 0 else value[hyper.index]


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.triton_compile", description=__doc__)
    p.add_argument("--arch", type=int, default=90, help="compute capability, as in 90 (default)")
    p.add_argument("--own", nargs="*", metavar="CLASS", help="what is printed of these optimizers (default: of all)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        generate("clip", (kind(0, 0, 0, 0, 0),), arch=args.arch)  # Triton's own start
        if args.own is not None:
            print("| rule | storages | functions | seconds | registers | spilled bytes | instructions per element |")
            print("|---|---|---|---:|---:|---:|---:|")
            for name, options in OWN:
                for scheme in OWN_SCHEMES if not args.own or name in args.own else ():
                    print(*own_lines(name, options, scheme, args.arch, Path(cache)), sep="\n", flush=True)
            return
        print("| rule | storages | seconds | registers | instructions per element |\n|---|---|---:|---:|---:|")
        for rule in RULES:
            for scheme in SCHEMES:
                begun = time.perf_counter()
                compiled = generate(rule, (stored(rule, scheme),), arch=args.arch)
                seconds = time.perf_counter() - begun
                registers, _, each = figures(compiled, Path(cache))
                print(f"| {rule} | {scheme} | {seconds:.1f} | {registers} | {each:.1f} |")


if __name__ == "__main__":
    main()

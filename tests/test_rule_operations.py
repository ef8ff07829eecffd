"""Every operation that a rule may use has, printed as C++, the bits of torch's own on the CPU, with an IEEE root."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CAPABILITIES, assert_same_numbers

from fusedoptim import Rule
from fusedoptim.own_rules import compiler
from fusedoptim.own_rules.cpp import CppPrinter
from fusedoptim.own_rules.nodes import Graph, Kind
from fusedoptim.own_rules.paths import Path as Way
from fusedoptim.own_rules.tensors import Elements, tensor_node
from fusedoptim.own_rules.trace import Program
from fusedoptim.rule_functions import Call, calling

#: Of x, y and z, which are any numbers. Methods, functions, operators; in place and not.
OPERATIONS: dict[str, Any] = {
    "add": lambda x, y, z: x.add(y),
    "add alpha": lambda x, y, z: torch.add(x, y, alpha=-0.3),
    "add number": lambda x, y, z: x + 0.1,
    "number add": lambda x, y, z: 0.1 + x,
    "sub": lambda x, y, z: x.sub(y),
    "sub alpha": lambda x, y, z: x.sub(y, alpha=0.7),
    "sub number": lambda x, y, z: x - 0.1,
    "number sub": lambda x, y, z: 0.1 - x,
    "rsub": lambda x, y, z: torch.rsub(x, y, alpha=0.7),
    "mul": lambda x, y, z: x * y,
    "mul number": lambda x, y, z: x.mul(1 / 3),
    "div": lambda x, y, z: x / y,
    "div number": lambda x, y, z: x.div(1 / 3),
    "number div": lambda x, y, z: 0.3 / x,
    "neg": lambda x, y, z: -x,
    "abs": lambda x, y, z: abs(x),
    "sign": lambda x, y, z: x.sign(),
    "sqrt": lambda x, y, z: x.abs().sqrt(),
    "sqrt of any": lambda x, y, z: torch.sqrt(x),
    "rsqrt": lambda x, y, z: x.abs().rsqrt(),
    "square": lambda x, y, z: x.square(),
    "power 2": lambda x, y, z: x**2,
    "power 3": lambda x, y, z: x.pow(3),
    "power 0.5": lambda x, y, z: x**0.5,
    "power -0.5": lambda x, y, z: x**-0.5,
    "power -1": lambda x, y, z: x**-1,
    "reciprocal": lambda x, y, z: x.reciprocal(),
    "addcmul": lambda x, y, z: x.addcmul(y, z, value=0.3),
    "addcmul of one": lambda x, y, z: torch.addcmul(x, y, z),
    "addcdiv": lambda x, y, z: x.addcdiv(y, z, value=-0.3),
    "addcdiv of one": lambda x, y, z: torch.addcdiv(x, y, z),
    "lerp from the start": lambda x, y, z: x.lerp(y, 0.1),
    "lerp from the end": lambda x, y, z: torch.lerp(x, y, 0.9),
    "lerp of the middle": lambda x, y, z: x.lerp(y, 0.5),
    "lerp by elements": lambda x, y, z: x.lerp(y, z),
    "maximum": lambda x, y, z: torch.maximum(x, y),
    "minimum": lambda x, y, z: x.minimum(y),
    "copysign": lambda x, y, z: x.copysign(y),
    "copysign number": lambda x, y, z: x.copysign(-1.0),
    "clamp": lambda x, y, z: x.clamp(-0.5, 0.5),
    "clamp min": lambda x, y, z: x.clamp(min=0),
    "clamp max": lambda x, y, z: torch.clamp(x, max=0.0),
    "clamp_min": lambda x, y, z: x.clamp_min(0.25),
    "clamp the wrong way": lambda x, y, z: x.clamp(0.5, -0.5),
    "where": lambda x, y, z: torch.where(x > y, x, z),
    "where number": lambda x, y, z: torch.where(x <= 0, 0.3, y),
    "where method": lambda x, y, z: x.where(y < z, 1.0),
    "masks": lambda x, y, z: torch.where(((x < y) | ~(y >= z)) & (x != z), x, y),
    "exclusive or": lambda x, y, z: torch.where((x < y) ^ (y >= z), x, z),
    "logical_xor": lambda x, y, z: torch.where(torch.logical_xor(x < y, ~(y >= z)), x, z),
    "xor in place": lambda x, y, z: torch.where(_xor_in_place(x < y, y >= z), x, z),
    "where of masks": lambda x, y, z: torch.where(torch.where(x < y, y < z, x < z), x, y),
    "masks compared": lambda x, y, z: torch.where((x < y) == (y < z), x, y) + torch.where((x < y) < (y < z), x, y),
    "mask and elements": lambda x, y, z: (x > 0) / z + torch.addcmul(x, y > 0, z, value=0.3) + torch.maximum(y > 0, z),
    "equal": lambda x, y, z: torch.where(x == y, z, x),
    "mask times": lambda x, y, z: (x * y > 0) * z,
    "mask to": lambda x, y, z: (x > 0).to(x.dtype),
    "masked_fill": lambda x, y, z: x.masked_fill(x.isnan(), 0.5),
    "isfinite": lambda x, y, z: torch.where(x.isfinite(), x, y),
    "functions in place": lambda x, y, z: torch.neg_(torch.sqrt_(torch.abs_(torch.clamp_(x.clone(), max=2.0)))),
    "keywords": lambda x, y, z: torch.lerp(
        input=torch.add(input=x, other=y, alpha=0.3), end=torch.sqrt(input=torch.abs(input=z)), weight=0.3
    ),
    "more keywords": lambda x, y, z: torch.addcdiv(
        input=torch.where(condition=x < y, input=x, other=z), tensor1=y, tensor2=z, value=0.3
    ),
    "keywords of roots": lambda x, y, z: torch.rsqrt(input=z.abs()) + torch.pow(input=y, exponent=0.5),
    "keywords of methods": lambda x, y, z: x.where(condition=y < z, other=y).copysign(other=z).clone().fill_(value=0.1),
    "rsqrt in place": lambda x, y, z: torch.rsqrt_(x.clone()) + y.clone().rsqrt_() + torch.square(z),
    "copies": lambda x, y, z: _copies(x.clone(), y),
    "in place": lambda x, y, z: x.clone().mul_(0.9).add_(y, alpha=0.1).sqrt_().clamp_(max=2.0),
    "operators in place": lambda x, y, z: _in_place(x.clone(), y),
    "filled": lambda x, y, z: torch.full_like(x, 0.1) + torch.ones_like(x) - torch.zeros_like(y),
    "copied": lambda x, y, z: x.clone().copy_(y),
}
N = 1 << 13


def _xor_in_place(x: Any, y: Any) -> Any:
    x ^= y
    return x


def _copies(x: Any, y: Any) -> Any:
    """Of which the first has the same memory, and so has no copy of a conversion that asks for one."""
    copy.copy(x).add_(y)
    copy.deepcopy(x).add_(y)
    x.to(x.dtype, copy=True).add_(y)
    return x


def _in_place(x: Any, y: Any) -> Any:
    x += y
    x *= 0.7
    x -= 1
    x /= y
    return x


def numbers(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of all sizes, a fifth of them special."""
    g = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 0.5, 1e-40, -1e-42, 3e38])
    found = []
    for _ in range(3):
        x = torch.randn(N, generator=g, dtype=dtype) * 10.0 ** torch.randint(-6, 7, (N,), generator=g).to(dtype)
        at = torch.rand(N, generator=g) < 0.2
        x[at] = special.to(dtype)[torch.randint(len(special), (int(at.sum()),), generator=g)]
        found.append(x)
    found[1][:512] = found[0][:512]  # equal ones
    return found


def program() -> Program:
    """Sums are what a printed rule gives out as it is: here the results of all operations."""
    rule = Rule("operations", lambda *_: None, sums=len(OPERATIONS))
    graph = Graph()
    way = Way(graph, [], {})
    x, y = (Elements(way, graph.make(leaf, Kind.TENSOR)) for leaf in ("param", "grad"))
    z = Elements(way, graph.make("state", Kind.TENSOR, data="z"))
    rule = dataclasses.replace(rule, states=(_State("z"),))
    results = tuple(tensor_node(way, f(*map(_copy, (x, y, z)))) for f in OPERATIONS.values())
    return Program(rule, (), (), ("z",), (), False, x.node, {"z": z.node}, {}, results)


def _copy(x: Elements) -> Elements:
    return Elements(x._path, x.node)


def _State(name: str) -> Any:
    from fusedoptim import State

    return State(name)


HARNESS = """
#include "cpu/own_program.h"
#include "rules/printed.h"
using namespace fusedoptim;
struct Own {
%s
};
using M = lanes::%s;
extern "C" __attribute__((visibility("default"))) void run(const M::T* x, const M::T* y, const M::T* z, M::T* out,
                                                            int64_t n) {
  const StepInputs in{};
  HyperRow row;
  StepInputs with_row = in;
  with_row.hyper = row.value;
  const auto c = Own::prepare<M::T>(with_row);
  for (int64_t i = 0; i < n; i += M::width) {
    M::V s[1] = {M::load(z + i)}, found[Own::sums];
    Own::measured<M>(M::load(x + i), M::load(y + i), s, c, found);
    for (int k = 0; k < Own::sums; ++k) M::store(out + k * n + i, found[k]);
  }
}
"""


@pytest.mark.skipif(compiler.problem() is not None, reason="rules cannot be compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_operation_has_torchs_bits(capability: str, dtype: torch.dtype, tmp_path: Path) -> None:
    members = CppPrinter(program()).rule()
    library = tmp_path / "operations.so"
    compiler._compile(HARNESS % (members, "F32" if dtype == torch.float32 else "F64"), capability, library)
    out = torch.empty(len(OPERATIONS), N, dtype=dtype)
    x, y, z = numbers(dtype)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, z, out)]
    ctypes.CDLL(str(library)).run(*pointers, ctypes.c_int64(N))
    for (name, f), mine in zip(OPERATIONS.items(), out, strict=True):
        with calling(Call(N)):
            theirs = f(x.clone(), y.clone(), z.clone()).to(dtype)
        assert_same_numbers(mine, theirs, name)

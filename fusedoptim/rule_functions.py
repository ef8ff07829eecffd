"""What the function of a rule may call beside torch's own operations."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from ._doubles import Double

__all__ = ["correctly_rounded_sqrt", "double", "mean_square", "norm", "sum_of_squares", "to_fp32"]


def norm(x: Tensor) -> float:
    """The 2-norm of a whole tensor, the shards that other processes have included: a number, the fp64 square root of
    :func:`sum_of_squares`. A rule that calls it says in ``Rule.sums`` how often it calls this or :func:`mean_square`.
    ``ratio = norm(p) / norm(g)``, with ``Rule(..., sums=2)``.

    Args:
        x: fp32 or fp64, of the parameter's shape.

    Returns:
        The number, in double.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(norm, (x,), x)
    return Double(math.sqrt(_whole_sum(x)[0]))


def mean_square(x: Tensor) -> float:
    """The mean of the squares of a whole tensor, as :func:`norm` measures it: of a mask, the share of elements where
    it holds. ``share = mean_square((g * p > 0).to(g.dtype))``, with ``Rule(..., sums=1)``.

    Args:
        x: fp32 or fp64, of the parameter's shape.

    Returns:
        The number, in double; 0 of no elements.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(mean_square, (x,), x)
    total, numel = _whole_sum(x)
    return Double(total / numel if numel else 0.0)


def to_fp32(x: float) -> float:
    """A number rounded to the nearest fp32 value, infinite beyond fp32's range. ``rate = to_fp32(h["lr"] / t)`` rounds
    where fp32 arithmetic would.

    Args:
        x: a number of the group, of the step or made of such.

    Returns:
        The number, in double.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(to_fp32, (x,), x)
    try:
        return Double(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return Double("inf" if x > 0 else "-inf")


def double(x: Any) -> float:
    """The number that a learning rate stands for, which may be a tensor and then rounds to its dtype what is computed
    with it. ``double(h["lr"]) * t``.

    Args:
        x: a number, or a tensor of one element.

    Returns:
        The number, in double.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(double, (x,), x)
    return Double(x)


def correctly_rounded_sqrt(x: Tensor) -> Tensor:
    """The square root rounded to nearest, as IEEE 754 asks. Within a rule ``x.sqrt()`` and
    ``correctly_rounded_sqrt(x)`` are the same when compiled.

    Args:
        x: fp32 or fp64, of any shape.

    Returns:
        A new tensor of that dtype and shape.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(correctly_rounded_sqrt, (x,), x)
    if x.dtype != torch.float64:
        return x.double().sqrt().to(x.dtype)  # two roundings are as one: 53 bits >= 2*24 + 2
    # The library's root r is at most one unit off. x - r*r is exact as an fma; compare it with the distance to the
    # midpoints between r and its neighbours. Tiny x are scaled, so that the difference does not underflow.
    tiny = x < 2.0**-900
    scaled = torch.where(tiny, x * 2.0**200, x)
    r = scaled.sqrt()
    rest = torch.addcmul(scaled, r, r, value=-1)
    up = torch.nextafter(r, torch.full_like(r, torch.inf))
    down = torch.nextafter(r, torch.zeros_like(r))
    result = torch.where(rest > r * (up - r), up, torch.where(rest <= -(r * (r - down)), down, r))
    result = torch.where((x == 0) | torch.isinf(r) | torch.isnan(r), r, result)
    return torch.where(tiny, result * 2.0**-100, result)


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of squares of a tensor, fp64, with bits that do not depend on who computes it.

    Elements in logical order, squares in fp64; tiles of 1024, padded with zeros, summed by halving (i with i+512, then
    i with i+256, ...); the tile sums in the same way, until one number is left.
    ``sum_of_squares(g).sqrt()`` is the norm.

    Args:
        x: of any shape and float dtype; of no elements the sum is 0.

    Returns:
        A 0-dim tensor, fp64, on its device.
    """
    x = x.detach().reshape(-1).to(torch.float64)
    if x.numel() == 0:
        return x.new_zeros(())
    x = x * x
    while True:
        x = torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024)
        for half in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
            x = x[:, :half] + x[:, half : 2 * half]
        x = x.reshape(-1)
        if x.numel() == 1:
            return x[0]


# ---- one call of a rule's function on tensors ----


@dataclass
class Call:
    """What it asks for of whole tensors, where it gets a process's part of them."""

    #: Elements of the whole tensor.
    numel: int
    #: The sums of squares of what it calls norm() and mean_square() with, in the order of the calls, as far as they
    #: were measured: others are those of the tensors it has.
    sums: Sequence[float] = ()
    #: Those of the tensors it has.
    found: list[Tensor] = field(default_factory=list)


class _Current(threading.local):
    call: Call | None = None


_current = _Current()


def _whole_sum(x: Tensor) -> tuple[float, int]:
    """The sum of squares of the whole tensor, and its elements."""
    call = _current.call
    if call is None:
        return float(sum_of_squares(x)), x.numel()
    k = len(call.found)
    call.found.append(sum_of_squares(x))
    return float(call.sums[k] if k < len(call.sums) else call.found[k]), call.numel


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """For the duration of a call. Roots are IEEE's within it: torch's own on the CPU are MKL's, of which every fifth is
    off by a unit in its last place."""
    before, _current.call = _current.call, call
    try:
        with _IeeeRoots():
            yield
    finally:
        _current.call = before


class _IeeeRoots(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, x = _ROOTS.get(function), args[0] if args else kwargs.get("input")
        if name is None or not (isinstance(x, Tensor) and x.is_floating_point()):
            return function(*args, **kwargs)
        exponent = {"sqrt": 0.5, "rsqrt": -0.5}.get(name)
        if exponent is None:
            exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
            if isinstance(exponent, Tensor) or exponent not in (0.5, -0.5):
                return function(*args, **kwargs)
        result = correctly_rounded_sqrt(x)
        if exponent == -0.5:
            result = result.reciprocal_()
        if function in _IN_PLACE:
            return x.copy_(result)
        out = kwargs.get("out")
        return result if out is None else out.copy_(result)


_ROOTS: dict[Any, str] = {
    **dict.fromkeys((torch.sqrt, Tensor.sqrt, Tensor.sqrt_, torch.sqrt_), "sqrt"),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt, Tensor.rsqrt_, torch.rsqrt_), "rsqrt"),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__, Tensor.pow_, Tensor.__ipow__), "pow"),
}
_IN_PLACE = {Tensor.sqrt_, torch.sqrt_, Tensor.rsqrt_, torch.rsqrt_, Tensor.pow_, Tensor.__ipow__}

"""Learning-rate schedules for any torch optimizer."""

from __future__ import annotations

import math
import operator

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ._values import number

__all__ = ["warmup_cosine"]


class _WarmupCosine:
    """A group's lr at a step, as a multiple of its own. An object, because LambdaLR saves no function."""

    #: At step 0; None for 1 / (warmup_steps + 1). Also that of objects pickled without it.
    start: float | None = None

    def __init__(self, warmup_steps: int, total_steps: int, floor: float, start: float | None) -> None:
        self.warmup_steps, self.total_steps, self.floor, self.start = warmup_steps, total_steps, floor, start

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            if self.start is None:
                return (step + 1) / (self.warmup_steps + 1)
            return self.start + (1 - self.start) * (step / self.warmup_steps)
        if step >= self.total_steps:
            return self.floor
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return (1 + self.floor) / 2 + (1 - self.floor) / 2 * math.cos(math.pi * done)


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr: float = 0.0, start_lr: float | None = None
) -> LambdaLR:
    r"""Linear warm-up, then a cosine down to ``min_lr``: call its ``step()`` after every step of the optimizer.
    ``schedule = warmup_cosine(optimizer, warmup_steps=2000, total_steps=100000)``.

    With a group's own learning rate ``lr``, warm-up ``w`` and total ``T``, step ``t`` (counted from 0) is taken with

    .. math::
        \mathrm{lr}_t = \begin{cases}
            \mathrm{lr} \cdot (t + 1) / (w + 1) & t < w \\
            \mathrm{min\_lr} + \tfrac{1}{2} (\mathrm{lr} - \mathrm{min\_lr})
            \left(1 + \cos\left(\pi \frac{t - w}{T - w}\right)\right) & w \le t < T \\
            \mathrm{min\_lr} & t \ge T
        \end{cases}

    so that it is ``lr / (w + 1)`` in the first step and ``lr`` at step ``w``. With ``start_lr`` the first line is
    ``start_lr + (lr - start_lr) * t / w``, hence ``lr * t / w`` with 0. The cosine is that of SGDR (arXiv:1608.03983,
    equation 5), without restarts; the warm-up that of arXiv:1706.02677, section 2.2, begun one part above zero, so that
    the first step does something. Values are computed as multiples of ``lr`` in double, so that they are these to
    within rounding.

    Args:
        optimizer: any torch optimizer. A group's own learning rate is its ``initial_lr`` where an earlier schedule, or
            a checkpoint, left one, else its ``lr``, a float or a one-element tensor.
        warmup_steps: steps of warm-up, 0 for none.
        total_steps: the step from which on the learning rate is ``min_lr``; more than ``warmup_steps``.
        min_lr: the last learning rate: this very value for every group, whatever its own.
        start_lr: that of step 0, likewise this very value for every group; None for ``lr / (w + 1)``. Without warm-up
            step 0 has ``lr``.

    Returns:
        A LambdaLR. Its state_dict holds plain numbers; loaded into a schedule of another length it brings its own.

    Raises:
        TypeError: if a number of steps is no integer, or ``optimizer`` no optimizer.
        ValueError: for numbers out of range, and for a group whose own learning rate, which is the highest of the
            schedule, is below ``min_lr`` or ``start_lr``.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, but is a {type(optimizer).__name__}")
    warmup_steps, total_steps = _count(warmup_steps, "warmup_steps"), _count(total_steps, "total_steps")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, but is {warmup_steps}")
    if total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps must be more than warmup_steps, but they are {total_steps} and {warmup_steps}: it counts all "
            "steps, those of the warm-up as well"
        )
    min_lr, start_lr = number(min_lr), None if start_lr is None else number(start_lr)
    ends = {"min_lr": min_lr, "start_lr": start_lr}
    for name, end in ends.items():
        if end is not None and not 0 <= end < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, but is {end}")
    lrs = [number(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for index, lr in enumerate(lrs):
        for name, end in ends.items():
            if end is not None and lr < end:
                raise ValueError(
                    f"the learning rate of parameter group {index} is {lr}, below {name}={end}, though it is the "
                    f"highest of the schedule: choose a smaller {name}, or a larger learning rate for the group"
                )
    factors = []
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        # LambdaLR multiplies it by floats, which neither a Decimal does, nor a NumPy scalar in double.
        if not isinstance(group.get("initial_lr", group["lr"]), (int, float, Tensor)):
            group["initial_lr"] = lr
        start = None if start_lr is None else _multiple(start_lr, lr)
        factors.append(_WarmupCosine(warmup_steps, total_steps, _multiple(min_lr, lr), start))
    return LambdaLR(optimizer, list(factors))


def _multiple(value: float, lr: float) -> float:
    return value / lr if lr else 1.0


def _count(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but is {value!r}: it counts steps of the optimizer") from None

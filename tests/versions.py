"""What a step tells autograd of: everything that it writes to, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, assert_same_raw, gradient, parameters

from fusedoptim._blocks import slot_of

#: What takes a state out of use, which then stays as it is; of all others it is the average.
UNUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Adam": ({"amsgrad": False}, "max_exp_avg_sq"),
    "AdamW": ({"amsgrad": False}, "max_exp_avg_sq"),
    "SGD": ({"momentum": 0.0, "dampening": 0.0}, "momentum_buffer"),
    "RMSprop": ({"centered": False}, "grad_avg"),
}
AVERAGE: tuple[dict[str, Any], str] = ({"ema_decay": None}, "ema")


class Saved:
    """A graph that has saved a tensor for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version, self.value = tensor, tensor._version, tensor.detach().clone()
        factor = torch.ones(tensor.shape, device=tensor.device, requires_grad=True)  # codes have no gradient
        self.loss = (factor * tensor.detach()).sum()

    def check(self, written: bool, what: str) -> None:
        if not written:
            assert self.tensor._version == self.version, what
            assert_same_raw(self.tensor, self.value, what)
            self.loss.backward()
            return
        assert self.tensor._version > self.version, what
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            self.loss.backward()


#: Of parameters with and without a gradient, and of one that never had any before.
SHAPES = [(5,), (3, 4), (7,), (2, 2)]


def check_versions(
    case: Case, backend: str, options: dict[str, Any], shapes: Any = SHAPES, dtype: torch.dtype = torch.float32
) -> None:
    """Of four parameters, each with all states that it can have."""
    params = parameters(shapes, dtype)
    optimizer = case.make(params, backend=backend, **{"ema_decay": 0.9, **options})
    for step, active in enumerate(([0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2], [1])):
        unused = None
        if step == 3:
            values, unused = UNUSED.get(case.optimizer, AVERAGE)
            optimizer.param_groups[0].update(values)
        for i, p in enumerate(params):
            p.grad = gradient(p, step, i) if i in active else None
        saved: dict[tuple[int, str], Saved] = {}
        for i, p in enumerate(params):
            saved[i, "parameter"] = Saved(p)
            if p.grad is not None:
                saved[i, "gradient"] = Saved(p.grad)
            for name, value in optimizer.state.get(p, {}).items():
                saved[i, name] = Saved(value)
        assert step == 0 or (0, "ema") in saved
        optimizer.step()
        for (i, name), s in saved.items():
            if name == "ema" and step == 0:  # the one made with the optimizer is replaced then
                continue
            slot = slot_of(name)
            written = i in active and slot != unused
            if name == "gradient":
                written = bool(options.get("zero_grad_in_step"))
            elif step == 4 and slot == UNUSED.get(case.optimizer, AVERAGE)[1]:
                written = False
            s.check(written, f"step {step}, {name} of parameter {i}")

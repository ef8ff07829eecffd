"""``optimizer.memory()``: the bytes of everything that an optimizer holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FULL, Case, parameters, set_gradients
from torch.testing._internal.two_tensor import TwoTensor

import fusedoptim
from fusedoptim import AdamW

SHAPES = [(5,), (3, 4), ()]


def sizes(o: fusedoptim.FusedOptimizer) -> dict[str, int]:
    """The states' bytes, of tensors that share nothing."""
    found: dict[str, int] = {}
    for values in o.state.values():
        for name, value in values.items():
            found[name] = found.get(name, 0) + value.numel() * value.element_size()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.float32, "ema_decay": 0.5}], ids=["plain", "more"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_what_is_to_come_comes(case: Case, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = parameters(SHAPES, dtype)
    o = case.make(p, **options)
    before = o.memory()
    n = 18 * dtype.itemsize
    assert (before.parameters, before.gradients, before.states) == (n, 0, sizes(o))
    set_gradients(p, 0)
    o.step()
    after = o.memory()
    assert after.states == sizes(o) == before.states | before.to_come
    assert (after.parameters, after.gradients, after.to_come) == (n, n, {})
    assert after.total == 2 * n + sum(sizes(o).values())


def test_only_what_can_be_stepped_is_to_come() -> None:
    p = parameters([(2,), (3,), (4,), (5,)])
    p[0].requires_grad_(False)
    o = AdamW([{"params": p[:2]}, {"params": p[2:], "amsgrad": True}])
    assert o.memory().to_come == {"step": 12, "exp_avg": 48, "exp_avg_sq": 48, "max_exp_avg_sq": 36}
    p[2].grad = torch.ones(4)
    o.step()
    assert o.memory().states == {"step": 4, "exp_avg": 16, "exp_avg_sq": 16, "max_exp_avg_sq": 16}
    assert o.memory().to_come == {"step": 8, "exp_avg": 32, "exp_avg_sq": 32, "max_exp_avg_sq": 20}
    o.zero_grad()
    assert o.memory().gradients == 0
    o.param_groups[1]["amsgrad"] = False
    assert "max_exp_avg_sq" in o.memory().states and "max_exp_avg_sq" not in o.memory().to_come


def test_shared_memory_counts_once_and_whole() -> None:
    """As of steps on a GPU, which are views of one buffer, and of gradients in a bucket."""
    p = parameters([(2,), (3,)])
    o = AdamW(p)
    bucket = torch.ones(8)
    p[0].grad, p[1].grad = bucket[:2], bucket[2:5]
    o.step()
    steps = torch.ones(2)
    for values, step in zip(o.state.values(), steps.unbind(), strict=True):
        values["step"] = step
    assert o.memory().states["step"] == 8
    assert o.memory().gradients == 32


def test_other_peoples_entries_count_too() -> None:
    p = parameters([(2,)])
    o = AdamW(p)
    o.state[p[0]] = {"slow_buffer": torch.ones(3), "count": 1}
    assert o.memory().states == {"slow_buffer": 12}
    assert list(o.memory().to_come) == ["step", "exp_avg", "exp_avg_sq"]


def test_it_creates_nothing() -> None:
    p = parameters([(2,)])
    o = AdamW(p)
    o.memory()
    assert not o.state and p[0].grad is None


def test_what_a_model_without_memory_would_take() -> None:
    o = AdamW(
        [torch.nn.Parameter(torch.empty(1 << 40, dtype=torch.bfloat16, device="meta"))], state_dtype=torch.float32
    )
    assert (o.memory().total, o.memory().to_come) == (0, {"step": 4, "exp_avg": 4 << 40, "exp_avg_sq": 4 << 40})


def test_parameters_without_ordinary_memory() -> None:
    """None of which can be stepped as it is, but a frozen one may be in a group."""
    o = AdamW(parameters([(2,)]))
    frozen = [
        torch.nn.LazyLinear(2).weight,
        torch.nn.Parameter(torch.ones(9, device="meta")),
        torch.nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
        torch.nn.Parameter(TwoTensor(torch.ones(7), torch.ones(7)), requires_grad=False),
    ]
    o.param_groups[0]["params"] += frozen
    frozen[1].requires_grad_(False)
    assert o.memory().parameters == 8 + 3 * (2 * 8 + 4) + 2 * 7 * 4
    assert o.memory().to_come == {"step": 4, "exp_avg": 8, "exp_avg_sq": 8}


def test_a_small_part_of_a_buffer_counts_as_the_whole() -> None:
    assert AdamW([torch.nn.Parameter(torch.ones(100)[:2])]).memory().parameters == 400


def test_a_trainable_parameter_of_another_layout_gets_no_states() -> None:
    o = AdamW(parameters([(2,)]))
    before = o.memory().to_come
    o.param_groups[0]["params"].append(torch.nn.Parameter(torch.eye(3).to_sparse()))
    assert o.memory().to_come == before == {"step": 4, "exp_avg": 8, "exp_avg_sq": 8}


def test_it_prints_as_a_table() -> None:
    o = AdamW([torch.nn.Parameter(torch.ones(1 << 18))])
    assert str(o.memory()).split("\n") == [
        "parameters               1.00 MiB     4.00 B/element",
        "gradients                     0 B     0.00 B/element",
        "total                    1.00 MiB     4.00 B/element",
        "step (to come)                4 B     0.00 B/element",
        "exp_avg (to come)        1.00 MiB     4.00 B/element",
        "exp_avg_sq (to come)     1.00 MiB     4.00 B/element",
    ]
    o.param_groups[0]["params"][0].grad = torch.ones(1 << 18)
    o.step()
    assert str(o.memory()).split("\n") == [
        "parameters     1.00 MiB     4.00 B/element",
        "gradients      1.00 MiB     4.00 B/element",
        "step                4 B     0.00 B/element",
        "exp_avg        1.00 MiB     4.00 B/element",
        "exp_avg_sq     1.00 MiB     4.00 B/element",
        "total          4.00 MiB    16.00 B/element",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 << 30, "3.00 GiB"), (5 << 40, "5.00 TiB")],
    ids=str,
)
def test_units(size: int, text: str) -> None:
    assert str(fusedoptim._footprint.Footprint(size, 0, {}, {})).startswith(f"parameters {text:>12} ")


@pytest.mark.gpu
def test_steps_on_a_gpu_are_counted_as_one_buffer() -> None:
    p = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (2, 3, 4)]
    o = AdamW(p)
    set_gradients(p, 0)
    o.step()
    assert o.memory().states == {"step": 12, "exp_avg": 36, "exp_avg_sq": 36}

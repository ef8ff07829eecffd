"""Rules that are compiled later, and ask for sums of squares over whole tensors, or have states that are numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import ALL, COVERING, assert_same_optimizers, parameters, set_gradients
from layouts import LAYOUTS
from own_programs import Programs, needs_compiler
from ranks import run
from sharded_models import mesh

from fusedoptim import FusedOptimizer, Rule, State, _native, mean_square, norm, to_fp32
from fusedoptim._own_groups import completed
from fusedoptim.reference import sum_of_squares

pytestmark = needs_compiler
CAPABILITIES = _native._C.cpu_capabilities()[: 1 if COVERING else None] if _native._C else []
DEFAULTS = {"lr": 0.01, "beta": 0.9, "slow": False}


def trust(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    s["momentum"].lerp_(g, 1 - h["beta"])
    size, mean = norm(p), mean_square(s["momentum"])
    ratio = size / mean**0.5 if mean > 0 else 1.0
    if h["slow"]:
        s["ratio"] = ratio = to_fp32(0.9 * s["ratio"] + 0.1 * ratio)
    p.add_(s["momentum"], alpha=-h["lr"] * ratio)


class Trust(FusedOptimizer):
    rule = Rule(
        "trust by hand",
        trust,
        states=(State("momentum"),),
        numbers=(State("ratio", needed=lambda group: bool(group["slow"]), initial=1.0),),
        sums=2,
    )

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, dict(DEFAULTS), options)  # type: ignore[arg-type]


def programs() -> Programs:
    return Programs("trust", completed(Trust.rule, DEFAULTS), [[]], states=1)


def two(shapes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    found = []
    for backend in (None, "reference"):
        params = parameters(shapes, dtype)
        groups = [{"params": params[:2], "slow": True}, {"params": params[2:], "beta": 0.4}]
        found.append((params, Trust(groups, backend=backend, **options)))
    return found[0], found[1]


def steps(one: Any, other: Any, count: int = 4) -> None:
    for step in range(count):
        for params, optimizer in (one, other):
            set_gradients(params, step)
            if step == 2:
                params[1].grad = None
            optimizer.step()
    assert_same_optimizers(one[1], other[1])
    assert "ratio" in one[1].state[one[0][0]] and "ratio" not in one[1].state[one[0][-1]]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_bits_are_the_references(capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native._C.set_cpu_capability(capability)
    shapes = [(7, 11), (2050,), (), (0,), (1024,), (33, 170)]
    with programs().in_use(monkeypatch):
        steps(*two(shapes, dtype))
        steps(*two(shapes, dtype, **ALL))


@pytest.mark.parametrize(
    "options",
    [
        {"master": "remainder", "state_dtype": torch.bfloat16, "rounding": {"momentum": "stochastic"}},
        {"master": "remainder8", "state_dtype": "int8"},
        {"rounding": "stochastic", "state_dtype": "int8", "clip_grad_value": 0.1},
    ],
    ids=["stochastic state", "8 bits", "8 bits, stochastic"],
)
def test_storages(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 1024 elements begin and end within rows and blocks."""
    with programs().in_use(monkeypatch):
        steps(*two([(40, 130), (3, 5000), (33, 128), (100, 64), (9,)], torch.bfloat16, **options))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["plain", "8 bits"])
def test_layouts(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums go by the logical order, whatever that of memory is."""
    with programs().in_use(monkeypatch):
        one, other = two([(5, 7, 8, 16)] * len(LAYOUTS), **options)
        for params, _ in (one, other):
            for p, layout in zip(params, LAYOUTS.values(), strict=True):
                p.data = layout(p.detach())
        steps(one, other)


@pytest.mark.parametrize("threads", [1, 3])
def test_windows_and_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step goes through tensors of 8 MiB at a time, and has the sums of each before it updates it."""
    torch.set_num_threads(threads)
    with programs().in_use(monkeypatch):
        steps(*two([(300_001,), (500_000,), (7,), (250, 1000), (1_000_003,)]), count=2)


def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum is measured in a row of its own, one after the other."""
    with programs().in_use(monkeypatch):
        one, other = two([(7, 11), (2050,), (0,), (1024,)], max_grad_norm=0.5)
        for step in range(3):
            for params, _ in (one, other):
                set_gradients(params, step)
                params[3].grad = None if step == 1 else params[3].grad
            other[1].step()
            if step == 0:
                one[1].step()
                continue
            (runner,) = one[1]._runners
            assert runner.refresh(one[1].param_groups, one[1].state)
            runner.measure(None)
            first = runner.sums
            assert first.tolist() == [0 if p.grad is None else sum_of_squares(p.grad).item() for p in one[0]]
            runner.reduce()
            runner.measure(0)
            assert runner.sums.data_ptr() == first.data_ptr()
            assert first.tolist() == [0 if p.grad is None else sum_of_squares(p.detach()).item() for p in one[0]]
            runner.measure(1)
            second = runner.sums
            assert second.data_ptr() != first.data_ptr()
            assert (second[:2] > 0).all() and second[2] == 0 and (second[3] > 0) == (step != 1)
            with pytest.raises(ValueError, match="the rule asks for no such sum"):
                runner.measure(2)
            runner.update()
        assert_same_optimizers(one[1], other[1])


# ---- tensors of which other processes have parts ----


def on_ranks(backend: str | None) -> list[torch.Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor

    with pytest.MonkeyPatch.context() as monkeypatch, programs().in_use(monkeypatch):
        whole = parameters([(7, 11), (2051,), (64, 40), (1,)])
        params = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh(2), [Shard(0)])) for p in whole]
        optimizer = Trust([{"params": params[:2], "slow": True}, {"params": params[2:]}], backend=backend)
        for step in range(3):
            set_gradients(whole, step)
            for p, q in zip(params, whole, strict=True):
                p.grad = distribute_tensor(q.grad, mesh(2), [Shard(0)])  # type: ignore[arg-type]
            optimizer.step()
        found = [t for p in params for t in (p, optimizer.state[p]["momentum"])]
        numbers = [optimizer.state[p]["ratio"] for p in params[:2]]
        return [t.to_local().clone() for t in found] + [t.clone() for t in numbers]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_shards_have_the_sums_and_the_elements_of_whole_tensors() -> None:
    for mine, theirs in zip(run(2, on_ranks, None), run(2, on_ranks, "reference"), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)

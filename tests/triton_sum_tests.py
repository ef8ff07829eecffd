"""Rules that ask for sums of squares over whole tensors, in Triton's kernels, against their functions. A test module
that imports this one's names defines the fixture ``kernels`` (see device_tests.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALL, BY_NAME, LOW_SHAPES, Case, assert_same_optimizers, parameters, set_gradients
from layouts import LAYOUTS
from parts_tests import two_ranks  # noqa: F401 - a fixture

from fusedoptim import FusedOptimizer, Rule, State, norm

#: Of two sums, of two in a program with a state that is absent at first, and of one.
SUMMING = [BY_NAME[name] for name in ("lamb_clip", "lars_all", "cautious")]
#: Tiles and their remainders, parts and theirs.
SHAPES = [(0,), (1,), (1023,), (1024,), (1025,), (16384,), (33, 1000)]


def two(kernels: Any, case: Case, shapes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """With parameters of equal values, in two groups; in the second nothing is summed by LAMB and LARS."""
    found = []
    for backend in (kernels.backend, "reference"):
        params = parameters(shapes, dtype)
        groups = [{"params": params[1:]}, {"params": params[:1], "weight_decay": 0.0}]
        found.append((params, case.make(groups, backend=backend, **options)))
    return found


def compare(found: list[Any], steps: int = 2) -> None:
    for step in range(steps):
        for params, optimizer in found:
            set_gradients(params, step)
            if step == 1:
                params[-1].grad = None
            optimizer.step()
    assert_same_optimizers(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("case", SUMMING, ids=str)
def test_sums_of_any_size(kernels: Any, case: Case, dtype: torch.dtype) -> None:
    compare(two(kernels, case, SHAPES, dtype))


@pytest.mark.parametrize("case", SUMMING, ids=str)
def test_sums_are_of_the_gradient_that_the_rule_gets(kernels: Any, case: Case) -> None:
    compare(two(kernels, case, [(7, 11), (17_000,), (40,)], **ALL))


def test_more_sums_of_tiles_than_a_tile_has(kernels: Any) -> None:
    """The tree has another level, for both sums."""
    compare(two(kernels, BY_NAME["lars"], [(3,), (1024 * 1024 + 5,), (7,)]), steps=1)


@pytest.mark.parametrize("case", SUMMING, ids=str)
def test_it_is_one_launch(kernels: Any, case: Case) -> None:
    params, optimizer = two(kernels, case, [(7, 11), (17_000,), (0,)])[0]
    set_gradients(params, 0)
    assert kernels.launches(optimizer) == 1


FEWER_BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "remainder": ("lamb_clip", {"master": "remainder", "state_dtype": torch.bfloat16, "rounding": "stochastic"}),
    "remainder8": ("cautious", {"master": "remainder8", "state_dtype": "int8"}),
    "fp32": ("lars_all", {"master": torch.float32, "state_dtype": torch.float32}),
    "8 bits": ("lars_all", {"rounding": "stochastic", "state_dtype": "int8", "clip_grad_value": 0.1}),
}


@pytest.mark.parametrize("name", FEWER_BITS)
def test_sums_of_what_is_stored_in_fewer_bits(kernels: Any, name: str) -> None:
    """Tiles begin and end within rows and blocks, and rows are of whole blocks or not."""
    case, options = FEWER_BITS[name]
    shapes = [*LOW_SHAPES, (9, 2048), (40, 450)]
    compare(two(kernels, BY_NAME[case], shapes, torch.bfloat16, **options))


@pytest.mark.parametrize(
    "name, options", [("lamb_clip", {}), ("lars_all", {"state_dtype": "int8"}), ("cautious", {"state_dtype": "int8"})]
)
def test_sums_go_by_the_logical_order(kernels: Any, name: str, options: dict[str, Any]) -> None:
    found = two(kernels, BY_NAME[name], [(5, 7, 8, 16)] * len(LAYOUTS), **options)
    for params, _ in found:
        for p, layout in zip(params, LAYOUTS.values(), strict=True):
            p.data = layout(p.detach())
    compare(found)


@pytest.mark.parametrize("case", SUMMING, ids=str)
def test_sums_of_shards_are_of_whole_tensors(kernels: Any, case: Case, two_ranks: Any) -> None:  # noqa: F811
    from torch.distributed.tensor import DTensor, Shard

    found = []
    for backend in (kernels.backend, "reference"):
        whole = parameters([(5,), (7, 11), (2000,), (17_000,)])
        params = [torch.nn.Parameter(DTensor.from_local(p.detach(), two_ranks, [Shard(0)])) for p in whole]
        optimizer = case.make(params, backend=backend, max_grad_norm=0.5)
        for step in range(2):
            set_gradients(whole, step)
            for p, q in zip(params, whole, strict=True):
                p.grad = DTensor.from_local(q.grad, two_ranks, [Shard(0)])
            params[1].grad = None if step == 1 else params[1].grad
            optimizer.step()
        states = [optimizer.state[p][s.name] for p in params for s in optimizer.rule.states]
        found.append([t.to_local() if isinstance(t, DTensor) else t for t in (*(p.detach() for p in params), *states)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def far_from_zero(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    """Whose summed values are none where there are no elements, and follow from a number and from the step."""
    away = norm(g.add(1.0))
    s["size"] = min(norm(s["m"].add(s["size"] * t + 1.0)), 1e3)
    s["m"].add_(g)
    p.add_(s["m"], alpha=-h["lr"] * s["size"] * (away if away < 50 else 1.0))


class FarFromZero(FusedOptimizer):
    rule = Rule("far_from_zero", far_from_zero, states=(State("m"),), numbers=(State("size", initial=0.5),), sums=2)


def test_what_is_summed_may_be_anything_where_there_are_no_elements(kernels: Any) -> None:
    found = []
    for backend in (kernels.backend, "reference"):
        params = parameters([(5,), (1025,), (0,), (17_001,)])
        found.append((params, FarFromZero(params, {"lr": 0.01}, {"backend": backend})))
    compare(found, steps=3)
    assert found[0][1].state[found[0][0][0]]["size"] != 0.5

"""Steps within the backward pass of DistributedDataParallel: replicas are equal, with the bits of ordinary steps."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import replicas
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from replicas import SMALL, contents, groups_of, losses
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fusedoptim import step_in_backward

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 4


def train(kind: type, case: Case, options: dict, passes: int, dtype: torch.dtype, release: bool) -> list[list[Tensor]]:
    model = kind(dtype)
    ddp = DistributedDataParallel(model, **SMALL, **options)
    optimizer = case.make(groups_of(model))
    if release:
        step_in_backward(optimizer, ddp=ddp)
    seen = []
    for step in range(STEPS):
        losses(ddp, step, passes, bool(options.get("static_graph")))[-1].backward()
        assert not release or all(p.grad is None for p in model.parameters())
        if not release or step % 2:
            optimizer.step()
        optimizer.zero_grad()
        seen.append(contents(model, optimizer))
    return seen


def both(kind_name: str, case_name: str, options: dict, passes: int = 1, dtype: Any = torch.float32) -> list[Any]:
    args = (getattr(replicas, kind_name), BY_NAME[case_name], options, passes, dtype)
    return [train(*args, release) for release in (False, True)]


def assert_same(outcomes: list[Any]) -> None:
    """On every rank, released and not, those of the first."""
    first = outcomes[0][0]
    assert len(first[0]) > 5 and not all(map(torch.equal, first[0], first[1]))
    for outcome in outcomes:
        for seen in outcome:
            for one, two in zip(first, seen, strict=True):
                assert len(one) == len(two)
                for a, b in zip(one, two, strict=True):
                    assert_same_bits(a, b)


UNUSED = {"find_unused_parameters": True}
VARIANTS: dict[str, tuple[str, dict, int]] = {
    "plain": ("Plain", {}, 1),
    "accumulated": ("Plain", {}, 3),
    "unused": ("Branches", UNUSED, 1),
    "unused, accumulated": ("Branches", UNUSED, 2),
    "static": ("Branches", {"static_graph": True}, 1),
}


@pytest.mark.parametrize("views", [False, True], ids=["gradients apart", "gradients in buckets"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["adamw", "sgd_momentum"])
def test_the_bits_of_ordinary_steps(variant: str, views: bool, case: str) -> None:
    kind, options, passes = VARIANTS[variant]
    assert_same(ranks.run(2, both, kind, case, {**options, "gradient_as_bucket_view": views}, passes))


@pytest.mark.parametrize("case", [case.name for case in FULL])
def test_every_optimizer(case: str) -> None:
    assert_same(ranks.run(2, both, "Branches", case, UNUSED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert_same(ranks.run(2, both, "Branches", "adamw", UNUSED, 1, dtype))


@pytest.mark.parametrize("batched", [False, True])
def test_means_of_three_round_as_ddps_do(batched: bool) -> None:
    """A third is no number of any float dtype."""
    options = {"gradient_as_bucket_view": True, **({"batched_grad_copy": True} if batched else {})}
    if batched and "batched_grad_copy" not in DistributedDataParallel.__init__.__code__.co_varnames:
        pytest.skip("this torch does not copy gradients in batches")
    assert_same(ranks.run(3, both, "Plain", "adamw", options))

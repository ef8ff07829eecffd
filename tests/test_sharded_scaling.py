"""GradScaler over DTensors: an overflow on one rank is one on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, Case
from ranks import run
from sharded_models import MODELS, built, shard
from test_dtensors import assert_same_shards, shards_of
from test_whole_norms import spoil

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
BAD = 2


def scaled_steps(model: str, case: Case, options: dict[str, Any]) -> list[float]:
    """The scales. Powers of two leave the bits of steps without one."""
    sharded = built(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    mine = case.make(sharded.params, **options)
    scales, gradients = [], []
    for step in range(4):
        for p in sharded.params:
            p.grad = None
        scaler.scale(sharded.loss(step)).backward()
        gradients.append([p.grad.detach() / scaler.get_scale() for p in sharded.params])
        if step == BAD:
            spoil(sharded, 1, torch.inf)
        before = shards_of(sharded, mine)
        scaler.step(mine)
        if step == BAD:
            assert_same_shards(shards_of(sharded, mine), before, "skipped")
        scaler.update()
        scales.append(scaler.get_scale())
    found = shards_of(sharded, mine)
    sharded.restore()
    plain = case.make(sharded.params)
    for step in (0, 1, 3):
        for p, g in zip(sharded.params, gradients[step], strict=True):
            p.grad = g
        plain.step()
    assert_same_shards(found, shards_of(sharded, plain), "scaled")
    assert all(shard(p.grad).isfinite().all() for p in sharded.params)
    return scales


@pytest.mark.parametrize("case", [BY_NAME["adamw"], BY_NAME["norm_adaptive"]], ids=str)
@pytest.mark.parametrize("model", ["fsdp2_empty", "tensor_parallel_and_fsdp2"])
def test_an_overflow_on_one_rank_skips_on_all(model: str, case: Case) -> None:
    for options in ({}, {"amp_in_step": True}, {"amp_in_step": True, "backend": "reference"}):
        for scales in run(MODELS[model][0], scaled_steps, model, case, options):
            assert scales == [8.0, 16.0, 8.0, 8.0], (options, scales)

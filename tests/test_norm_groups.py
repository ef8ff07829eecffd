"""``norm_group=``: norms over what tensors do not show, as pipeline stages, FSDP1 and ZeroRedundancyOptimizer."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from ranks import run
from sharded_models import WIDTH, Sharded, batch, fsdp2, layers, loss_of, mesh, shard, whole
from test_whole_norms import LIMIT, STEPS, assert_norm, assert_same_on_all_ranks, counted, norm_of_all, scaled
from torch import Tensor, nn

import fusedoptim
from benchmarks.witness import witness_step

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def everyones(grads: list[Tensor], group: Any = None) -> list[Tensor]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, grads, group=group)
    return [g for of_rank in found for g in of_rank]


def stage(without: int | None = None) -> list[nn.Parameter]:
    """Of a pipeline: parameters of one process alone, of other shapes and in another number."""
    rank = dist.get_rank()
    params = [nn.Parameter(torch.ones(5 + rank, 3) * 0.5) for _ in range(1 + rank)]
    return params if rank != without else params[:2]


def set_gradients(params: list[nn.Parameter], step: int, without: int | None) -> list[Tensor]:
    for i, p in enumerate(params):
        p.grad = None if dist.get_rank() == without else batch(step, 10 * dist.get_rank() + i, *p.shape)
    return [p.grad.clone() for p in params if p.grad is not None]


def stages(without: int | None, split: bool) -> list[Tensor]:
    """``split``: the sum over a mesh of two dimensions, one after the other."""
    group = [mesh(2, 2).get_group(0), mesh(2, 2).get_group(1)] if split else dist.group.WORLD
    gathers = 2 if split else 1
    norms = []
    for backend in ("cpu", "reference"):
        mine_params, copies = stage(), stage()
        options = {"backend": backend, "max_grad_norm": LIMIT, "skip_nonfinite": True, "norm_group": group}
        mine, witness = BY_NAME["adamw"].make(mine_params, **options), BY_NAME["adamw"].make_torch(copies)
        for step in range(STEPS):
            grads = set_gradients(mine_params, step, without)
            exact = norm_of_all(everyones(grads))
            with counted() as calls:
                norm = fusedoptim.grad_norm(mine_params, group, backend=backend)
            assert len(calls) == gathers
            with counted() as calls:
                mine.step()
            assert len(calls) == gathers or step == 0
            assert_norm(norm, exact)
            assert_same_bits(norm, mine.last_grad_norm)
            returned = fusedoptim.clip_grad_norm_(mine_params, LIMIT, norm_group=group, backend=backend)
            assert_same_bits(norm, returned)
            for p, copy, g in zip(mine_params, copies, grads, strict=False):
                copy.grad = scaled(g, norm, LIMIT)
                assert_same_bits(p.grad, copy.grad, "clipped")
            witness_step(witness)
            norms.append(norm)
        for p, copy in zip(mine_params, copies, strict=True):
            assert_same_bits(p.detach(), copy.detach(), backend)
        before = [p.detach().clone() for p in mine_params]
        set_gradients(mine_params, 0, without)
        if dist.get_rank() == 0:
            mine_params[0].grad[0, 0] = torch.inf
        mine.step()
        assert mine.skipped_steps == 1 and all(map(torch.equal, before, mine_params))
    return norms


@pytest.mark.parametrize("without", [None, 1], ids=["all", "rank 1 without gradients"])
def test_pipeline_stages(without: int | None) -> None:
    assert_same_on_all_ranks(run(2, stages, without, False))


def test_several_groups_one_after_the_other() -> None:
    apart, together = run(4, stages, None, True), run(4, stages, None, False)
    assert_same_on_all_ranks([*apart, *together])  # sums of other orders, which fp32 does not show here


def sharded_stages() -> list[Tensor]:
    """FSDP2 within each stage of a pipeline: the norm is that of all shards and all stages."""
    both = mesh(2, 2, names=("pipe", "shard"))
    at = both.get_local_rank("pipe")
    widths = (WIDTH, 17, 1) if at else (WIDTH, 5)
    sharded = fsdp2(*widths, on=both["shard"])
    group = both.get_group("pipe")
    optimizer = fusedoptim.AdamW(sharded.params, max_grad_norm=LIMIT, norm_group=group)
    norms = []
    for step in range(STEPS):
        sharded.backward(step)
        exact = norm_of_all(everyones([whole(p.grad).clone() for p in sharded.params], group))
        norm = fusedoptim.grad_norm(sharded.params, group)
        with counted() as calls:
            optimizer.step()
        assert len(calls) == 2 or step == 0
        assert_norm(norm, exact)
        assert_same_bits(norm, optimizer.last_grad_norm)
        norms.append(norm)
    return norms


def test_fsdp2_within_pipeline_stages() -> None:
    assert_same_on_all_ranks(run(4, sharded_stages))


def pipelined(case: Case) -> None:
    """torch's own pipeline, against one process that has all of the model and the same micro-batches."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, loss_fn = dist.get_rank(), nn.functional.mse_loss
    model = layers(WIDTH, 17, 5, 1)
    part = [model[:2], model[2:]][rank]
    alone = deepcopy(model)
    options = {"max_grad_norm": LIMIT}
    mine = case.make(part.parameters(), norm_group=dist.group.WORLD, **options)
    one = case.make(alone.parameters(), **options)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_fn)
    for step in range(STEPS):
        x, y = batch(step, 0), batch(step, 1, 8, 1)
        mine.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        one.zero_grad()
        for x_, y_ in zip(x.chunk(2), y.chunk(2), strict=True):
            loss_fn(alone(x_), y_).backward()
        for p in alone.parameters():
            p.grad /= 2
        mine.step()
        one.step()
        assert_same_bits(mine.last_grad_norm, one.last_grad_norm)
    theirs = [alone[:2], alone[2:]][rank]
    for p, q in zip(part.parameters(), theirs.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), str(case))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_torchs_pipeline(case: Case) -> None:
    run(2, pipelined, case)


def one_without_parameters(later: bool) -> bool:
    """As ZeroRedundancyOptimizer leaves one, where there are more processes than parameters."""
    p = nn.Parameter(torch.ones(3))
    params = [{"params": []}] if dist.get_rank() == 0 else [p]
    optimizer = fusedoptim.AdamW(params, norm_group=dist.group.WORLD, max_grad_norm=None if later else LIMIT)
    for step in range(3):
        if step == 1:
            optimizer.param_groups[0]["max_grad_norm"] = LIMIT
        p.grad = torch.ones(3)
        with counted() as calls:
            optimizer.step()
        assert len(calls) == (step > 0 or not later) + (step == 0)
    return dist.get_rank() == 0 or torch.equal(optimizer.last_grad_norm, torch.tensor(3.0).sqrt())


@pytest.mark.parametrize("later", [False, True])
def test_a_process_whose_groups_are_empty(later: bool) -> None:
    assert all(run(2, one_without_parameters, later))


# ---- FSDP1 and ZeroRedundancyOptimizer ----


def fsdp1(original: bool) -> Sharded:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = FSDP(layers(WIDTH, 17, 1), use_orig_params=original, device_id=torch.device("cpu"))
    return Sharded(model, loss_of(model, dist.get_rank()))


def mean_gradients(step: int) -> list[Tensor]:
    """Those of all processes, by one that has the whole model."""
    model = layers(WIDTH, 17, 1)
    for part in range(dist.get_world_size()):
        (loss_of(model, part)(step) / dist.get_world_size()).backward()
    return [p.grad for p in model.parameters()]


def fsdp1_norms(original: bool) -> list[Tensor]:
    group = dist.group.WORLD
    norms = []
    for backend in ("cpu", "reference"):
        sharded = fsdp1(original)
        copies = [nn.Parameter(p.detach().clone()) for p in sharded.params]
        options = {"backend": backend, "max_grad_norm": LIMIT, "skip_nonfinite": True, "norm_group": group}
        mine, witness = (
            BY_NAME["sgd_momentum"].make(sharded.params, **options),
            BY_NAME["sgd_momentum"].make_torch(copies),
        )
        for step in range(STEPS):
            sharded.backward(step)
            if step == 0:  # while the model is as it was made
                whole_norm = norm_of_all(mean_gradients(0)).float()
            grads = [None if p.grad is None else p.grad.clone() for p in sharded.params]
            exact = norm_of_all(everyones([g for g in grads if g is not None]))
            mine.step()
            assert_norm(mine.last_grad_norm, exact)
            norms.append(mine.last_grad_norm.clone())
            if step == 0:
                torch.testing.assert_close(norms[-1], whole_norm, rtol=1e-5, atol=0)  # gradients summed elsewhere
            returned = fusedoptim.clip_grad_norm_(sharded.params, LIMIT, norm_group=group, backend=backend)
            assert_same_bits(returned, norms[-1])
            for p, copy, g in zip(sharded.params, copies, grads, strict=True):
                copy.grad = None if g is None else scaled(g, norms[-1], LIMIT)
                assert g is None or torch.equal(p.grad, copy.grad)
            witness_step(witness)
        for p, copy in zip(sharded.params, copies, strict=True):
            assert_same_bits(p.detach(), copy.detach(), backend)
        sharded.backward(0)
        before = [p.detach().clone() for p in sharded.params]
        if dist.get_rank() == 0:
            next(p.grad for p in sharded.params if p.grad is not None).view(-1)[0] = torch.inf
        mine.step()
        assert mine.skipped_steps == 1 and all(map(torch.equal, before, sharded.params))
    return norms


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1(original: bool) -> None:
    assert_same_on_all_ranks(run(2, fsdp1_norms, original))


def zero(backend: str) -> list[Tensor]:
    """Every process steps some of the tensors; afterwards all have all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = layers(WIDTH, 17, 1), layers(WIDTH, 17, 1)
    options = {"lr": 0.1, "max_grad_norm": LIMIT, "skip_nonfinite": True, "backend": backend}
    make = functools.partial(fusedoptim.AdamW, norm_group=dist.group.WORLD, **options)  # or groups would have them
    mine = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make)
    one = fusedoptim.AdamW(alone.parameters(), **options)
    norms = []
    for step in range(STEPS):
        for m in (model, alone):
            m.zero_grad()
            loss_of(m, 0)(step).backward()
            if step == 1:
                next(m.parameters()).grad[0, 0] = torch.nan
        mine.step()
        one.step()
        assert mine.optim.skipped_steps == one.skipped_steps
        norms.append(mine.optim.last_grad_norm.clone())
        if step != 1:
            assert_norm(norms[-1], one.last_grad_norm.double())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_bits(shard(p), shard(q))
    return norms


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_redundancy_optimizer(backend: str) -> None:
    assert_same_on_all_ranks(run(2, zero, backend))

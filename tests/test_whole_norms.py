"""Norms of sharded models are those of the whole tensors: the same bits on all ranks and in every run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, assert_same_bits
from ranks import run
from sharded_models import MODELS, Sharded, built, is_dtensor, shard, whole
from test_dtensors import assert_same_shards, shards_of
from torch import Tensor

import fusedoptim
from benchmarks.witness import witness_step

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS, LIMIT = 3, 0.05
BACKENDS = ("cpu", "reference")
#: Every run has the same norms.
AGAIN = ["fsdp2_uneven", "tensor_parallel_and_fsdp2"]
#: Over how many dimensions of meshes parameters are sharded.
GATHERS = dict.fromkeys(MODELS, 1) | {"tensor_parallel_and_fsdp2": 2, "two_meshes": 2}


def norm_of_all(grads: list[Tensor]) -> Tensor:
    """Of whole gradients, in fp64."""
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()


def assert_norm(found: Tensor, exact: Tensor) -> None:
    """Both sums have fp64's precision, so that only the one rounding to fp32 can differ, by a unit."""
    assert not is_dtensor(found) and found.dim() == 0 and found.dtype == torch.float32
    low, high = (torch.nextafter(exact.float(), torch.tensor(end)) for end in (-torch.inf, torch.inf))
    assert low <= found <= high, (found, exact)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The elements of every gather within it."""
    found: list[int] = []
    names = [name for name in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, name)]  # the newer one
    gathers = [getattr(dist, name) for name in names]

    def counting(gather: Any, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(output.numel())
        return gather(output, *args, **kwargs)

    for name, gather in zip(names, gathers, strict=True):
        setattr(dist, name, functools.partial(counting, gather))
    try:
        yield found
    finally:
        for name, gather in zip(names, gathers, strict=True):
            setattr(dist, name, gather)


def aligned(p: Tensor, g: Tensor) -> Tensor:
    """What this process has of a gradient that is placed as its parameter."""
    return shard(g.redistribute(p.device_mesh, p.placements) if is_dtensor(g) else g)


def scaled(g: Tensor, norm: Tensor, limit: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ does it."""
    return g * torch.clamp(limit / (norm + 1e-6), max=1.0)


def assert_same_on_all_ranks(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


# ---- clipping within a step ----


def clipped_steps(model: str, gathers: int) -> list[Tensor]:
    """The norms of all steps, by every backend."""
    case, norms = BY_NAME["adamw_amsgrad"], []
    for backend in BACKENDS:
        sharded = built(model)
        copies = [torch.nn.Parameter(shard(p).clone()) for p in sharded.params]
        mine, witness = case.make(sharded.params, backend=backend, max_grad_norm=LIMIT), case.make_torch(copies)
        for step in range(STEPS):
            sharded.backward(step)
            exact = norm_of_all([whole(p.grad) for p in sharded.params])
            grads = [aligned(p, p.grad).clone() for p in sharded.params]
            with counted() as calls:
                mine.step()
            assert len(calls) == gathers or step == 0, calls  # the first one agrees on more
            norm = mine.last_grad_norm
            assert_norm(norm, exact)
            assert norm > LIMIT
            for copy, g in zip(copies, grads, strict=True):
                copy.grad = scaled(g, norm, LIMIT)
            witness_step(witness)
            norms.append(norm.clone())
        expected = [{"parameter": p.detach(), **witness.state[p]} for p in copies]
        assert_same_shards(shards_of(sharded, mine), expected, backend)
    for a, b in zip(norms[:STEPS], norms[STEPS:], strict=True):
        assert_same_bits(a, b, "backends")
    return norms


@pytest.mark.parametrize("model", MODELS)
def test_clipping_within_a_step(model: str) -> None:
    once = run(MODELS[model][0], clipped_steps, model, GATHERS[model])
    again = run(MODELS[model][0], clipped_steps, model, GATHERS[model]) if model in AGAIN else []
    assert_same_on_all_ranks([*once, *again])


def steps_without_norm(model: str) -> None:
    for name in ("adamw", "sgd_momentum"):
        sharded = built(model)
        optimizer = BY_NAME[name].make(sharded.params)
        sharded.backward(0)
        optimizer.step()
        sharded.backward(1)
        with counted() as calls:
            optimizer.step()
        assert not calls


def norm_adaptive_steps(model: str, gathers: int) -> None:
    """What it divides by are the norms of the gradients that clipping leaves, which come after the norm of all."""
    for options, rounds in (({}, 1), ({"max_grad_norm": LIMIT}, 2)):
        sharded = built(model)
        optimizer = BY_NAME["norm_adaptive"].make(sharded.params, **options)
        for step in range(STEPS):
            sharded.backward(step)
            with counted() as calls:
                optimizer.step()
            assert len(calls) == rounds * gathers or step == 0, calls


@pytest.mark.parametrize("model", ["fsdp2", "tensor_parallel_and_fsdp2", "two_meshes"])
def test_how_often_processes_talk(model: str) -> None:
    world = MODELS[model][0]
    run(world, steps_without_norm, model)
    run(world, norm_adaptive_steps, model, GATHERS[model])


# ---- what is not finite ----


def spoil(sharded: Sharded, rank: int, value: float) -> None:
    """An element of a gradient in one process, and where others have the same one, as after an all-reduce."""
    grads = [p.grad for p in sharded.params]
    chosen = [max((i for i, g in enumerate(grads) if is_dtensor(g) and shard(g).numel()), default=-1)]
    dist.broadcast_object_list(chosen, rank)
    g = grads[chosen[0]]
    at = (g.device_mesh.mesh == rank).nonzero()[0].tolist()
    here = zip(at, g.device_mesh.get_coordinate(), g.placements, strict=True)
    if all(theirs == mine or placement.is_replicate() for theirs, mine, placement in here):
        shard(g).view(-1)[-1] = value


def skipped(model: str, rank: int, value: float) -> None:
    for backend in BACKENDS:
        sharded = built(model)
        optimizer = BY_NAME["adamw_amsgrad"].make(sharded.params, backend=backend, skip_nonfinite=True)
        for step in range(4):
            sharded.backward(step)
            bad = step in (0, 2)
            if bad:
                spoil(sharded, rank, value)
            before = shards_of(sharded, optimizer)
            optimizer.step()
            assert optimizer.skipped_steps == step // 2 + 1, (step, optimizer.skipped_steps)
            assert optimizer.last_grad_norm.isfinite() != bad
            for old, new in zip(before, shards_of(sharded, optimizer), strict=True):
                for name, t in old.items():
                    assert torch.equal(t, new[name]) == bad or not t.numel(), (backend, step, name)


@pytest.mark.parametrize("rank", [0, -1])
@pytest.mark.parametrize(
    "model", ["fsdp2", "fsdp2_uneven", "hsdp", "tensor_parallel_and_fsdp2", "two_meshes", "plain_beside"]
)
def test_an_infinity_on_one_rank_skips_on_all(model: str, rank: int) -> None:
    world = MODELS[model][0]
    run(world, skipped, model, rank % world, torch.inf if rank else torch.nan)


# ---- outside of a step ----


def measured(model: str, gathers: int) -> list[Tensor]:
    norms = []
    for backend in BACKENDS:
        sharded = built(model)
        for limit in (LIMIT, 1e6):
            sharded.backward(0)
            exact = norm_of_all([whole(p.grad) for p in sharded.params])
            grads = [aligned(p, p.grad).clone() for p in sharded.params]
            with counted() as calls:
                norm = fusedoptim.grad_norm(sharded.params, backend=backend)
            assert len(calls) == gathers
            for p, g in zip(sharded.params, grads, strict=True):
                assert_same_bits(aligned(p, p.grad), g, "grad_norm only reads")
            with counted() as calls:
                returned = fusedoptim.clip_grad_norm_(sharded.params, limit, backend=backend)
            assert len(calls) == gathers
            assert_norm(norm, exact)
            assert_same_bits(norm, returned)
            for p, g in zip(sharded.params, grads, strict=True):
                if not is_dtensor(p) or p.grad.placements == p.placements:
                    assert_same_bits(shard(p.grad), scaled(g, norm, limit), backend)
            norms += [norm, returned]
    return norms


@pytest.mark.parametrize("model", MODELS)
def test_norms_and_clipping_outside_of_a_step(model: str) -> None:
    assert_same_on_all_ranks(run(MODELS[model][0], measured, model, GATHERS[model]))


def refused(model: str) -> str:
    sharded = built(model)
    sharded.backward(0)
    if dist.get_rank() == 0:
        shard(sharded.params[0].grad).view(-1)[0] = torch.inf
    before = [shard(p.grad).clone() for p in sharded.params]
    try:
        fusedoptim.clip_grad_norm_(sharded.params, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        assert all(torch.equal(g, shard(p.grad)) for g, p in zip(before, sharded.params, strict=True))
        return str(error)
    raise AssertionError("nothing was raised")


def test_a_norm_that_is_not_finite_is_refused_on_all_ranks() -> None:
    texts = run(4, refused, "two_meshes")
    assert len(set(texts)) == 1 and "non-finite" in texts[0]


# ---- one norm for several optimizers ----


def shared_norm(model: str) -> list[Tensor]:
    """Two optimizers that are given the norm of both have the bits of one."""
    sharded, norms, gradients = built(model), [], []
    options = {"max_grad_norm": LIMIT, "skip_nonfinite": True}
    one = BY_NAME["adamw"].make(sharded.params, **options)
    for step in range(STEPS):
        sharded.backward(step)
        gradients.append([p.grad.clone() for p in sharded.params])
        one.step()
    expected = shards_of(sharded, one)
    sharded.restore()
    parts = [BY_NAME["adamw"].make(ps, **options) for ps in (sharded.params[:1], sharded.params[1:])]
    for of_step in gradients:
        for p, g in zip(sharded.params, of_step, strict=True):
            p.grad = g.clone()
        norm = fusedoptim.grad_norm(sharded.params)
        for part in parts:
            with counted() as calls:
                part.step(grad_norm=norm)
            assert not calls or of_step is gradients[0]
            assert_same_bits(part.last_grad_norm, norm)
        norms.append(norm)
    found = [found for part in parts for found in part_shards(part)]
    assert_same_shards(found, expected, model)
    for part in parts:
        before = part_shards(part)
        part.step(grad_norm=torch.tensor(torch.inf))
        assert part.skipped_steps == 1
        assert_same_shards(part_shards(part), before, "skipped")
    return norms


def part_shards(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    found = []
    for p in optimizer.param_groups[0]["params"]:
        tensors = {"parameter": p, **optimizer.state[p]}
        found.append({name: shard(t).clone() for name, t in tensors.items()})
    return found


@pytest.mark.parametrize("model", ["fsdp2", "tensor_parallel_and_fsdp2", "two_meshes", "plain_beside"])
def test_a_norm_that_several_optimizers_share(model: str) -> None:
    assert_same_on_all_ranks(run(MODELS[model][0], shared_norm, model))

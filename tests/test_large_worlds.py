"""One rank of 1,024, which a process stands for: a step, clipping and checkpoints work, and cost a rank what they cost
in a small world. torch's ``fake`` process group takes the place of the others and sends nothing."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedoptim
from benchmarks import large_worlds, norm_traffic
from benchmarks.sharded.collectives import GATHER, Collective, collectives
from benchmarks.sharded.simulated import LAYOUTS, simulated

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
SMALL, LARGE = large_worlds.WORLDS
TENSORS = 12
#: Ranks over which each layout's gradients are sharded, a number for every dimension of the mesh that shards.
SHARDED = {"fsdp2": [LARGE], "hsdp": [8], "tp": [LARGE // 8, 8]}


class Block(nn.Module):
    """Two rows per rank and matrix, a matrix of which most ranks have nothing, and a norm that tensor parallelism
    leaves alone."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 2 * world, bias=False), nn.Linear(2 * world, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.up(self.norm(x))))


def make_model(layout: str, world: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, mesh = nn.Sequential(*(Block(world) for _ in range(2))), LAYOUTS[layout].mesh(world)
    if layout == "tp":
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = mesh["dp"]
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(model: nn.Module) -> None:
    model(torch.linspace(-1, 1, 32).view(4, 8)).square().mean().backward()


def shards(model: nn.Module) -> list[Tensor]:
    return [p.to_local().clone() for p in model.parameters()]


def steps_of(model: nn.Module, name: str) -> dict[str, Any]:
    """Two steps of one optimizer, the second of which clips, and a checkpoint taken over by another one."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    before = shards(model)
    optimizer = getattr(fusedoptim, name)(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    norm = fusedoptim.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.param_groups[0]["max_grad_norm"] = 1e-3
    with collectives() as asked:
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, shards(model), strict=True) if a.numel()]
    of_parameters = [
        (s.placements == p.placements, s.to_local().shape == p.to_local().shape)
        for p in model.parameters()
        for s in optimizer.state[p].values()
        if s.shape == p.shape
    ]
    other = getattr(fusedoptim, name)(model.parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    backward(model)
    other.step()
    return {
        "moved": all(moved),
        "finite": all(bool(p.isfinite().all()) for p in shards(model)),
        "norms": [float(norm), float(optimizer.last_grad_norm), float(other.last_grad_norm)],
        "asked": [c for c in asked if c.kind == GATHER],
        "others": [c for c in asked if c.kind != GATHER],
        "as their parameters": all(map(all, of_parameters)),
        "states": len(of_parameters),
        "by name": sorted(get_optimizer_state_dict(model, other)["state"]) == sorted(dict(model.named_parameters())),
    }


def work() -> dict[Any, Any]:
    """All that is asked of the simulated worlds, in a process of its own: the default process group is global."""
    dist.destroy_process_group()
    found: dict[Any, Any] = {}
    for layout in LAYOUTS:
        for clips in (False, True):
            for world in (SMALL, LARGE):
                options = {"max_grad_norm": 1.0} if clips else {}
                found[layout, clips, world] = large_worlds.measured(LAYOUTS[layout], world, TENSORS, **options)
        with simulated(LARGE):
            model = make_model(layout, LARGE)
            found[layout] = {name: steps_of(model, name) for name in OPTIMIZERS}
        found[layout, "traffic"] = norm_traffic.measured(LAYOUTS[layout], LARGE, TENSORS)
    return found


OPTIMIZERS = ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NormAdaptive"]


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    [outcome] = ranks.run_apart(1, work)
    assert not outcome.bad, outcome.trace
    return outcome.result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_clipping_and_a_checkpoint(layout: str, optimizer: str, found: dict[Any, Any]) -> None:
    of = found[layout][optimizer]
    assert of["moved"] and of["finite"] and of["by name"] and of["as their parameters"]
    assert of["states"] == 8 * {"SGD": 0, "NormAdaptive": 0, "RMSprop": 1, "Adagrad": 1}.get(optimizer, 2)
    clipped, *others = of["norms"]
    assert clipped > 1e-3 and others[0] == pytest.approx(1e-3, rel=1e-4) and others[1] > 1e-3
    rounds = 2 if optimizer == "NormAdaptive" else 1  # each tensor's norm is that of its clipped gradient
    assert [c.ranks for c in of["asked"]] == SHARDED[layout] * rounds and of["others"] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clips", [False, True])
def test_what_a_rank_has_and_does_does_not_grow(layout: str, clips: bool, found: dict[Any, Any]) -> None:
    """Rows of a gather are added by halving, in as many operations as the number of ranks has binary digits."""
    small, large = found[layout, clips, SMALL], found[layout, clips, LARGE]
    assert small.tensors == large.tensors > 2 * TENSORS and small.bytes == large.bytes > 2 * TENSORS * 1024
    assert [c.bytes for c in small.collectives] == [c.bytes for c in large.collectives]
    assert [c.ranks for c in large.collectives] == (SHARDED[layout] if clips else [])
    assert large.calls == small.calls if not clips else small.calls <= large.calls <= small.calls + 64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_norm_sends(layout: str, found: dict[Any, Any]) -> None:
    """A number for every tensor and one that refuses, in fp64; torch's in fp32."""
    ours, theirs = found[layout, "traffic"].values()
    assert ours == [Collective(GATHER, n, (TENSORS + 1) * 8) for n in SHARDED[layout]]
    assert [c.ranks for c in theirs] == SHARDED[layout]

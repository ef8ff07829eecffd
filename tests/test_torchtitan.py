"""torchtitan: its OptimizersContainer, clipping and schedules, and its checkpoints on another number of processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import FULL, Case, assert_same_bits
from ranks import run
from sharded_layouts import both, fsdp2
from sharded_models import layers, shard, whole
from torch import Tensor

import fusedoptim
from benchmarks.witness import ieee_sqrt

pytest.importorskip("torchtitan.components.optimizer", exc_type=ImportError)
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
IN_TORCH = [case for case in FULL if case.in_torch]
HALF, STEPS, CLIP = 2, 4, 0.3
LAYOUTS = {"fsdp2": fsdp2, "both": both}


class OfFusedoptim(OptimizersContainer):
    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return getattr(fusedoptim, name)


class OfTorch(OptimizersContainer):
    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return getattr(torch.optim, name)


class Titan:
    """What its trainer has of a model, an optimizer, a schedule and checkpoints."""

    def __init__(self, layout: str, case: Case, folder: str, of_torch: bool = False, seed: int = 0) -> None:
        self.model = layers(6, 18, 1)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(seed)
        LAYOUTS[layout](self.model)
        kwargs = {"lr": 0.01, **case.options}
        groups = [
            ParamGroupConfig(
                pattern=r"bias$", optimizer_name=case.optimizer, optimizer_kwargs={**kwargs, "weight_decay": 0.0}
            ),
            ParamGroupConfig(pattern=r".*", optimizer_name=case.optimizer, optimizer_kwargs=kwargs),
        ]
        config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        self.optimizers = (OfTorch if of_torch else OfFusedoptim)(config, model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=1, total_steps=STEPS)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=STEPS)
        settings = CheckpointManager.Config(enable=True, folder="checkpoints", interval=HALF, keep_latest_k=0)
        self.checkpoints = CheckpointManager(
            settings, dataloader=None, model_parts=[self.model], optimizers=self.optimizers,
            lr_schedulers=self.schedulers, states={}, sd_adapter=None, base_folder=folder,
        )  # fmt: skip
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def go_on(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizers.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - x.sum(1, keepdim=True).sin()).square().mean()
            loss.backward()
            self.norms.append(clip_grad_norm_(self.model.parameters(), CLIP).clone())
            self.optimizers.step()
            self.schedulers.step()
            self.losses.append(loss.detach())

    def save(self, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert self.checkpoints.save(step)

    def load(self, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert self.checkpoints.load(step)

    def content(self) -> list[dict[str, Tensor]]:
        """Parameters and states, whole."""
        (optimizer,) = self.optimizers
        return [
            {name: whole(torch.as_tensor(value)).clone() for name, value in {"parameter": p, **states}.items()}
            for p, states in ((p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"])
        ]

    def rates(self) -> list[float]:
        return [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], what: str) -> None:
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.keys() == right.keys(), (what, i, left.keys(), right.keys())
        for name in left:
            assert_same_bits(left[name], right[name], f"{what}: {name} of parameter {i}")


# ---- what every rank does ----


def beside_torch(layout: str, case: Case, folder: str) -> None:
    mine, theirs = Titan(layout, case, folder), Titan(layout, case, folder, of_torch=True)
    mine.go_on(0, STEPS)
    with ieee_sqrt():
        theirs.go_on(0, STEPS)
    assert max(mine.norms) > CLIP  # clipping there was
    for a, b in ((mine.losses, theirs.losses), (mine.norms, theirs.norms)):
        assert_same_bits(torch.stack(a), torch.stack(b), str(case))
    assert_same(mine.content(), theirs.content(), str(case))
    assert mine.rates() == theirs.rates()


def straight(layout: str, case: Case, folder: str, of_torch: bool) -> tuple[Any, ...]:
    titan = Titan(layout, case, folder, of_torch)
    with ieee_sqrt():
        titan.go_on(0, HALF)
        titan.save(HALF)
        half = titan.content()
        titan.go_on(HALF, STEPS)
    return half, titan.losses[HALF:], titan.content(), titan.rates()


def resumed(layout: str, case: Case, folder: str, of_torch: bool) -> tuple[Any, ...]:
    titan = Titan(layout, case, folder, of_torch, seed=1)
    titan.load(HALF)
    half = titan.content()
    with ieee_sqrt():
        titan.go_on(HALF, STEPS)
    return half, titan.losses, titan.content(), titan.rates()


def clipped_by_fusedoptim(case: Case, folder: str) -> None:
    """The same norms and gradients as torchtitan's clipping."""
    a, b = Titan("both", case, folder), Titan("both", case, folder)
    for titan in (a, b):
        titan.model(torch.ones(8, 6)).square().sum().backward()
    norms = clip_grad_norm_(a.model.parameters(), CLIP), fusedoptim.clip_grad_norm_(b.model.parameters(), CLIP)
    assert norms[0] > CLIP and abs(norms[0] / norms[1] - 1) < 1e-6
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(shard(p.grad), shard(q.grad), rtol=2e-6, atol=0)


# ---- the tests ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_the_same_bits_as_torch(case: Case, layout: str, tmp_path: Path) -> None:
    run(4, beside_torch, layout, case, str(tmp_path))


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 4), ("fsdp2", 2), ("both", 4)])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_checkpoints(case: Case, layout: str, world: int, tmp_path: Path) -> None:
    """From FSDP2 over 4 processes."""
    before = run(4, straight, "fsdp2", case, str(tmp_path), False)
    after = run(world, resumed, layout, case, str(tmp_path), False)
    for half, losses, end, rates in after:
        assert_same(half, before[0][0], str(case))
        assert rates == before[0][3]
        if world == 4 and layout == "fsdp2":
            assert_same_bits(torch.stack(losses), torch.stack(before[0][1]), str(case))
            assert_same(end, before[0][2], str(case))


@pytest.mark.parametrize("from_torch", [True, False], ids=["from torch.optim", "to torch.optim"])
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_checkpoints_of_torchs_optimizers(case: Case, from_torch: bool, tmp_path: Path) -> None:
    before = run(4, straight, "fsdp2", case, str(tmp_path), from_torch)
    after = run(4, resumed, "fsdp2", case, str(tmp_path), not from_torch)
    for half, losses, end, _ in after:
        assert_same(half, before[0][0], str(case))
        assert_same_bits(torch.stack(losses), torch.stack(before[0][1]), str(case))
        assert_same(end, before[0][2], str(case))


def test_clipping_by_this_package(tmp_path: Path) -> None:
    run(4, clipped_by_fusedoptim, FULL[0], str(tmp_path))

"""PyTorch Lightning's ModelParallelStrategy, with FSDP2 over tensor parallel pairs, on the CPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, Case, assert_same_bits
from ranks import run
from sharded_models import assert_same_optimizers, layers, mesh
from torch import Tensor

from benchmarks.witness import ieee_sqrt

pytest.importorskip("lightning")
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from test_lightning import CLIP, EPOCHS, Regression, data, make_trainer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 4


class Ranks(LightningEnvironment):
    """Processes that are there already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()


class Sharded(Regression):
    def __init__(self, case: Case, of_torch: bool = False, seed: int = 0) -> None:
        super().__init__(case, of_torch, seed)
        self.model = layers(6, 18, 1)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(seed)
        self.norms: list[Tensor] = []

    def configure_model(self) -> None:
        if not any(hasattr(p, "placements") for p in self.model.parameters()):
            parallelize(self.model, self.device_mesh)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        norm = getattr(optimizer, "last_grad_norm", None)
        if norm is not None and norm.isfinite():  # a step was taken
            self.norms.append(norm.clone())


def parallelize(model: torch.nn.Module, on: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, on["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=on["data_parallel"])


def fit(
    module: Sharded, folder: str, epochs: int = EPOCHS, load: str | None = None, save: str | None = None,
    in_files: bool = True, **options: Any,
) -> Any:  # fmt: skip
    """The optimizer, after this many epochs."""
    strategy = ModelParallelStrategy(2, 2, save_distributed_checkpoint=in_files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own and those of torch.distributed.checkpoint
        trainer = make_trainer(
            Path(folder), epochs, devices=WORLD, strategy=strategy, plugins=[Ranks()], use_distributed_sampler=False,
            **options,
        )  # fmt: skip
        trainer.fit(module, data(), ckpt_path=load)
        if save is not None:
            trainer.save_checkpoint(save)
    return trainer.optimizers[0]


# ---- what every rank does ----


def beside_torch(case: Case, options: dict[str, Any], folder: str) -> None:
    mine, theirs = Sharded(case), Sharded(case, of_torch=True)
    a = fit(mine, folder, **options)
    with ieee_sqrt():
        b = fit(theirs, folder, **options)
    assert type(a).__module__.startswith("fusedoptim") and type(b).__module__.startswith("torch")
    assert_same_bits(torch.stack(mine.losses), torch.stack(theirs.losses), f"losses of {case}")
    assert_same_optimizers(a, b, str(case))


def clipped_in_the_step(case: Case, folder: str) -> Tensor:
    """The norms of all steps, which are those of a loop without Lightning."""
    case = replace(case, options={**case.options, "max_grad_norm": CLIP})
    module = Sharded(case)
    a = fit(module, folder, gradient_clip_val=None)
    by_hand = layers(6, 18, 1)
    parallelize(by_hand, mesh(2, 2, names=("data_parallel", "tensor_parallel")))
    groups = [
        {"params": list(by_hand[0].parameters()), "lr": 0.003},
        {"params": list(by_hand[2].parameters())},
    ]
    b, norms = case.make(groups), []
    schedule = torch.optim.lr_scheduler.StepLR(b, 1, 0.5)
    for _ in range(EPOCHS):
        for x, y in data():
            b.zero_grad()
            torch.nn.functional.mse_loss(by_hand(x), y).backward()
            b.step()
            norms.append(b.last_grad_norm.clone())
        schedule.step()
    assert_same_optimizers(a, b, str(case))
    assert_same_bits(torch.stack(module.norms), torch.stack(norms)[: len(module.norms)], "norms")
    assert len(module.norms) >= len(norms) - 1 and max(norms) > CLIP  # clipping there was
    return torch.stack(norms)


def resumed(case: Case, in_files: bool, options: dict[str, Any], folder: str) -> None:
    straight, first, second = Sharded(case), Sharded(case), Sharded(case, seed=1)
    expected = fit(straight, folder, **options)
    path = f"{folder}/half.ckpt"
    fit(first, folder, 2, save=path, in_files=in_files, **options)
    assert Path(path).is_dir() == in_files
    found = fit(second, folder, load=path, in_files=in_files, **options)
    assert_same_bits(torch.stack(first.losses + second.losses), torch.stack(straight.losses), f"losses of {case}")
    assert_same_optimizers(found, expected, str(case))
    assert first.rates + second.rates == straight.rates


# ---- the tests ----

BESIDE_TORCH = [
    ("adamw_amsgrad", {}),
    ("rmsprop_all", {"accumulate_grad_batches": 4}),
    ("sgd_dampening", {"precision": "bf16-mixed"}),
]


@pytest.mark.parametrize(("name", "options"), BESIDE_TORCH, ids=str)
def test_the_same_bits_as_torch(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    run(WORLD, beside_torch, BY_NAME[name], options, str(tmp_path))


@pytest.mark.parametrize("name", ["adamw_amsgrad", "norm_adaptive_all"])
def test_clipping_in_the_step(name: str, tmp_path: Path) -> None:
    norms = run(WORLD, clipped_in_the_step, BY_NAME[name], str(tmp_path))
    for of_rank in norms:
        assert_same_bits(of_rank, norms[0], "norms")


RESUMED = [
    (BY_NAME["adamw_amsgrad"], True),
    (BY_NAME["adagrad_all"], True),
    (BY_NAME["norm_adaptive_all"], True),
    (BY_NAME["adagrad_all"], False),
]


@pytest.mark.parametrize(("case", "in_files"), RESUMED, ids=str)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case: Case, in_files: bool, tmp_path: Path) -> None:
    """From a file per rank, or from one."""
    case = replace(case, options={**case.options, "ema_decay": 0.9, "max_grad_norm": CLIP})
    run(WORLD, resumed, case, in_files, {"gradient_clip_val": None}, str(tmp_path))

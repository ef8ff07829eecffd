"""PyTorch Lightning: groups, schedules, clipping, accumulation, precision, checkpoints, several optimizers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, FULL, Case, assert_same_bits, assert_same_optimizers
from stacks import batch, make_model, two_groups
from test_own_rules import Lion
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fusedoptim
from benchmarks.witness import ieee_sqrt

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

EPOCHS, BATCHES, CLIP = 4, 6, 0.3


class Batches(Dataset):
    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return batch(index)


def data() -> DataLoader:
    return DataLoader(Batches(), batch_size=None)


class Regression(lightning.LightningModule):
    def __init__(self, case: Case, of_torch: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.model, self.case, self.of_torch = make_model(seed), case, of_torch
        self.losses: list[Tensor] = []
        self.rates: list[list[float]] = []
        self.largest: list[float] = []

    def training_step(self, xy: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(xy[0]), xy[1])
        self.losses.append(loss.detach())
        return loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.model[0].weight.grad is not None:  # those of the step before
            self.largest.append(max(p.grad.abs().max().item() for p in self.model.parameters()))

    def on_train_epoch_start(self) -> None:
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    def configure_optimizers(self) -> dict[str, Any]:
        groups = two_groups(self.model, self.case)
        optimizer = self.case.make_torch(groups, foreach=False) if self.of_torch else self.case.make(groups)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def make_trainer(folder: Path, epochs: int = EPOCHS, **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "gradient_clip_val": CLIP, **options}
    if settings.get("precision") == "16-mixed" and settings["accelerator"] == "cpu":  # the Trainer would take bf16
        del settings["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=4)  # overflows in between
        settings["plugins"] = [lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    return lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **settings,
    )  # fmt: skip


def fit(module: Regression, folder: Path, epochs: int = EPOCHS, **options: Any) -> torch.optim.Optimizer:
    trainer = make_trainer(folder, epochs, **options)
    trainer.fit(module, data())
    return trainer.optimizers[0]


SETTINGS = [
    pytest.param({"precision": "32-true"}, id="32-true"),
    pytest.param({"precision": "32-true", "accumulate_grad_batches": 4}, id="accumulating"),
    pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
    pytest.param({"precision": "16-mixed"}, id="16-mixed"),
    pytest.param({"precision": "bf16-mixed", "gradient_clip_algorithm": "value"}, id="clipping values"),
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("case", [c for c in FULL if c.in_torch], ids=str)
def test_the_same_bits_as_torch(case: Case, options: dict, tmp_path: Path) -> None:
    mine, theirs = Regression(case), Regression(case, of_torch=True)
    a = fit(mine, tmp_path, **options)
    with ieee_sqrt():
        b = fit(theirs, tmp_path, **options)
    assert type(a).__module__.startswith("fusedoptim") and type(b).__module__.startswith("torch")
    assert_same_bits(torch.stack(mine.losses), torch.stack(theirs.losses), "losses")
    assert_same_optimizers(a, b)
    assert mine.rates == theirs.rates and mine.rates[1] == [rate / 2 for rate in mine.rates[0]]
    limit = torch.tensor(CLIP).item()
    assert [x for x in mine.largest if x < math.inf] == [x for x in theirs.largest if x < math.inf]
    assert max(mine.largest) <= limit or options["precision"] == "16-mixed"
    if options.get("gradient_clip_algorithm") == "value":
        assert max(mine.largest) == limit  # clipping there was
    assert mine.rates[0][0] != mine.rates[0][1] and len(mine.losses) == EPOCHS * BATCHES


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case: Case, precision: str, tmp_path: Path) -> None:
    straight, first, second = Regression(case), Regression(case), Regression(case, seed=1)
    expected = fit(straight, tmp_path, precision=precision)
    trainer = make_trainer(tmp_path, 2, precision=precision)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_bits(torch.stack(first.losses + second.losses), torch.stack(straight.losses), "losses")
    assert_same_optimizers(trainer.optimizers[0], expected)
    assert first.rates + second.rates == straight.rates


class OfAUser(Regression):
    """With two groups of a user's own class."""

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = Lion(two_groups(self.model, self.case), lr=0.002, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)}


def test_a_users_rule_with_two_groups_and_a_schedule(tmp_path: Path) -> None:
    """The Trainer makes the same steps as a loop by hand, with the learning rates that StepLR says."""
    module, model = OfAUser(BY_NAME["lion"]), make_model()
    trained = fit(module, tmp_path, gradient_clip_val=None)
    optimizer = Lion(two_groups(model, module.case), lr=0.002, weight_decay=0.1)
    expected = []
    for epoch in range(EPOCHS):
        expected.append([lr * 0.1 ** (epoch // 2) for lr in (0.003, 0.002)])
        for group, lr in zip(optimizer.param_groups, expected[-1], strict=True):
            group["lr"] = lr
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert type(trained) is Lion and module.rates == expected
    assert_same_optimizers(trained, optimizer)
    assert module.losses[-1] < module.losses[0]


class Manual(lightning.LightningModule):
    """Each half of the model has an optimizer of its own; the second steps at every other batch."""

    automatic_optimization = False

    def __init__(self, of_torch: bool = False) -> None:
        super().__init__()
        self.model, self.of_torch = make_model(), of_torch

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        cases = BY_NAME["adamw_amsgrad"], BY_NAME["sgd_dampening"]
        if self.of_torch:
            return [c.make_torch(self.model[i].parameters(), foreach=False) for c, i in zip(cases, (0, 2), strict=True)]
        return [c.make(self.model[i].parameters()) for c, i in zip(cases, (0, 2), strict=True)]

    def training_step(self, xy: tuple[Tensor, Tensor], index: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(nn.functional.mse_loss(self.model(xy[0]), xy[1]))
        self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        first.step()
        first.zero_grad()
        if index % 2:
            second.step()
            second.zero_grad()


def test_two_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    mine, theirs = Manual(), Manual(of_torch=True)
    trainers = []
    for module in (mine, theirs):
        trainers.append(make_trainer(tmp_path, gradient_clip_val=None))
        with ieee_sqrt():
            trainers[-1].fit(module, data())
    a, b = (trainer.optimizers for trainer in trainers)
    assert [type(o) for o in a] == [fusedoptim.AdamW, fusedoptim.SGD]
    for left, right in zip(a, b, strict=True):
        assert_same_optimizers(left, right)
    assert next(iter(a[0].state.values()))["step"] == EPOCHS * BATCHES
    assert trainers[0].global_step == EPOCHS * (BATCHES + BATCHES // 2)


# ---- 16-mixed ----

ACCELERATORS = pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def unscaling(case: Case, in_step: bool = True) -> Regression:
    """Its optimizer unscales gradients in the step, or leaves that to the scaler."""
    return Regression(replace(case, options={**case.options, "amp_in_step": in_step}))


@ACCELERATORS
@pytest.mark.parametrize("case", FULL, ids=str)
def test_16_mixed_refuses_to_clip_where_the_step_unscales(case: Case, accelerator: str, tmp_path: Path) -> None:
    """Without the option it clips, which is the default, too."""
    with pytest.raises(RuntimeError, match=f"{case.optimizer}, does not allow for gradient clipping"):
        fit(unscaling(case), tmp_path, precision="16-mixed", accelerator=accelerator)
    mended, default = unscaling(case, in_step=False), Regression(case)
    a, b = (fit(module, tmp_path, precision="16-mixed", accelerator=accelerator) for module in (mended, default))
    assert_same_optimizers(a, b)


@ACCELERATORS
@pytest.mark.parametrize("case", FULL, ids=str)
def test_16_mixed_unscaling_in_the_step_has_the_same_bits(case: Case, accelerator: str, tmp_path: Path) -> None:
    """The scale is a power of two, and the gradients are fp32."""
    modules = unscaling(case), unscaling(case, in_step=False)
    options = {"precision": "16-mixed", "accelerator": accelerator, "gradient_clip_val": None}
    a, b = (fit(module, tmp_path, **options) for module in modules)
    assert_same_bits(*(torch.stack(module.losses) for module in modules), "losses")
    assert_same_optimizers(a, b)
    assert all(p.isfinite().all() for p in modules[0].parameters())
    steps = [state["step"].item() for state in a.state.values() if "step" in state]
    assert all(0 < step <= EPOCHS * BATCHES for step in steps)
    if accelerator == "cpu":  # where the scale is one that overflows
        assert all(step < EPOCHS * BATCHES for step in steps)

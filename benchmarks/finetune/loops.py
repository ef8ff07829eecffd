"""The same fine-tuning in the loops that people have. Each returns the losses of its steps.

``optimizer`` and its ``schedule`` are made before; a step has no more than one batch.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusedoptim

from .task import Batch

Loop = Callable[[nn.Module, Any, Any, list[Batch]], list[float]]


def plain(model: nn.Module, optimizer: Any, schedule: Any, batches: list[Batch]) -> list[float]:
    return timed(model, optimizer, schedule, batches)[0]


def timed(
    model: nn.Module, optimizer: Any, schedule: Any, batches: list[Batch]
) -> tuple[list[float], list[tuple[float, float]]]:
    """The plain loop: losses, and of each iteration the seconds of ``optimizer.step()`` and of all."""
    losses, times = [], []
    for batch in batches:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        schedule.step()
        losses.append(loss.item())
        times.append((end - before, end - begin))
    return losses, times


def trainer(model: nn.Module, optimizer: Any, schedule: Any, batches: list[Batch]) -> list[float]:
    """transformers' Trainer."""
    import transformers

    losses: list[float] = []

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def get_train_dataloader(self) -> Any:
            return batches

        def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
            loss = model(**inputs).loss
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder, max_steps=len(batches), max_grad_norm=0.0, logging_steps=len(batches),
            save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=args, optimizers=(optimizer, schedule)).train()
    return losses


def lightning(model: nn.Module, optimizer: Any, schedule: Any, batches: list[Batch]) -> list[float]:
    """PyTorch Lightning."""
    import lightning

    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, _: int) -> Any:
            loss = self.model(**batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and loggers, which nothing here needs
        run = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        run.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return losses


def in_backward(model: nn.Module, optimizer: Any, schedule: Any, batches: list[Batch]) -> list[float]:
    """As torchtune's recipes with ``optimizer_in_bwd``: each parameter is stepped in the backward pass."""
    losses = []
    with fusedoptim.step_in_backward(optimizer):
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            schedule.step()
            losses.append(loss.item())
    return losses


#: By the name that results have.
LOOPS: dict[str, Loop] = {
    "plain loop": plain,
    "transformers Trainer": trainer,
    "Lightning": lightning,
    "in the backward pass": in_backward,
}

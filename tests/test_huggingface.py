"""Hugging Face: transformers' Trainer and accelerate's prepare, on models made from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers
from stacks import batch, make_model, two_groups
from torch import Tensor, nn

import fusedoptim
from benchmarks.witness import ieee_sqrt

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

IN_TORCH = [case for case in FULL if case.in_torch]
STEPS, HALF = 6, 3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # models as tiny as these gain nothing from two


# ---- Trainer ----


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(12) * (index + 1)) % 31
        return {"input_ids": tokens, "labels": tokens}


def language_model(seed: int = 0) -> nn.Module:
    """With dropout, whose random numbers a checkpoint has to restore."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def make_trainer(folder: Path, model: nn.Module, save: bool, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=0.01, max_grad_norm=0.5, logging_steps=1, save_strategy="steps" if save else "no",
        save_steps=HALF, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=Texts(), **options)


def by_optimizers(case: Case, model: nn.Module, of_torch: bool) -> dict[str, Any]:
    """Two groups, and the Trainer's own schedule."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.003},
        {"params": [p for p in model.parameters() if p.dim() <= 1]},
    ]
    optimizer = case.make_torch(groups, foreach=False) if of_torch else case.make(groups)
    return {"optimizers": (optimizer, None)}


def by_class(case: Case, model: nn.Module, of_torch: bool) -> dict[str, Any]:
    """The Trainer's own two groups: it decays no norms and no biases."""
    cls = getattr(torch.optim if of_torch else fusedoptim, case.optimizer)
    kwargs = {"lr": 0.01, **case.options, **({"foreach": False} if of_torch else {})}
    return {"optimizer_cls_and_kwargs": (cls, kwargs)}


HOW = pytest.mark.parametrize("how", [by_optimizers, by_class])


def run(
    case: Case, how: Any, folder: Path, *, of_torch: bool = False, seed: int = 0, save: bool = False,
    resume: Path | None = None,
) -> Any:  # fmt: skip
    model = language_model(seed)
    trainer = make_trainer(folder, model, save, **how(case, model, of_torch))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def assert_same_training(a: Any, b: Any) -> None:
    logs = [[(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in t.state.log_history if "loss" in x]
            for t in (a, b)]  # fmt: skip
    assert len(logs[0]) == STEPS and logs[0] == logs[1]
    assert len(a.optimizer.param_groups) == 2
    assert_same_optimizers(a.optimizer.optimizer, b.optimizer.optimizer)  # beneath accelerate's wrapper


@HOW
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_trainer_has_the_same_bits_as_with_torch(case: Case, how: Any, tmp_path: Path) -> None:
    with ieee_sqrt():
        mine = run(case, how, tmp_path / "mine")
        theirs = run(case, how, tmp_path / "theirs", of_torch=True)
    assert isinstance(mine.optimizer.optimizer, fusedoptim.FusedOptimizer)
    assert type(theirs.optimizer.optimizer).__module__.startswith("torch.optim")
    assert_same_training(mine, theirs)


@HOW
@pytest.mark.parametrize("case", FULL, ids=str)
def test_trainer_resumes_with_the_same_bits(case: Case, how: Any, tmp_path: Path) -> None:
    straight = run(case, how, tmp_path / "straight", save=True)
    resumed = run(case, how, tmp_path / "resumed", seed=1, resume=tmp_path / "straight" / f"checkpoint-{HALF}")
    assert_same_training(resumed, straight)


# ---- accelerate ----


def accelerated(
    case: Case, steps: range, of_torch: bool = False, seed: int = 0, precision: str = "no", load: Path | None = None,
    save: Path | None = None,
) -> tuple[torch.optim.Optimizer, list[float]]:  # fmt: skip
    """Two batches a step, clipped, with a schedule. The optimizer, and the gradients' norms before clipping."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = make_model(seed)
    groups = two_groups(model, case)
    optimizer = case.make_torch(groups, foreach=False) if of_torch else case.make(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if load is not None:
        accelerator.load_state(str(load))
    norms = []
    for step in steps:
        for micro in range(2):
            with accelerator.accumulate(model):
                x, y = batch(2 * step + micro)
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                assert accelerator.sync_gradients == (micro == 1)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.3).item())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(str(save))
    assert accelerator.optimizer_step_was_skipped is False
    return optimizer.optimizer, norms


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_accelerate_has_the_same_bits_as_with_torch(case: Case, precision: str) -> None:
    a, mine = accelerated(case, range(STEPS), precision=precision)
    with ieee_sqrt():
        b, theirs = accelerated(case, range(STEPS), of_torch=True, precision=precision)
    assert mine == theirs and max(mine) > 0.3  # clipping there was
    assert_same_optimizers(a, b)
    for state in a.state.values():
        assert state.get("step", STEPS) == STEPS


@pytest.mark.parametrize("case", FULL, ids=str)
def test_accelerate_resumes_with_the_same_bits(case: Case, tmp_path: Path) -> None:
    straight, norms = accelerated(case, range(STEPS))
    _, first = accelerated(case, range(HALF), save=tmp_path)
    resumed, second = accelerated(case, range(HALF, STEPS), seed=1, load=tmp_path)
    assert first + second == norms
    assert_same_optimizers(resumed, straight)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_accelerates_wrapper_with_a_scaler_notices_skipped_steps(case: Case) -> None:
    """fp16's, which accelerate makes on GPUs only; the wrapper is the same on the CPU."""
    accelerate.Accelerator(cpu=True)
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(case.make(two_groups(model, case)), scaler=scaler)
    skipped = []
    for step in range(4):
        x, y = batch(step)
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if step in (0, 2):
            model[2].bias.grad.fill_(float("inf"))
        before = model[0].weight.detach().clone()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        if skipped[-1]:
            assert_same_bits(model[0].weight.detach(), before)
        else:
            assert not torch.equal(model[0].weight.detach(), before)
        optimizer.zero_grad()
    assert skipped == [True, False, True, False]

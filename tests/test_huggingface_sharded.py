"""Hugging Face's FSDP2: accelerate's prepare and save_state, and transformers' Trainer.

accelerate shards models on accelerators only. What it does then is not theirs alone, so that here it is told that the
CPU is one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, Case, assert_same_bits
from ranks import run
from sharded_models import assert_same_optimizers, is_dtensor, layers
from torch import Tensor

from benchmarks.witness import ieee_sqrt

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import accelerate
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from test_huggingface import HALF, STEPS, Texts, by_class

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 2
#: Not torch's Adagrad, which has its states from the start, under the parameters that accelerate replaces.
BESIDE_TORCH = [BY_NAME["adamw_amsgrad"], BY_NAME["sgd_dampening"]]
SHARDED, WHOLE = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
RESUMED = [
    (BY_NAME["adamw_amsgrad"], SHARDED),
    (BY_NAME["adagrad_all"], SHARDED),
    (BY_NAME["norm_adaptive_all"], WHOLE),
    (BY_NAME["adagrad_all"], WHOLE),
]


@contextmanager
def on_accelerators() -> Iterator[None]:
    """accelerate takes this process for one of several that have an accelerator."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}  # nobody connects
    before, init = dict(os.environ), AcceleratorState.__init__

    def as_if_sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            for state in (AcceleratorState._shared_state, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP

    os.environ.update(settings)
    AcceleratorState.__init__ = as_if_sharding
    reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reset()
        AcceleratorState.__init__ = init
        os.environ.clear()
        os.environ.update(before)


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated(
    case: Case, steps: range, kind: str = SHARDED, of_torch: bool = False, seed: int = 0, load: str | None = None,
    save: str | None = None,
) -> tuple[torch.optim.Optimizer, list[Tensor]]:  # fmt: skip
    """Two batches a step, clipped, with a schedule. The optimizer, and the gradients' norms before clipping."""
    reset()
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap"
    )
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    model = layers(6, 18, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(seed)
    groups = [{"params": list(model[0].parameters()), "lr": 0.003}, {"params": list(model[2].parameters())}]
    optimizer = case.make_torch(groups, foreach=False) if of_torch else case.make(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if load is not None:
        accelerator.load_state(load)
    norms = []
    for step in steps:
        for micro in range(2):
            with accelerator.accumulate(model):
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + micro))
                accelerator.backward((model(x) - x.sum(1, keepdim=True).sin()).square().mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.3)
                    norms.append((norm.full_tensor() if is_dtensor(norm) else norm).clone())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return optimizer.optimizer, norms


# ---- what every rank does ----


def beside_torch(case: Case) -> None:
    with on_accelerators(), ieee_sqrt():
        a, mine = accelerated(case, range(STEPS))
        b, theirs = accelerated(case, range(STEPS), of_torch=True)
    assert_same_bits(torch.stack(mine), torch.stack(theirs), "norms")
    assert max(mine) > 0.3  # clipping there was
    assert_same_optimizers(a, b, str(case))


def resumed(case: Case, kind: str, folder: str) -> None:
    with on_accelerators():
        straight, norms = accelerated(case, range(STEPS), kind)
        _, first = accelerated(case, range(HALF), kind, save=folder)
        again, second = accelerated(case, range(HALF, STEPS), kind, seed=1, load=folder)
    assert_same_bits(torch.stack(first + second), torch.stack(norms), "norms")
    assert_same_optimizers(again, straight, str(case))


# ---- the tests ----


@pytest.mark.parametrize("case", BESIDE_TORCH, ids=str)
def test_accelerate_has_the_same_bits_as_with_torch(case: Case) -> None:
    run(WORLD, beside_torch, case)


@pytest.mark.parametrize(("case", "kind"), RESUMED, ids=str)
def test_accelerate_resumes_with_the_same_bits(case: Case, kind: str, tmp_path: Path) -> None:
    case = replace(case, options={**case.options, "ema_decay": 0.9})
    run(WORLD, resumed, case, kind, str(tmp_path))


# ---- Trainer ----


def trained(
    case: Case, folder: str, kind: str = SHARDED, of_torch: bool = False, save: bool = False, seed: int = 0,
    resume: str | None = None,
) -> Any:  # fmt: skip
    reset()
    model = untied_language_model(seed)
    args = transformers.TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=0.01, max_grad_norm=0.5, logging_steps=1, save_strategy="steps" if save else "no",
        save_steps=HALF, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, fsdp=True,
        fsdp_config={"auto_wrap_policy": "NO_WRAP", "state_dict_type": kind},
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Texts(), **by_class(case, model, of_torch))
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_fsdp_enabled and all(map(is_dtensor, trainer.model.parameters()))
    return trainer


def untied_language_model(seed: int) -> Any:
    """FSDP2 knows no parameter under two names."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def assert_same_trainers(a: Any, b: Any) -> None:
    logs = [[(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in t.state.log_history if "loss" in x]
            for t in (a, b)]  # fmt: skip
    assert len(logs[0]) == STEPS and logs[0] == logs[1]
    assert_same_optimizers(a.optimizer.optimizer, b.optimizer.optimizer, "trainers")


def trainer_beside_torch(case: Case, folder: str) -> None:
    with on_accelerators(), ieee_sqrt():
        assert_same_trainers(trained(case, f"{folder}/mine"), trained(case, f"{folder}/theirs", of_torch=True))


def trainer_resumed(case: Case, kind: str, folder: str) -> None:
    with on_accelerators():
        straight = trained(case, f"{folder}/straight", kind, save=True)
        again = trained(case, f"{folder}/resumed", kind, seed=1, resume=f"{folder}/straight/checkpoint-{HALF}")
    assert_same_trainers(again, straight)


@pytest.mark.parametrize("case", BESIDE_TORCH[:1], ids=str)
def test_trainer_has_the_same_bits_as_with_torch(case: Case, tmp_path: Path) -> None:
    run(WORLD, trainer_beside_torch, case, str(tmp_path))


@pytest.mark.parametrize(("case", "kind"), RESUMED[-2:], ids=str)
def test_trainer_resumes_with_the_same_bits(case: Case, kind: str, tmp_path: Path) -> None:
    case = replace(case, options={**case.options, "ema_decay": 0.9})
    run(WORLD, trainer_resumed, case, kind, str(tmp_path))

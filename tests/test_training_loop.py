"""A training loop as one writes it by hand: history, log, validation, the best checkpoint, resuming; and gradients that
are accumulated. In fp64."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, FULL, Case, assert_same_bits, assert_same_optimizers
from stacks import WIDTH
from torch import Tensor, nn

from fusedoptim import FusedOptimizer, decay_groups, warmup_cosine

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
EPOCHS, ROWS, BATCH = 6, 48, 16


def make_model(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 17), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(17), nn.Linear(17, 1))
    return model.double()


def rows(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


@dataclass
class Run:
    """All that a checkpoint has to hold: the order of batches comes from ``random``, dropout from torch's generator."""

    model: nn.Module
    optimizer: FusedOptimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    folder: Path
    history: list[dict[str, float]]

    def save(self, name: str) -> None:
        version, words, gauss = random.getstate()
        parts = {key: getattr(self, key).state_dict() for key in ("model", "optimizer", "schedule")}
        rngs = {"torch": torch.get_rng_state(), "python": (version, list(words), gauss)}
        torch.save({**parts, **rngs, "history": self.history}, self.folder / name)

    def load(self, path: Path) -> None:
        content = torch.load(path, weights_only=True)
        for key in ("model", "optimizer", "schedule"):
            getattr(self, key).load_state_dict(content[key])
        version, words, gauss = content["python"]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(content["torch"])
        self.history = content["history"]

    def train(self, epochs: int) -> None:
        """On to the given epoch, from the one that was reached."""
        (x, y), validation = rows(1), rows(2)
        for epoch in range(len(self.history), epochs):
            self.model.train()
            order, losses = list(range(ROWS)), []
            random.shuffle(order)
            for at in range(0, ROWS, BATCH):
                chosen = order[at : at + BATCH]
                loss = mse(self.model, x[chosen], y[chosen])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
                lr = self.schedule.get_last_lr()[0]
                self.schedule.step()
            self.model.eval()
            with torch.no_grad():
                found = mse(self.model, *validation).item()
            best = min((earlier["validation"] for earlier in self.history), default=math.inf)
            entry = {"epoch": epoch, "loss": sum(losses) / len(losses), "validation": found, "lr": lr}
            self.history.append(entry)
            with open(self.folder / "log.csv", "a", newline="") as file:
                csv.writer(file).writerow(entry.values())
            if found < best:
                self.save("best.pt")
            self.save("latest.pt")


def start(case: Case, backend: str, folder: Path, seed: int = 0) -> Run:
    folder.mkdir(exist_ok=True)
    random.seed(seed)
    model = make_model(seed)
    options: dict[str, Any] = {"lr": 0.03, "max_grad_norm": 1.0}
    optimizer = case.make(decay_groups(model, weight_decay=0.01), backend=backend, **options)
    steps = EPOCHS * (ROWS // BATCH)
    return Run(model, optimizer, warmup_cosine(optimizer, 3, steps, 1e-3), folder, [])


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Any:
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(before)


@BACKENDS
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("adamw", "sgd_momentum", "norm_adaptive", "lion")], ids=str)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case: Case, backend: str, tmp_path: Path) -> None:
    straight = start(case, backend, tmp_path / "straight")
    straight.train(EPOCHS)
    start(case, backend, tmp_path / "cut").train(EPOCHS // 2)
    resumed = start(case, backend, tmp_path / "cut", seed=5)  # other weights and random numbers, until it has loaded
    resumed.load(tmp_path / "cut" / "latest.pt")
    assert len(resumed.history) == EPOCHS // 2
    resumed.train(EPOCHS)
    assert_same_optimizers(resumed.optimizer, straight.optimizer)
    assert resumed.history == straight.history
    assert resumed.schedule.state_dict() == straight.schedule.state_dict()
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("straight", "cut")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == EPOCHS
    bests = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("straight", "cut")]
    for key, value in bests[0]["model"].items():
        assert_same_bits(value, bests[1]["model"][key])
    assert bests[0]["history"] == bests[1]["history"]
    reached = [entry["validation"] for entry in straight.history]
    assert bests[0]["history"][-1]["validation"] == min(reached) < reached[0]


@pytest.mark.parametrize("forgotten", ["optimizer", "schedule", "torch", "python"])
def test_each_part_of_a_checkpoint_counts(forgotten: str, tmp_path: Path) -> None:
    """So that the test above would notice its loss."""
    case, backend = BY_NAME["adamw"], "cpu"
    straight = start(case, backend, tmp_path)
    straight.train(2)
    other = start(case, backend, tmp_path)
    fresh = tmp_path / "fresh.pt"
    other.save(fresh.name)
    content = torch.load(tmp_path / "latest.pt", weights_only=True)
    content[forgotten] = torch.load(fresh, weights_only=True)[forgotten]
    torch.save(content, tmp_path / "mixed.pt")
    straight.train(3)
    other.load(tmp_path / "mixed.pt")
    other.train(3)
    assert other.history[:2] == straight.history[:2] and other.history[2] != straight.history[2]


@pytest.mark.parametrize(
    ("case", "backend"),
    # An own rule's compiled code has the bits of its function in test_parity.py.
    [pytest.param(c, b, id=f"{c}-{b}") for c in FULL for b in ("cpu", "reference") if not c.own or b == "reference"],
)
def test_accumulated_gradients_are_those_of_a_larger_batch(case: Case, backend: str) -> None:
    """Up to the rounding of sums: after 5 steps with 3 batches of 16 rows each the parameters differ from those after 5
    with 48 rows by less than 1e-14 of the tensor's largest."""
    (x, y), trained = rows(1), []
    for parts in (1, 3):
        model = make_model(dropout=0.0)
        optimizer = case.make(model.parameters(), backend=backend)
        for _ in range(5):
            optimizer.zero_grad()
            for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (mse(model, some, wanted) / parts).backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14 * float(one.abs().max()))

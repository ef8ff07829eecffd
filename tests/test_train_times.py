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
        "the training's own step of fusedoptim's AdamW: 3.1 ms, median of 3, right after the backward pass, with the "
        "update, the gradients' norm and clipping"
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
    assert "AdamW, compiled: 3.1 ms" in lines("--compile")[0]


def test_two_times_of_one_optimizer_are_told_apart() -> None:
    own, what, mine, theirs = lines("--optimizer", "sgd", "--compare", beside=BESIDE)
    assert own.startswith("the training's own step of fusedoptim's SGD: 3.1 ms")
    assert what.startswith("the update alone, on copies of the parameters") and what.endswith("medians of 3:")
    assert (mine, theirs) == ("  SGD of fusedoptim: 2 ms, 1.00x", "  SGD of torch fused: 3 ms, 1.50x")

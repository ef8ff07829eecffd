"""The agents that learn CartPole with RMSprop: their environment, their losses beside torch's, and what is kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import report, witness
from benchmarks.common.arguments import UsageError
from benchmarks.measure.results import load
from benchmarks.rl import __main__ as rl
from benchmarks.rl.agent import Agent, Settings
from benchmarks.rl.cartpole import TIME_LIMIT, CartPoles, moved
from benchmarks.rl.contenders import CONTENDERS, INSIDE, OURS, TORCH, WITNESS
from benchmarks.rl.table import table

pytest.importorskip("matplotlib")


def test_losses_are_those_of_torch_with_an_exact_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rl.json"
    assert rl.main(["--quick", "--seeds", "1", "--out", str(path)]) == 0
    results = load(path)
    assert results.finished and results.planned == 4
    assert [agent["contender"] for agent in results.agents] == list(CONTENDERS)
    by = {agent["contender"]: agent for agent in results.agents}
    assert by[OURS]["first_difference"] is None and by[WITNESS]["first_difference"] is None
    assert by[WITNESS]["curve"] == by[OURS]["curve"] and len(by[OURS]["curve"]) > 5
    assert by[INSIDE]["first_difference"] == 1  # the first loss comes before any step
    for agent in results.agents:
        assert 0 < agent["share"] < 1 and 0 < agent["optimizer_us"] < agent["update_us"]
        assert 1 <= agent["return"] <= TIME_LIMIT and 1 <= agent["evaluation"] <= TIME_LIMIT
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(path)]) == 0
    text = table(results.agents)
    assert capsys.readouterr().out.count(text) == 2 and "| all 40 |" in text.splitlines()[-1]


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another root in the witness, which is off by two units in the last place."""
    torch.set_num_threads(1)
    ours, theirs = (Agent(rl.QUICK, 0, CONTENDERS[name]) for name in (OURS, WITNESS))
    monkeypatch.setattr(witness, "correctly_rounded_sqrt", lambda x: x.sqrt() * (1 + 2**-22))
    for agent in (ours, theirs):
        for _ in range(5):
            agent.update()
    assert rl.first_difference(ours.losses, theirs.losses) in (1, 2)


def test_the_policy_becomes_better() -> None:
    """Within seconds, as the whole run does: the first episodes take some 20 steps."""
    torch.set_num_threads(1)
    settings = Settings(updates=300, averaged=20)
    for name in (INSIDE, TORCH):
        agent = Agent(settings, 0, CONTENDERS[name])
        for _ in range(settings.updates):
            agent.update()
        assert agent.mean_return > 45, name


def test_poles_follow_the_equations_of_barto_sutton_and_anderson() -> None:
    """In Python's floats, with their sign of gravity, and without friction."""
    g, m_c, m, length, tau = -9.8, 1.0, 0.1, 0.5, 0.02
    x, x_dot, theta, theta_dot = state = (0.3, -0.4, 0.15, 0.7)
    for force in (10.0, -10.0):
        inner = (-force - m * length * theta_dot**2 * math.sin(theta)) / (m_c + m)
        below = length * (4 / 3 - m * math.cos(theta) ** 2 / (m_c + m))
        theta_acc = (-g * math.sin(theta) + math.cos(theta) * inner) / below
        x_acc = (force + m * length * (theta_dot**2 * math.sin(theta) - theta_acc * math.cos(theta))) / (m_c + m)
        expected = [x + tau * x_dot, x_dot + tau * x_acc, theta + tau * theta_dot, theta_dot + tau * theta_acc]
        found = moved(torch.tensor([state], dtype=torch.float64), torch.tensor([force], dtype=torch.float64))
        assert torch.allclose(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)


def test_episodes_end_and_start_again() -> None:
    poles = CartPoles(3, torch.Generator().manual_seed(0))
    poles.state = torch.tensor([[0.0, 0, 0, 0], [2.399, 10.0, 0, 0], [0.0, 0, 0.2, 5.0]])
    poles.age = torch.tensor([TIME_LIMIT - 1.0, 6.0, 2.0])
    fell, ended, reached = poles.step(torch.tensor([1, 0, 1]))
    assert fell.tolist() == [False, True, True] and ended.all()
    assert poles.returns == [TIME_LIMIT, 7, 3] and poles.age.tolist() == [0, 0, 0]
    assert reached[1, 0] > 2.4 and (poles.state.abs() <= 0.05).all()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seeds must be at least 1"):
        rl.main(["--seeds", "0"])
    (tmp_path / "notes.json").write_text("mine")
    with pytest.raises(UsageError, match="is not a results file"):
        rl.main(["--out", str(tmp_path / "notes.json")])

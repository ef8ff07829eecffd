"""A synchronous advantage actor-critic (A2C) on CartPole: Mnih et al., arXiv:1602.01783, one step per rollout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cartpole import TIME_LIMIT, CartPoles


@dataclass(frozen=True)
class Settings:
    environments: int = 16
    #: Steps of each environment per update, over which rewards are summed before the critic is asked.
    rollout: int = 5
    updates: int = 4_000
    width: int = 64
    discount: float = 0.99
    lr: float = 2e-3  # decays linearly to 0
    alpha: float = 0.99
    eps: float = 1e-5
    max_grad_norm: float = 0.5
    value_weight: float = 0.5
    #: Episodes over which a return is averaged.
    averaged: int = 100
    points: int = 50


class ActorCritic(nn.Module):
    """Logits of the two actions and a value, of two networks that share nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
            for out in (2, 1)
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Orthogonal weights and no biases; actions are equally likely at first."""
        for network, last in ((self.actor, 0.01), (self.critic, 1.0)):
            layers = [layer for layer in network if isinstance(layer, nn.Linear)]
            for layer in layers:
                gain = last if layer is layers[-1] else 2**0.5
                nn.init.orthogonal_(layer.weight, gain=gain, generator=generator)
                nn.init.zeros_(layer.bias)

    def value(self, states: Tensor) -> Tensor:
        return self.critic(states).squeeze(-1)


#: Clips and steps: the part of an update whose time is the optimizer's.
Step = Callable[[], object]
Make = Callable[[list[nn.Parameter], Settings], tuple[torch.optim.Optimizer, Step]]


@dataclass
class Agent:
    """A model that learns, with an optimizer and random numbers of its own."""

    settings: Settings
    seed: int
    make: Make
    losses: list[float] = field(default_factory=list)
    #: Seconds of every update: of the optimizer's part, and in all.
    optimizer_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    #: Frames so far, and the mean return of the last episodes by then.
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.model = ActorCritic(self.settings.width)
        self.model.initialise(self._generator)
        self.optimizer, self._step = self.make(list(self.model.parameters()), self.settings)
        self._poles = CartPoles(self.settings.environments, self._generator)

    def update(self) -> None:
        """Acts for a rollout, and learns from it."""
        begin, settings = time.perf_counter(), self.settings
        lr = settings.lr * (1 - len(self.losses) / settings.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        middle = time.perf_counter()
        self._step()
        end = time.perf_counter()
        self.optimizer_s.append(end - middle)
        self.update_s.append(end - begin)
        self.losses.append(loss.item())
        if len(self.losses) % max(1, settings.updates // settings.points) == 0 and self._poles.returns:
            self.curve.append((self.frames, self.mean_return))

    @property
    def frames(self) -> int:
        return len(self.losses) * self.settings.rollout * self.settings.environments

    @property
    def mean_return(self) -> float:
        """Of the last episodes, whose actions were drawn."""
        last = self._poles.returns[-self.settings.averaged :]
        return sum(last) / len(last)

    def _loss(self) -> Tensor:
        settings, poles = self.settings, self._poles
        states, actions, rewards, goes_on = [], [], [], []
        for _ in range(settings.rollout):
            with torch.no_grad():
                chances = self.model.actor(poles.state).softmax(-1)
            action = torch.multinomial(chances, 1, generator=self._generator).squeeze(1)
            states.append(poles.state)
            actions.append(action)
            fell, ended, reached = poles.step(action)
            reward = torch.ones(len(action))
            cut = ended & ~fell
            if cut.any():  # the time limit is no failure: what would have come counts, as the critic sees it
                with torch.no_grad():
                    reward = reward + settings.discount * self.model.value(reached) * cut
            rewards.append(reward)
            goes_on.append((~ended).float())
        with torch.no_grad():
            following = self.model.value(poles.state)
        targets = []
        for reward, on in zip(reversed(rewards), reversed(goes_on), strict=True):
            following = reward + settings.discount * on * following
            targets.append(following)
        target = torch.stack(targets[::-1])
        seen, taken = torch.stack(states), torch.stack(actions)
        chances = self.model.actor(seen).log_softmax(-1)
        values = self.model.value(seen)
        chosen = chances.gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        policy = -(chosen * (target - values.detach())).mean()
        return policy + settings.value_weight * F.mse_loss(values, target)

    @torch.no_grad()
    def evaluate(self, episodes: int) -> float:
        """The mean return of so many new episodes, with the likelier action at every step."""
        poles = CartPoles(episodes, torch.Generator().manual_seed(10_000 + self.seed))
        first = torch.zeros(episodes)
        going = torch.ones(episodes, dtype=torch.bool)
        for _ in range(TIME_LIMIT):
            first += going
            _, ended, _ = poles.step(self.model.actor(poles.state).argmax(-1))
            going &= ~ended
            if not going.any():
                break
        return float(first.mean())


def summary(agent: Agent) -> dict[str, Any]:
    """What a results file keeps of a run; times in microseconds."""
    return {
        "return": agent.mean_return,
        "evaluation": agent.evaluate(agent.settings.averaged),
        "optimizer_us": statistics.median(agent.optimizer_s) * 1e6,
        "update_us": statistics.median(agent.update_s) * 1e6,
        "share": sum(agent.optimizer_s) / sum(agent.update_s),
        "curve": [list(point) for point in agent.curve],
    }

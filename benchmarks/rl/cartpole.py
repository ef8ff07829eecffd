"""CartPole for many poles at once, in torch.

A pole stands on a cart, which a force pushes to the left or to the right at every step. Equations, constants and limits
are those of Gymnasium's CartPole-v1: Barto, Sutton & Anderson, "Neuronlike adaptive elements that can solve difficult
learning control problems" (1983), by Euler's method.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRAVITY, FORCE, SECONDS = 9.8, 10.0, 0.02  # m/s^2, N, of a step
CART, POLE, HALF_LENGTH = 1.0, 0.1, 0.5  # kg, kg, m
#: Beyond them an episode ends.
FURTHEST, STEEPEST = 2.4, 12 * 2 * math.pi / 360  # m, rad
TIME_LIMIT = 500
#: Of the random position, speed, angle and angular speed that an episode starts with.
START = 0.05


def moved(state: Tensor, force: Tensor) -> Tensor:
    """The state after a step. ``state`` (n, 4): position, speed, angle from upright, angular speed; ``force`` (n,)."""
    speed, angle, turning = state[:, 1:].unbind(1)
    sine, cosine = angle.sin(), angle.cos()
    total = CART + POLE
    pushed = (force + POLE * HALF_LENGTH * turning * turning * sine) / total
    turning_change = (GRAVITY * sine - cosine * pushed) / (HALF_LENGTH * (4 / 3 - POLE * cosine * cosine / total))
    speed_change = pushed - POLE * HALF_LENGTH * turning_change * cosine / total
    slopes = torch.stack([speed, speed_change, turning, turning_change], 1)
    return state + SECONDS * slopes


class CartPoles:
    """``count`` carts, each of which starts again as soon as its episode has ended. A step's reward is 1."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._generator = generator
        self.state = self._start(count)
        self.age = torch.zeros(count)
        #: Returns of the episodes that have ended, in order.
        self.returns: list[float] = []

    def _start(self, count: int) -> Tensor:
        return torch.rand(count, 4, generator=self._generator) * (2 * START) - START

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes actions (n,), 0 or 1. Gives whether the pole fell, whether the episode ended (it also does at the time
        limit), each (n,), and the states that were reached, before any new start, (n, 4)."""
        reached = moved(self.state, FORCE * (2.0 * action - 1))
        self.age += 1
        fell = (reached[:, 0].abs() > FURTHEST) | (reached[:, 2].abs() > STEEPEST)
        ended = fell | (self.age >= TIME_LIMIT)
        self.state = reached
        if ended.any():
            self.returns += self.age[ended].tolist()
            self.state = torch.where(ended[:, None], self._start(len(ended)), reached)
            self.age = self.age.masked_fill(ended, 0.0)
        return fell, ended, reached

"""A small GPT whose blocks have a mixture of many experts in place of one MLP. Each token goes to one of them.

Routing and the loss that balances it: the Switch Transformer, Fedus et al., arXiv:2101.03961.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..train.gpt import GPT, Block, GPTConfig

#: Of the loss that balances, as in the paper.
BALANCE = 0.01


@dataclass(frozen=True)
class MixtureConfig(GPTConfig):
    #: Per block, each of three matrices.
    experts: int = 275
    hidden: int = 16


class Expert(nn.Module):
    """A gated MLP (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _used(counts: Tensor) -> list[int]:
    """The experts that any process has tokens for.

    FSDP2 puts the gradients of a block's parameters into one reduce-scatter, those without a gradient left out. So all
    processes must have gradients of the same ones: else those of different experts are added to each other, or, where
    their sizes differ, gloo ends the process."""
    if dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts.nonzero().flatten().tolist()


class MixtureBlock(Block):
    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        del self.up, self.down
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(Expert(config.width, config.hidden) for _ in range(config.experts))

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of activations (batch, time, width) and the imbalance of the blocks before, which is part of the outputs so
        that FSDP2 gathers the parameters again before its backward pass."""
        x, imbalance = given
        x = self.attend(x)
        y, here = self._mixed(self.norm2(x).flatten(0, 1))
        return x + y.view_as(x), imbalance + here

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of (tokens, width), and how far the experts' shares of the tokens are from even: 1 where they are even."""
        chances = self.router(x).softmax(-1)
        weight, expert = chances.max(-1)
        counts = expert.bincount(minlength=len(self.experts))
        order = expert.argsort(stable=True)
        parts = x[order].split(counts.tolist())
        # An expert with tokens in another process only gets none here, and gradients of zeros.
        mixed = torch.cat([self.experts[i](parts[i]) for i in _used(counts)])
        imbalance = len(self.experts) * (counts / len(x)) @ chances.mean(0)
        return mixed[order.argsort()] * weight[:, None], imbalance


class Mixture(GPT):
    block = MixtureBlock

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What to minimise, and the part of it that is the cross-entropy, in nats per token."""
        h, imbalance = self.blocks((self.embedded(x), torch.zeros(())))
        loss = self.loss(h, targets)
        return loss + BALANCE * imbalance / len(self.blocks), loss.detach()

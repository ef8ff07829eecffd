"""A small GPT of plain torch modules: pre-norm blocks of causal attention and a GELU MLP, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    layers: int = 4
    width: int = 160
    heads: int = 4
    context: int = 64
    vocabulary: int = 256


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attention.transpose(1, 2).reshape(batch, time, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    #: Makes one of the blocks.
    block: ClassVar[Callable[[Any], nn.Module]] = Block

    def __init__(self, config: GPTConfig, seed: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(self.block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * config.layers) ** 0.5 if residual else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in nats per token, of targets (batch, time) after tokens x (batch, time)."""
        return self.loss(self.blocks(self.embedded(x)), targets)

    def embedded(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions.weight[: x.shape[1]]

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

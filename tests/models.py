"""Models whose parameters are put into groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Transformer(nn.Module):
    """A pre-norm transformer whose head is its embedding."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.RMSNorm([5, 4])
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def block(i: int, decays: bool) -> list[str]:
    kinds = {
        True: ["attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"],
        False: [
            "norm.weight",
            "norm.bias",
            "attention.in_proj_bias",
            "attention.bias_k",
            "attention.bias_v",
            "attention.out_proj.bias",
            "mlp.0.bias",
            "mlp.2.bias",
        ],
    }
    return [f"blocks.{i}.{name}" for name in kinds[decays]]

"""Groups by depth, with learning rates that fall from layer to layer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from models import Block, Transformer, block, names
from torch import nn

import fusedoptim
from fusedoptim import decay_groups, layerwise_groups


def by_depth(groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for group in groups:
        found.setdefault(group["lr"], set()).update(name for name, _ in group["params"])
    return found


def test_learning_rates_fall_by_a_factor_from_layer_to_layer() -> None:
    groups = layerwise_groups(Transformer(3), 0.1, 0.5, 0.2)
    assert by_depth(groups) == {
        0.1 * 0.5**4: {"pos_embed", "embed.weight"},
        0.1 * 0.5**3: {*block(0, True), *block(0, False)},
        0.1 * 0.5**2: {*block(1, True), *block(1, False)},
        0.1 * 0.5**1: {*block(2, True), *block(2, False)},
        0.1: {"norm.weight", "head.bias"},
    }
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (0.1 * 0.5**4, 0.2),
        *((0.1 * 0.5**n, decay) for n in (3, 2, 1) for decay in (0.2, 0.0)),
        (0.1, 0.0),
    ]
    for decay, of_kind in ((0.2, 0), (0.0, 1)):
        found = {name for g in groups if g["weight_decay"] == decay for name, _ in g["params"]}
        assert found == set(names(decay_groups(Transformer(3), 0.2))[of_kind])


def test_without_weight_decay_there_is_a_group_per_depth() -> None:
    model = Transformer(3)
    groups = layerwise_groups(model, 0.1, 0.5)
    assert len(groups) == 5 and not any("weight_decay" in g for g in groups)
    assert names(groups)[1] == [name for name, _ in model.named_parameters() if name.startswith("blocks.0.")]
    assert {g["weight_decay"] for g in fusedoptim.AdamW(groups).param_groups} == {0.01}


def test_options_of_decay_groups() -> None:
    model = Transformer(1)
    groups = layerwise_groups(model, 0.1, 0.5, 0.2, no_decay=["pos_embed"], decay_embeddings=False)
    spared = {name for g in groups if g["weight_decay"] == 0 for name, _ in g["params"]}
    assert spared == set(names(decay_groups(model, 0.2, no_decay=["pos_embed"], decay_embeddings=False))[1])
    for options in ({"no_decay": ["pos_embed"]}, {"decay_embeddings": False}):
        with pytest.raises(ValueError, match="pass weight_decay as well"):
            layerwise_groups(model, 0.1, 0.5, **options)


def test_frozen_layers_keep_their_depth() -> None:
    model = Transformer(3)
    usual = by_depth(layerwise_groups(model, 0.1, 0.5))
    frozen = {"norm.weight", "head.bias", "pos_embed", "embed.weight", *block(1, True), *block(1, False)}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    assert by_depth(layerwise_groups(model, 0.1, 0.5)) == {
        lr: of_depth for lr, of_depth in usual.items() if not of_depth & frozen
    }


def stages() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Linear(2, 2, bias=False),
            "stage1": nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)),
            "stage2": nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3))),
            "head": nn.Linear(2, 2, bias=False),
        }
    )


@pytest.mark.parametrize(
    ("layers", "depths"),
    [
        (["stage1", "stage2"], [0, 1, 1, 2, 2, 2, 3]),
        (["stage?.0", "stage*"], [0, 1, 2, 1, 2, 2, 3]),
        (["stage2.*"], [0, 0, 0, 1, 1, 1, 2]),
        (["stage2.0", "stage2.1", "stage2.2"], [0, 0, 0, 1, 2, 3, 4]),
        (["stage1.0.weight", "head"], [0, 1, 3, 3, 3, 3, 2]),
        (["head"], [0, 0, 0, 0, 0, 0, 1]),
        ("stage1", [0, 1, 1, 2, 2, 2, 2]),
        (lambda name: {"stem": 3, "stag": 7, "head": 4}[name[:4]], [3, 7, 7, 7, 7, 7, 4]),
    ],
)
def test_layers_by_name_pattern_or_function(layers: Any, depths: list[int]) -> None:
    model = stages()
    expected: dict[float, set[str]] = {}
    for (name, _), depth in zip(model.named_parameters(), depths, strict=True):
        expected.setdefault(0.1 * 0.5 ** (max(depths) - depth), set()).add(name)
    groups = layerwise_groups(model, 0.1, 0.5, layers=layers)
    assert by_depth(groups) == expected
    assert [g["lr"] for g in groups] == sorted(expected)


def test_a_shared_parameter_has_the_smallest_depth_of_its_names() -> None:
    model = stages()
    model["head"].weight = model["stage1"][1].weight
    groups = layerwise_groups(model, 0.1, 0.5, layers=["stage1", "stage2"])
    assert by_depth(groups)[0.1 * 0.5] == {"stage1.0.weight", "stage1.1.weight"}  # with head.weight, the deepest is 2
    groups = layerwise_groups(model, 0.1, 0.5, layers=lambda name: 1 if name.startswith("head") else 2)
    assert by_depth(groups)[0.1 * 0.5] == {"stage1.1.weight"}


def test_layers_are_found() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(5, 4), body, nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)))
    found = by_depth(layerwise_groups(model, 1.0, 0.5))
    assert {lr: {name[:10] for name in of_depth} for lr, of_depth in found.items()} == {
        0.125: {"0.weight"},
        0.25: {"1.layers.0"},
        0.5: {"1.layers.1"},
        1.0: {"2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"},
    }
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert by_depth(layerwise_groups(plain, 1.0, 0.5)) == {0.5: {"0.weight", "0.bias"}, 1.0: {"2.weight", "2.bias"}}


def linears(n: int, size: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(n))


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))


def test_a_longer_list_of_small_heads_is_none_of_layers() -> None:
    model = nn.ModuleDict({"norms": nn.ModuleList(nn.LayerNorm(4) for _ in range(4)), "blocks": Transformer(3).blocks})
    model["heads"] = linears(5)
    found = by_depth(layerwise_groups(model, 1.0, 0.5))
    assert {lr: {name[:8] for name in of_depth} for lr, of_depth in found.items()} == {
        0.5**4: {f"norms.{i}." for i in range(4)},
        **{0.5 ** (3 - i): {f"blocks.{i}"} for i in range(3)},
        1.0: {f"heads.{i}." for i in range(5)},
    }


def test_layers_may_have_lists_that_are_not_longer() -> None:
    model = nn.ModuleDict({"stages": nn.ModuleList(Stage(n) for n in (1, 3, 2))})
    found = by_depth(layerwise_groups(model, 1.0, 0.5))
    assert {lr: {name[:8] for name in of_depth} for lr, of_depth in found.items()} == {
        0.25: {"stages.0"},
        0.5: {"stages.1"},
        1.0: {"stages.2"},
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "the model has no ModuleList or Sequential of several modules of one class: pass layers="),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "the model has no ModuleList or Sequential"),
        (
            stages(),
            "the model has 2 Linears from 'stage1.0' on and 3 Linears from 'stage2.0' on, and it is not clear",
        ),
        (
            nn.ModuleDict({"blocks": Transformer(3).blocks, "heads": linears(5, 10)}),
            "the model has 3 Blocks from 'blocks.0' on and 5 Linears from 'heads.0' on, and it is not clear which are "
            "its layers: pass layers=",
        ),
        (
            nn.ModuleDict({"big": Transformer(9).blocks, "small": Transformer(2).blocks[:2], "heads": linears(2)}),
            "the model has 9 Blocks from 'big.0' on and 2 Blocks from 'small.0' on, and it is not clear",
        ),
        (
            nn.ModuleDict({"stages": nn.ModuleList(Stage(n) for n in (2, 2, 18, 2))}),
            "the model has 4 Stages from 'stages.0' on and 18 Blocks from 'stages.2.blocks.0' on, and it is not clear",
        ),
        (
            nn.Sequential(Stage(3), Stage(3)),
            "the model has 2 Stages from '0' on and 3 Blocks from '0.blocks.0' on, and it is not clear",
        ),
    ],
    ids=["one", "mixed", "stages", "heads", "decoder", "blocks in stages", "two encoders"],
)
def test_layers_that_are_not_clear(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layerwise_groups(model, 0.1, 0.5)

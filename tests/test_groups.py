"""Groups by kind of parameter and by depth, for every optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from torch import nn

import fusedoptim
from fusedoptim import decay_groups, layerwise_groups


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


# ---- decay ----


def test_who_decays() -> None:
    model = Transformer(2)
    decayed, spared = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert names([decayed]) == [["pos_embed", "embed.weight", *block(0, True), *block(1, True)]]
    assert names([spared]) == [[*block(0, False), *block(1, False), "norm.weight", "head.bias"]]
    own = dict(model.named_parameters())
    assert all(own[name] is p for group in (decayed, spared) for name, p in group["params"])


def test_every_parameter_is_in_one_group_in_the_models_order() -> None:
    model = Transformer(2)
    found = [name for of_group in names(decay_groups(model, 0.1)) for name in of_group]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    for of_group in names(decay_groups(model, 0.1)):
        assert of_group == [name for name, _ in model.named_parameters() if name in of_group]


def test_names_reach_groups_and_messages() -> None:
    model = Transformer(1)
    o = fusedoptim.AdamW(decay_groups(model, 0.1))
    assert o.param_groups[0]["param_names"] == ["pos_embed", "embed.weight", *block(0, True)]
    model.blocks[0].mlp[2].weight.grad = torch.ones(4, 8).to_sparse()
    with pytest.raises(ValueError, match=re.escape("'blocks.0.mlp.2.weight'")):
        o.step()


@pytest.mark.parametrize("package", [fusedoptim, torch.optim], ids=["fusedoptim", "torch"])
@pytest.mark.parametrize("of", [lambda m: decay_groups(m, 0.5), lambda m: layerwise_groups(m, 0.1, 0.5, 0.5)])
def test_for_any_optimizer(package: Any, of: Callable[[nn.Module], Any]) -> None:
    """Zero gradients leave nothing but the decay."""
    torch.manual_seed(0)
    model = Transformer(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = package.AdamW(of(model), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert_same_bits(p.detach(), before[name] * (1 - group["lr"] * group["weight_decay"]), name)


def test_frozen_parameters_are_in_no_group() -> None:
    model = Transformer(1)
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    assert names(decay_groups(model, 0.1)) == [["pos_embed", "embed.weight"], ["norm.weight", "head.bias"]]
    model.requires_grad_(False)
    assert decay_groups(model, 0.1) == []


def test_an_empty_group_is_left_out() -> None:
    """torch refuses to mix groups with names and without, as an empty one is."""
    groups = decay_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert names(groups) == [["weight"]]
    assert names(decay_groups(nn.LayerNorm(2), 0.1)) == [["weight", "bias"]]
    torch.optim.SGD(groups)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["pos_embed"], {"pos_embed"}),
        (["*_embed"], {"pos_embed"}),
        (["blocks.0"], set(block(0, True))),
        (["blocks.*.mlp"], {f"blocks.{i}.mlp.{k}.weight" for i in (0, 1) for k in (0, 2)}),
        (["head"], {"embed.weight"}),
        (["head.weight"], {"embed.weight"}),
        (("*.out_proj", "embed"), {"embed.weight", *(f"blocks.{i}.attention.out_proj.weight" for i in (0, 1))}),
        ("embed", {"embed.weight"}),
    ],
)
def test_patterns(patterns: Any, expected: set[str]) -> None:
    """Of parameters and modules; a shared parameter is spared under either name."""
    model = Transformer(2)
    (usual, _), (fewer, _) = names(decay_groups(model, 0.1)), names(decay_groups(model, 0.1, no_decay=patterns))
    assert set(usual) - set(fewer) == expected


def test_embeddings_can_be_spared() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.EmbeddingBag(3, 2), "c": nn.Linear(3, 2, bias=False)})
    assert names(decay_groups(model, 0.1)) == [["a.weight", "b.weight", "c.weight"]]
    assert names(decay_groups(model, 0.1, decay_embeddings=False)) == [["c.weight"], ["a.weight", "b.weight"]]
    assert "embed.weight" in names(decay_groups(Transformer(1), 0.1, decay_embeddings=False))[1]  # though a head's, too


class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))


class OwnNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))


class Renamed(nn.LayerNorm):
    pass


class Normalized(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm([2, 3]), nn.RMSNorm([2, 3]), MyRMSNorm(), OwnNorm2d(), Renamed([2, 3])],
    ids=lambda m: type(m).__name__,
)
def test_normalisation_of_any_shape_does_not_decay(module: nn.Module) -> None:
    (group,) = decay_groups(module, 0.1)
    assert group["weight_decay"] == 0


def test_a_matrix_in_a_module_with_a_similar_name_decays() -> None:
    assert names(decay_groups(Normalized(2, 3), 0.1)) == [["weight"], ["bias"]]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_magnitudes_of_weight_norm_do_not_decay() -> None:
    new, old = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
    model = nn.Sequential(
        new(nn.Linear(2, 3)), old(nn.Conv1d(2, 3, 1)), nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
    )
    decayed, spared = names(decay_groups(model, 0.1))
    assert decayed == ["0.parametrizations.weight.original1", "1.weight_v", "2.parametrizations.weight.original"]
    assert spared == ["0.bias", "0.parametrizations.weight.original0", "1.bias", "1.weight_g", "2.bias"]
    lonely = nn.Module()
    lonely.register_parameter("weight_g", nn.Parameter(torch.ones(2, 2)))
    assert names(decay_groups(lonely, 0.1)) == [["weight_g"]]


def test_recurrent_biases_do_not_decay() -> None:
    decayed, spared = names(decay_groups(nn.LSTM(2, 2, bidirectional=True), 0.1))
    assert all("weight" in name for name in decayed) and all("bias" in name for name in spared)
    assert len(decayed) == len(spared) == 4


@pytest.mark.parametrize("package", [fusedoptim, torch.optim], ids=["fusedoptim", "torch"])
def test_lazy_parameters_are_judged_by_name_and_module(package: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.LazyConv1d(2, 1))
    expected = [["0.weight", "2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"]]
    assert names(decay_groups(model, 0.1)) == expected
    optimizer = package.SGD(decay_groups(model, 0.1), lr=0.5)
    model[0](torch.ones(3, 4))
    assert optimizer.param_groups[0]["params"][0] is model[0].weight and model[0].weight.shape == (2, 4)
    assert names(decay_groups(model, 0.1)) == expected


# ---- layers ----


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


# ---- errors ----


class FullyShardedDataParallel(nn.Module):
    """Known by its name, so that torch.distributed.fsdp need not be imported."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.ones(9))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: decay_groups(nn.Linear(2, 2).parameters(), 0.1), TypeError, "model must be a torch.nn.Module"),
        (lambda: layerwise_groups([], 0.1, 0.5), TypeError, "model must be a torch.nn.Module, .* but is a list"),
        (
            lambda: decay_groups(Transformer(1), 0.1, no_decay=["pos_embedding"]),
            ValueError,
            "no_decay has 'pos_embedding', which fits no .* named as 'pos_embed', 'embed.weight', 'blocks.0",
        ),
        (
            lambda: layerwise_groups(Transformer(1), 0.1, 0.5, layers=["blocks.0", "blocks.1"]),
            ValueError,
            "layers has 'blocks.1', which fits no parameter or module",
        ),
        (
            lambda: layerwise_groups(Transformer(1), 0.1, 0.5, layers=lambda name: None),
            TypeError,
            "the depth of 'pos_embed' must be an integer, but layers.. returned None",
        ),
        (lambda: layerwise_groups(Transformer(1), 0.1, 0.0), ValueError, "layer_decay must be above 0 and at most 1"),
        (lambda: layerwise_groups(Transformer(1), 0.1, 1.5), ValueError, "but is 1.5"),
        (
            lambda: decay_groups(nn.Sequential(FullyShardedDataParallel()), 0.1),
            ValueError,
            "0 is a FullyShardedDataParallel, which flattens .*: make the groups before wrapping, .*orig_params=True",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()

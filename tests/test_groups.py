"""Groups by kind of parameter, for every optimizer, and what no groups can be made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from models import Transformer, block, names
from torch import nn

import fusedoptim
from fusedoptim import decay_groups, layerwise_groups


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

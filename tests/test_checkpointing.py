"""Checkpoints through torch.save, safetensors and torch.distributed.checkpoint: a resumed run has the bits of one that
was never interrupted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import FULL, Case, assert_same_bits, assert_same_optimizers
from stacks import make_model, train, two_groups
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import fusedoptim
from benchmarks.witness import ieee_sqrt

Optimizer = torch.optim.Optimizer
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch 2.10's own writer
]


class TorchSave:
    def save(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "all.pt")

    def load(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        content = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])


class Safetensors:
    """It stores nothing but tensors, so that the groups go to a JSON beside them."""

    def save(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        from safetensors.torch import save_file

        content = optimizer.state_dict()
        flat = {f"state.{i}.{name}": v for i, state in content["state"].items() for name, v in state.items()}
        flat |= {f"model.{name}": v for name, v in model.state_dict().items()}
        save_file(flat, folder / "all.safetensors")
        (folder / "groups.json").write_text(json.dumps(content["param_groups"]))

    def load(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        from safetensors.torch import load_file

        state: dict[int, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for key, value in load_file(folder / "all.safetensors").items():
            kind, rest = key.split(".", 1)
            if kind == "model":
                weights[rest] = value
            else:
                index, name = rest.split(".")
                state.setdefault(int(index), {})[name] = value
        model.load_state_dict(weights)
        groups = json.loads((folder / "groups.json").read_text())
        optimizer.load_state_dict({"state": state, "param_groups": groups})


class Distributed:
    """The functions of torch.distributed.checkpoint.state_dict, which name states after their parameters."""

    def __init__(self, flatten: bool) -> None:
        self.options = StateDictOptions(flatten_optimizer_state_dict=flatten)


class OptimizerStateDict(Distributed):
    def save(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        content = get_optimizer_state_dict(model, optimizer, options=self.options)
        torch.save({"model": model.state_dict(), "optimizer": content}, folder / "all.pt")

    def load(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        content = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(content["model"])
        set_optimizer_state_dict(model, optimizer, content["optimizer"], options=self.options)


class StateDict(Distributed):
    """With files of torch.distributed.checkpoint, which loads in place, into states that must be there."""

    def save(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        weights, states = get_state_dict(model, optimizer, options=self.options)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "dcp", no_dist=True)

    def load(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        weights, states = get_state_dict(model, optimizer, options=self.options)
        content: dict[str, Any] = {"model": weights, "optimizer": states}
        dcp.load(content, checkpoint_id=folder / "dcp", no_dist=True)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=self.options,
        )


WAYS = {
    "torch.save": TorchSave(),
    "safetensors": Safetensors(),
    "get_optimizer_state_dict": OptimizerStateDict(flatten=False),
    "get_optimizer_state_dict flat": OptimizerStateDict(flatten=True),
    "get_state_dict": StateDict(flatten=False),
    "get_state_dict flat": StateDict(flatten=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case: Case, way: str, tmp_path: Path) -> None:
    if way == "safetensors":
        pytest.importorskip("safetensors")
    straight, first, second = make_model(), make_model(), make_model(seed=1)
    expected, before, after = (case.make(two_groups(m, case)) for m in (straight, first, second))
    for model, optimizer in ((straight, expected), (first, before)):
        train(model, optimizer, range(3))
        optimizer.param_groups[1]["lr"] /= 2  # as a schedule would
    WAYS[way].save(first, before, tmp_path)
    WAYS[way].load(second, after, tmp_path)
    assert_same_optimizers(after, before)
    for left, right in zip(after.param_groups, before.param_groups, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"params"}:
            value = tuple(left[key]) if isinstance(left[key], list) else left[key]  # JSON has no tuples
            assert value == right[key], key
    for model, optimizer in ((straight, expected), (second, after)):
        train(model, optimizer, range(3, 6))
    assert_same_optimizers(after, expected)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_states_made_ahead_of_training_change_nothing(case: Case) -> None:
    """torch.distributed.checkpoint makes states by a step with zero gradients and a learning rate of 0."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = case.make(two_groups(model, case))
    rates = [group["lr"] for group in optimizer.param_groups]
    content = get_optimizer_state_dict(model, optimizer)
    assert len(content["state"]) == len(before)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("case", [c for c in FULL if c.in_torch], ids=str)
def test_training_on_from_states_made_ahead_has_torchs_bits(case: Case) -> None:
    """torch counts the step that makes them, and so must this."""
    one, two = make_model(), make_model()
    a, b = case.make(two_groups(one, case)), case.make_torch(two_groups(two, case), foreach=False)
    with ieee_sqrt():
        for model, optimizer in ((one, a), (two, b)):
            get_optimizer_state_dict(model, optimizer)
            train(model, optimizer, range(3))
    assert_same_optimizers(a, b)


def test_safetensors_takes_states_of_any_layout_and_steps_in_one_buffer(tmp_path: Path) -> None:
    """It refuses what is not contiguous, as states of a channels_last parameter are; views that do not overlap, as
    steps on a GPU are, it stores."""
    pytest.importorskip("safetensors.torch")
    params, others = ([nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))] for _ in range(2))
    a, b = FULL[1].make(params), FULL[1].make(others)
    gradients = [torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4) * (i + 1) for i in range(4)]
    for gradient in gradients[:2]:
        params[0].grad = gradient
        a.step()
    state = a.state[params[0]]
    assert not state["exp_avg"].is_contiguous()
    state["step"] = torch.stack([state["step"], state["step"]]).unbind()[0]
    content = a.state_dict()
    content["state"][1] = {"step": state["step"]._base.unbind()[1]}
    flat = {f"{i}.{n}": v.contiguous() for i, values in content["state"].items() for n, v in values.items()}

    from safetensors.torch import load_file, save_file

    save_file(flat, tmp_path / "all.safetensors")
    loaded = {key.split(".")[1]: v for key, v in load_file(tmp_path / "all.safetensors").items() if key[0] == "0"}
    b.load_state_dict({"state": {0: loaded}, "param_groups": content["param_groups"]})
    others[0].data.copy_(params[0].data)
    for gradient in gradients[2:]:
        params[0].grad = others[0].grad = gradient
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "safetensors"])
@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
@pytest.mark.parametrize("case", [c for c in FULL if c.in_torch], ids=str)
def test_checkpoints_move_to_and_from_torch_key_by_key(case: Case, back: bool, way: str, tmp_path: Path) -> None:
    """torch.distributed.checkpoint asks for every key of the optimizer that loads, by name."""
    mine, theirs = make_model(), make_model(seed=1)
    a, b = case.make(two_groups(mine, case)), case.make_torch(two_groups(theirs, case), foreach=False)
    source, target = ((mine, a), (theirs, b)) if back else ((theirs, b), (mine, a))
    with ieee_sqrt():
        train(*source, range(2))
        WAYS[way].save(*source, tmp_path)
        WAYS[way].load(*target, tmp_path)
        assert_same_optimizers(a, b)
        for model, optimizer in (source, target):
            train(model, optimizer, range(2, 4))
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "safetensors"])
def test_options_that_are_on_are_carried_and_others_stay(way: str, tmp_path: Path) -> None:
    """A checkpoint without an option leaves it as the optimizer was made."""
    model = make_model()
    case = Case("adamw", "AdamW", {"max_grad_norm": 2.0, "bias_correction": False})
    saved, loaded = case.make(two_groups(model, case)), case.make(two_groups(model, case), max_grad_norm=1.0)
    train(model, saved, range(1))
    train(model, loaded, range(1))
    WAYS[way].save(model, saved, tmp_path)
    WAYS[way].load(model, loaded, tmp_path)
    assert all(g["max_grad_norm"] == 2.0 and g["bias_correction"] is False for g in loaded.param_groups)


@pytest.mark.parametrize("old", [False, True], ids=["as saved now", "with keys that are None"])
def test_a_checkpoint_without_options_switches_none_off(old: bool) -> None:
    model = make_model()
    case = Case("adamw", "AdamW")
    plain = case.make(two_groups(model, case))
    train(model, plain, range(1))
    content = plain.state_dict()
    if old:
        for group in content["param_groups"]:
            group.update(max_grad_norm=None, clip_grad_value=None, ema_decay=None, bias_correction=True)
    options = {"clip_grad_value": 0.5, "ema_decay": 0.9, "bias_correction": False}
    groups = two_groups(model, case)
    groups[0]["max_grad_norm"] = 1.0
    groups[1]["clip_grad_value"] = None
    optimizer = case.make(groups, **options)
    optimizer.load_state_dict(content)
    first, second = optimizer.param_groups
    assert first["max_grad_norm"] == 1.0 and "max_grad_norm" not in second
    assert first["clip_grad_value"] == 0.5 and "clip_grad_value" not in second
    assert all(g["ema_decay"] == 0.9 and g["bias_correction"] is False for g in (first, second))
    assert first["lr"] == content["param_groups"][0]["lr"]


def test_averages_of_an_optimizer_that_has_states_from_the_start(tmp_path: Path) -> None:
    """torch.distributed.checkpoint asks for the states that are there, and Adagrad's are before any step."""
    case = Case("adagrad_ema", "Adagrad", {"lr": 0.1, "ema_decay": 0.5})
    first, second = make_model(), make_model(seed=1)
    before, after = (case.make(two_groups(m, case)) for m in (first, second))
    train(first, before, range(3))
    StateDict(flatten=False).save(first, before, tmp_path)
    StateDict(flatten=False).load(second, after, tmp_path)
    assert_same_optimizers(after, before)
    assert all("ema" in after.state[p] for p in second.parameters())


def test_averages_made_with_the_optimizer_start_as_the_weights_of_the_first_step() -> None:
    case = Case("adagrad_ema", "Adagrad", {"lr": 0.1, "ema_decay": 0.5})
    model, other = make_model(), make_model(seed=1)
    optimizer, expected = case.make(two_groups(model, case)), case.make(two_groups(other, case))
    with pytest.raises(RuntimeError, match="there are no moving averages"), optimizer.ema_weights():
        pass
    model.load_state_dict(other.state_dict())  # after the optimizer was made
    train(model, optimizer, range(2))
    train(other, expected, range(2))
    assert_same_optimizers(optimizer, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_averages_of_a_parameter_that_is_stepped_later_start_as_it_is_then(backend: str) -> None:
    first, late = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = fusedoptim.Adagrad([first, late], lr=0.0, ema_decay=0.5, backend=backend)
    for p, value in ((first, 1.0), (late, 5.0)):
        p.data.fill_(value)
        p.grad = torch.ones(3)
        optimizer.step()
        p.grad = None
    assert (optimizer.state[late]["ema"] == 5).all() and (optimizer.state[first]["ema"] == 1).all()


def test_averages_beside_entries_of_others() -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = fusedoptim.Adagrad(params, ema_decay=0.5)
    optimizer.state[params[1]] = {"ema": torch.zeros(3), "note": "no step"}
    params[0].grad = torch.ones(3)
    optimizer.step()
    with optimizer.ema_weights():
        pass

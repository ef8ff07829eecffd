"""torch.distributed.checkpoint with masters, stochastic rounding and 8 bits: training goes on with the same bits, on
other numbers of processes and in other layouts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_layouts import CASES, Part, alone, assert_a_part, params_of
from ranks import run
from sharded_models import shard, whole
from torch import nn

from fusedoptim._exchange import RankError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
HALF, STEPS = 2, 4
NAMES = ["all stochastic", "remainder", "8 bits", "remainder8", "sgd"]


class Training:
    """A model for each case, with its optimizer."""

    def __init__(self, layout: str, seed: int = 0) -> None:
        self.parts = {name: Part(layout, CASES[name].dtype, seed) for name in NAMES}
        self.model = nn.ModuleDict({name: part.model for name, part in self.parts.items()})
        self.optimizers = {name: CASES[name].make(params_of(self.parts[name].model, named=True)) for name in NAMES}

    def advance(self, steps: range) -> None:
        for name, part in self.parts.items():
            part.advance(self.optimizers[name], steps)

    def check(self, steps: int, what: str) -> None:
        for name, part in self.parts.items():
            assert_a_part(part, self.optimizers[name], alone(name, steps, True), f"{what}: {name}")


@contextmanager
def quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns of what it uses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def taken(training: Training, **options: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    how = StateDictOptions(**options)
    weights, states = get_state_dict(training.model, list(training.optimizers.values()), options=how)
    return {"model": weights, "optimizer": states}


def put(training: Training, content: dict[str, Any], **options: Any) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    how, optimizers = StateDictOptions(**options), list(training.optimizers.values())
    set_model_state_dict(training.model, content["model"], options=how)
    set_optimizer_state_dict(training.model, optimizers, content["optimizer"], options=how)


def save(layout: str, folder: str, **options: Any) -> None:
    import torch.distributed.checkpoint as dcp

    training = Training(layout)
    training.advance(range(HALF))
    with quiet():
        dcp.save(taken(training, **options), checkpoint_id=folder)


def resume(layout: str, folder: str, **options: Any) -> None:
    import torch.distributed.checkpoint as dcp

    training = Training(layout, seed=1)
    with quiet():
        content = taken(training, **options)
        dcp.load(content, checkpoint_id=folder)
        put(training, content, **options)
    training.check(HALF, f"{layout}, loaded")
    training.advance(range(HALF, STEPS))
    training.check(STEPS, f"{layout}, later")


def in_memory(layout: str, kinds: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """From one training into others, by state_dicts of every kind."""
    source = Training(layout)
    source.advance(range(HALF))
    for to_get, to_set in kinds:
        target = Training(layout, seed=1)
        with quiet():
            content = taken(source, **to_get)
            if to_set.get("broadcast_from_rank0") and dist.get_rank() > 0:
                content = {"model": {}, "optimizer": {}}
            put(target, content, **to_set)
        target.check(HALF, f"{to_get}, loaded")
        target.advance(range(HALF, STEPS))
        target.check(STEPS, f"{to_get}, later")


def by_hand() -> None:
    """By load_state_dict: whole tensors, of which every rank takes its part, and DTensors that lie elsewhere."""
    for source_layout, target_layout, as_saved in (
        ("fsdp2", "fsdp2", whole),
        ("single", "fsdp2", whole),
        ("tensor_parallel", "fsdp2", lambda t: t),
        ("fsdp2", "in_columns", lambda t: t),
    ):
        source, target = Training(source_layout), Training(target_layout, seed=1)
        source.advance(range(HALF))
        for name, part in target.parts.items():
            content = source.optimizers[name].state_dict()
            for i, (p, q) in enumerate(zip(part.params, source.parts[name].params, strict=True)):
                shard(p).copy_(part.part(i, whole(q)))
            for values in content["state"].values():
                for key, value in values.items():
                    if isinstance(value, torch.Tensor):  # and no mark of a state in codes
                        values[key] = as_saved(value)
            target.optimizers[name].load_state_dict(content)
        what = f"{source_layout} to {target_layout}"
        target.check(HALF, f"{what}, loaded")
        target.advance(range(HALF, STEPS))
        target.check(STEPS, f"{what}, later")


def wrong_on_one(layout: str, rank: int, what: str) -> str:
    """What loading raises where one rank's part of a parameter is of another step, or its states are wrong or fewer;
    nothing is loaded then."""
    source, target = Training(layout), Training(layout)
    source.advance(range(HALF))
    name = "remainder8"
    content = source.optimizers[name].portable_state_dict()
    for p, q in zip(target.parts[name].params, source.parts[name].params, strict=True):
        shard(p).copy_(shard(q))
    if dist.get_rank() == rank:
        first = next(iter(content["state"].values()))
        if what == "parameter":
            shard(target.parts[name].params[0])[0] += 1
        elif what == "shape":
            first["exp_avg"] = torch.zeros(3)
        elif what == "groups":
            content["param_groups"] = content["param_groups"] * 2
        else:
            for values in content["state"].values():
                del values["master"]
    try:
        target.optimizers[name].load_state_dict(content)
    except (ValueError, RankError) as error:
        assert not target.optimizers[name].state
        return str(error)
    return "nothing"


# ---- the tests ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {}


SAVED = {"fsdp2": 2, "both": 4}
RESUMED = [
    ("fsdp2", "fsdp2", 3),
    ("fsdp2", "both", 4),
    ("fsdp2", "in_columns", 2),
    ("both", "hsdp", 4),
    ("both", "single", 1),
]


@pytest.mark.parametrize(("source", "target", "world"), RESUMED)
def test_bits_after_a_resume(source: str, target: str, world: int, folders: dict[str, str], tmp_path: Path) -> None:
    if source not in folders:
        folders[source] = str(tmp_path)
        run(SAVED[source], save, source, str(tmp_path))
    run(world, resume, target, folders[source])


KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    ({"full_state_dict": True}, {"full_state_dict": True}),
    ({"full_state_dict": True, "cpu_offload": True}, {"full_state_dict": True, "broadcast_from_rank0": True}),
]


def test_loading_by_hand() -> None:
    run(2, by_hand)


@pytest.mark.parametrize(("layout", "world", "rank"), [("fsdp2", 2, 1), ("hsdp", 4, 2), ("both", 4, 1)])
def test_what_is_wrong_on_one_rank_alone_raises_on_all(layout: str, world: int, rank: int) -> None:
    kinds = {
        "parameter": "0 'up.weight' of group 0.*Load the model first",
        "shape": r"0 'up.weight' of group 0.* has shape \(3,\)",
        "groups": "different number of parameter groups",
    }
    for what, says in kinds.items():
        for i, text in enumerate(run(world, wrong_on_one, layout, rank, what)):
            assert re.search(says if i == rank else "^another rank refused", text), (what, i, text)
    assert run(world, wrong_on_one, layout, rank, "lacks") == ["nothing"] * world


def test_state_dicts_of_every_kind() -> None:
    run(2, in_memory, "fsdp2", KINDS)

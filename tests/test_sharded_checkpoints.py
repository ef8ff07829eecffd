"""torch.distributed.checkpoint: training goes on in another layout, on another number of processes, in torch.optim."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from ranks import run
from sharded_layouts import EXACT, Tensors, Training
from sharded_models import is_dtensor, shard

import fusedoptim
from benchmarks.witness import ieee_sqrt

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
HALF, STEPS = 2, 4
OPTIONS = {"max_grad_norm", "clip_grad_value", "ema_decay", "bias_correction", "state_dtype"}


def with_options(case: Case, name: str, **options: Any) -> Case:
    return replace(case, name=f"{case.name}_{name}", options={**case.options, **options}, in_torch=False)


#: Groups with every option that torch's do not have.
EMA = [with_options(case, "ema", ema_decay=0.9) for case in FULL]
MINE = [
    *EMA,
    with_options(BY_NAME["adam_no_correction"], "clipped", max_grad_norm=0.1, clip_grad_value=0.05),
    with_options(BY_NAME["sgd_nesterov"], "clipped", max_grad_norm=0.1, skip_nonfinite=True),
    with_options(BY_NAME["adamw_amsgrad"], "bf16", state_dtype=torch.bfloat16, skip_nonfinite=True),
]
#: Enough where what differs is how all are kept.
FEW = [
    case
    for case in MINE
    if case.name.startswith(("adamw_amsgrad_ema", "adagrad", "norm_adaptive", "adam_no", "schedule_free"))
]
TORCHS = [case for case in FULL if case.in_torch]


def norm_counts(case: Case) -> bool:
    """Sums of squares are added shard by shard."""
    return case.cls.rule.sums > 0 or "max_grad_norm" in case.options


# ---- what every rank does ----


@contextmanager
def quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns of what it uses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def taken(training: Training, **options: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    optimizers = list(training.optimizers.values())
    weights, states = get_state_dict(training.model, optimizers, options=StateDictOptions(**options))
    return {"model": weights, "optimizer": states}


def put(training: Training, loaded: dict[str, Any], **options: Any) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )

    model, optimizers = training.model, list(training.optimizers.values())
    how = StateDictOptions(**options)
    if options.get("broadcast_from_rank0"):  # the other function sends no model where a rank has none
        set_model_state_dict(model, loaded["model"], options=how)
        set_optimizer_state_dict(model, optimizers, loaded["optimizer"], options=how)
        return
    weights, states = loaded["model"], loaded["optimizer"]
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states, options=how)


def save(layout: str, cases: list[Case], folder: str, flat: bool, of_torch: bool) -> tuple[dict, dict]:
    """The first half of the training, which is saved, and the second."""
    import torch.distributed.checkpoint as dcp

    training = Training(layout, cases, of_torch=of_torch)
    with ieee_sqrt() if of_torch else nullcontext():
        half = training.go_on(range(HALF))
        with quiet():
            dcp.save(taken(training, flatten_optimizer_state_dict=flat), checkpoint_id=folder)
        return half, training.go_on(range(HALF, STEPS))


def resume(
    layout: str, cases: list[Case], folder: str, flat: bool, of_torch: bool, partly: bool = False
) -> tuple[dict, dict]:
    """What was loaded where all values were others, and the second half of the training."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    training = Training(layout, cases, 1, of_torch)
    before = training.contents()
    with quiet():
        content = taken(training, flatten_optimizer_state_dict=flat)
        check_unchanged(training, before)
        dcp.load(content, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partly))
        put(training, content, flatten_optimizer_state_dict=flat)
    contents, rates = training.contents(), training.rates()
    half = {name: {"content": contents[name], "rates": rates[name], "on": options_on(o)}
            for name, o in training.optimizers.items()}  # fmt: skip
    check_placed(training)
    with ieee_sqrt() if of_torch else nullcontext():
        return half, training.go_on(range(HALF, STEPS))


def options_on(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: optimizer.param_groups[0][key] for key in OPTIONS & optimizer.param_groups[0].keys()}


def check_unchanged(training: Training, before: dict[str, Tensors]) -> None:
    """To make states torch steps once with zero gradients and a learning rate of 0."""
    for name, now in training.contents().items():
        for old, new in zip(before[name], now, strict=True):
            assert_same_bits(old["parameter"], new["parameter"], name)
        assert training.rates()[name][0] == 0.006
        if isinstance(training.optimizers[name], fusedoptim.FusedOptimizer):
            assert training.optimizers[name].skipped_steps.item() == 0


def check_placed(training: Training) -> None:
    for name, optimizer in training.optimizers.items():
        for p, states in optimizer.state.items():
            for key, value in states.items():
                if value is None or (value.dim() == 0 < p.dim()):
                    assert not is_dtensor(value), (name, key)
                    continue
                assert is_dtensor(value) == is_dtensor(p) and shard(value).shape == shard(p).shape, (name, key)
                if is_dtensor(p):
                    assert value.placements == p.placements and value.device_mesh == p.device_mesh, (name, key)


def keys_of_groups(cases: list[Case]) -> dict[str, list[set[str]]]:
    found = {}
    for case in cases:
        with quiet():
            groups = taken(Training("fsdp2", [case]))["optimizer"]["param_groups"]
        found[case.name] = [set(group) - {"params", "param_names"} for group in groups]
    return found


def in_memory(layout: str, cases: list[Case], to_get: dict[str, Any], to_set: dict[str, Any]) -> None:
    """From one training into another, by state_dicts of this kind; then both go on."""
    source, target = Training(layout, cases), Training(layout, cases, 1)
    source.go_on(range(HALF))
    with quiet():
        content = taken(source, **to_get)
        if to_set.get("broadcast_from_rank0") and dist.get_rank() > 0:
            content = {"model": {}, "optimizer": {}}
        put(target, content, **to_set)
    check_placed(target)
    assert source.rates() == target.rates()
    assert_same_contents(source.shards(), target.shards(), "loaded")
    later = [training.go_on(range(HALF, STEPS)) for training in (source, target)]
    assert_same_contents(source.shards(), target.shards(), "later")
    for case in cases:
        assert_same_bits(*(torch.stack(of[case.name]["losses"]) for of in later), case.name)


def error_of_resume(*args: Any) -> str:
    try:
        resume(*args)
    except BaseException as error:  # of torch.distributed.checkpoint, which is none of Exception
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# ---- comparisons ----


def assert_same_contents(a: dict[str, Tensors], b: dict[str, Tensors], what: str) -> None:
    assert a.keys() == b.keys()
    for case in a:
        for i, (left, right) in enumerate(zip(a[case], b[case], strict=True)):
            assert left.keys() == right.keys(), (what, case, i, left.keys(), right.keys())
            for name in left:
                assert_same_bits(left[name], right[name], f"{what}, {case}: {name} of parameter {i}")


def contents(found: dict[str, Any], names: set[str]) -> dict[str, Tensors]:
    return {name: of["content"] for name, of in found.items() if name in names}


def assert_resumed(saved: list[tuple], resumed: list[tuple], exact: set[str]) -> None:
    """What was loaded is what was saved, on every rank; of those that are ``exact``, so is what became of it."""
    half, end = saved[0]
    for of_rank in saved:
        assert_same_contents(contents(of_rank[1], set(end)), contents(end, set(end)), "saved")
    for rank, (loaded, later) in enumerate(resumed):
        assert_same_contents(contents(loaded, set(half)), contents(half, set(half)), f"rank {rank}, loaded")
        assert all(of["rates"][0] == 0.003 for of in loaded.values())
        assert_same_contents(contents(later, exact), contents(end, exact), f"rank {rank}, later")
        for name in exact:
            assert_same_bits(torch.stack(later[name]["losses"]), torch.stack(end[name]["losses"]), name)


class Checkpoints:
    """Each is saved once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, {}

    def of(self, layout: str, world: int, cases: list[Case], flat: bool = False, of_torch: bool = False) -> Any:
        key = (layout, world, *(case.name for case in cases), flat, of_torch)
        if key not in self.saved:
            path = str(self.folder / str(len(self.saved)))
            self.saved[key] = path, run(world, save, layout, cases, path, flat, of_torch)
        return self.saved[key]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


# ---- the tests ----

PAIRS = [
    (("fsdp2", 4), ("fsdp2", 4), MINE),
    (("fsdp2", 4), ("fsdp2", 2), MINE),
    (("fsdp2", 2), ("fsdp2", 4), FEW),
    (("fsdp2", 4), ("hsdp", 4), MINE),
    (("hsdp", 4), ("ddp", 2), FEW),
    (("ddp", 2), ("single", 1), FEW),
    (("single", 1), ("fsdp2", 2), FEW),
    (("fsdp2", 2), ("both", 4), FEW),
    (("both", 4), ("both", 4), FEW),
    (("both", 4), ("tensor_parallel", 2), FEW),
    (("tensor_parallel", 2), ("fsdp2", 4), FEW),
]


@pytest.mark.parametrize(
    ("source", "target", "cases"),
    PAIRS,
    ids=lambda x: f"{x[0]} {x[1]}" if isinstance(x, tuple) else f"{len(x)} optimizers",
)
def test_training_goes_on_in_another_layout(
    source: Any, target: Any, cases: list[Case], checkpoints: Checkpoints
) -> None:
    path, saved = checkpoints.of(*source, cases)
    resumed = run(target[1], resume, target[0], cases, path, False, False)
    all_exact = {source[0], target[0]} <= EXACT
    exact = {case.name for case in cases if source == target or (all_exact and not norm_counts(case))}
    assert_resumed(saved, resumed, exact)


def test_flat_keys(checkpoints: Checkpoints) -> None:
    """Those of torchtitan."""
    path, saved = checkpoints.of("fsdp2", 4, FEW, flat=True)
    resumed = run(2, resume, "fsdp2", FEW, path, True, False)
    assert_resumed(saved, resumed, {case.name for case in FEW if not norm_counts(case)})


@pytest.mark.parametrize("from_torch", [True, False], ids=["from torch.optim", "to torch.optim"])
def test_torchs_optimizers(from_torch: bool, checkpoints: Checkpoints) -> None:
    path, saved = checkpoints.of("fsdp2", 4, TORCHS, of_torch=from_torch)
    resumed = run(2, resume, "fsdp2", TORCHS, path, False, not from_torch)
    assert_resumed(saved, resumed, {case.name for case in TORCHS})


def test_groups_have_torchs_keys_and_what_is_on() -> None:
    (found,) = run(1, keys_of_groups, MINE + TORCHS)
    for case in MINE + TORCHS:
        on = OPTIONS & case.options.keys()
        reference = getattr(torch.optim, case.optimizer, case.cls)
        torchs = reference([torch.nn.Parameter(torch.zeros(1))]).param_groups[0].keys() - {"params"}
        assert [keys - torchs for keys in found[case.name]] == [on, on], case.name
        assert [torchs - keys for keys in found[case.name]] == [set(), set()], case.name


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flat": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "on the CPU": ({"cpu_offload": True}, {"cpu_offload": True}),
    "whole": ({"full_state_dict": True}, {"full_state_dict": True}),
    "whole on rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


@pytest.mark.parametrize("layout", ["fsdp2", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_of_every_kind(kind: str, layout: str) -> None:
    if (kind, layout) == ("whole", "both"):
        pytest.skip("torch does not send whole tensors to uneven shards of two dimensions of a mesh")
    run(4, in_memory, layout, FEW, *KINDS[kind])


def test_an_optimizer_without_states(checkpoints: Checkpoints) -> None:
    """torch loads none of these beside others, unless told not to be strict."""
    sgd = [BY_NAME["sgd"]]
    path, saved = checkpoints.of("fsdp2", 2, sgd)
    assert_resumed(saved, run(4, resume, "fsdp2", sgd, path, False, False), {"sgd"})


def test_what_a_checkpoint_lacks(checkpoints: Checkpoints) -> None:
    """torch.distributed.checkpoint wants all that the optimizer has, unless told otherwise: then that stays."""
    path, saved = checkpoints.of("fsdp2", 4, TORCHS, of_torch=True)
    for option, key in (({"max_grad_norm": 0.1}, "max_grad_norm"), ({"ema_decay": 0.9}, "ema")):
        cases = [replace(case, options={**case.options, **option}) for case in TORCHS]
        (text,) = set(run(2, error_of_resume, "fsdp2", cases, path, False, False))
        assert "Missing key" in text and key in text
        resumed = run(2, resume, "fsdp2", cases, path, False, False, True)
        for half, _ in resumed:
            assert all(of["on"] == option for of in half.values())
            for of in half.values():
                for values in of["content"]:
                    assert (values.pop("ema", None) is not None) == (key == "ema")
        assert_resumed(saved, resumed, set())

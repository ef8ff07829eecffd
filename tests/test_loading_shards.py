"""load_state_dict over DTensors: states come to lie where their parameters lie, whoever saved them and how."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from ranks import run
from sharded_models import is_dtensor, mesh, shard, whole
from torch import Tensor

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 4
SHAPES = [(5, 3), (17,), (2, 7), (), (6, 4)]
ADAM = BY_NAME["adamw_amsgrad"]


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in SHAPES]


def distributed(t: Tensor, on: Any, *placements: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, on, placements, src_data_rank=None)


def flat() -> Any:
    return mesh(WORLD)


def square() -> Any:
    return mesh(2, 2, names=("replicate", "shard"))


def params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Sharded by rows, by columns, over two dimensions of a mesh, on all ranks, and plain."""
    from torch.distributed.tensor import Replicate, Shard

    a, b, c, d, e = (t.to(dtype) for t in values(seed))
    return [
        torch.nn.Parameter(t)
        for t in (
            distributed(a, flat(), Shard(0)),
            distributed(b, flat(), Shard(0)),
            distributed(c, square(), Replicate(), Shard(1)),
            distributed(d, flat(), Replicate()),
            e,
        )
    ]


def trained(case: Case, steps: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    ps = params(seed, dtype)
    optimizer = case.make(ps, **options)
    for step in range(steps):
        advance(ps, step)
        optimizer.step()
    return optimizer


def advance(ps: list[Any], step: int) -> None:
    for p, g in zip(ps, values(100 + step), strict=True):
        g = g.to(p.dtype)
        p.grad = distributed(g, p.device_mesh, *p.placements) if is_dtensor(p) else g


def states(optimizer: Any) -> list[dict[str, Any]]:
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def slots(optimizer: Any) -> set[str]:
    return {slot.name for slot in optimizer.rule.states} | {"ema"}


def changed(optimizer: Any, change: Callable[[Any, Tensor], Any]) -> dict[str, Any]:
    """Its state_dict, with what ``change`` makes of a parameter and a state that lies as the parameter does."""
    content = copy.deepcopy(optimizer.state_dict())
    for p, entry in zip(optimizer.param_groups[0]["params"], content["state"].values(), strict=True):
        for name in slots(optimizer) & entry.keys():
            entry[name] = change(p, entry[name])
    return content


def check_equal(a: Any, b: Any, what: str = "") -> None:
    """Bits, placements and memory of states."""
    for i, (left, right) in enumerate(zip(states(a), states(b), strict=True)):
        assert left.keys() == right.keys(), (what, i, left.keys(), right.keys())
        for name, value in left.items():
            other, about = right[name], f"{what} {name} of parameter {i}"
            assert type(value) is type(other), about
            if is_dtensor(value):
                assert value.placements == other.placements and value.device_mesh == other.device_mesh, about
                assert value.shape == other.shape and value.stride() == other.stride(), about
            assert_same_bits(shard(value), shard(other), about)
            assert shard(value).stride() == shard(other).stride(), about
            storage = shard(value).untyped_storage()  # that of a part keeps no whole tensor alive
            assert storage.nbytes() == shard(value).nbytes, about


# ---- what every rank does; the tests follow ----


def as_saved(case: Case) -> None:
    """With memory of its own."""
    source = trained(case)
    target = trained(case, steps=0, seed=1)
    target.load_state_dict(source.state_dict())
    check_equal(target, source, case.name)
    for left, right in zip(states(target), states(source), strict=True):
        for name in left:
            assert left[name] is not right[name], name
            assert shard(left[name]).numel() == 0 or shard(left[name]).data_ptr() != shard(right[name]).data_ptr()
    for p, q in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        shard(p).copy_(shard(q))
    for optimizer in (source, target):
        advance(optimizer.param_groups[0]["params"], 7)
        optimizer.step()
    check_equal(target, source, f"{case.name}, a step later")
    for p, q in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        assert_same_bits(shard(p), shard(q))


def from_a_file() -> None:
    """Of each rank's own."""
    source = trained(ADAM)
    torch.save(source.state_dict(), file := io.BytesIO())
    file.seek(0)
    target = trained(ADAM, steps=0)
    target.load_state_dict(torch.load(file, weights_only=False))
    check_equal(target, source)


def from_torch(case: Case) -> None:
    ps = params()
    theirs = case.make_torch(ps, foreach=False)
    advance(ps, 0)
    theirs.step()
    mine = case.make(params(), max_grad_norm=3.0)
    mine.load_state_dict(theirs.state_dict())
    check_equal(mine, theirs, case.name)
    again = case.make_torch(params())
    again.load_state_dict(mine.state_dict())
    check_equal(again, theirs, case.name)


def placed_otherwise(p: Any, value: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    if not is_dtensor(p):
        return value
    if p.device_mesh.ndim == 2:
        return value.redistribute(value.device_mesh, (Shard(0), Replicate()))
    return value.redistribute(value.device_mesh, [Shard(p.dim() - 1) if p.dim() > 1 else Replicate()])


def on_another_mesh(p: Any, value: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    if not is_dtensor(p):
        return value
    if p.device_mesh.ndim == 2:
        return distributed(value.full_tensor(), flat(), Shard(0))
    return distributed(value.full_tensor(), square(), *([Shard(0), Shard(0)] if p.dim() else [Replicate()] * 2))


def as_a_whole(p: Any, value: Any) -> Any:
    return whole(value).clone()


def from_elsewhere(case: Case, change: str) -> None:
    source = trained(case, ema_decay=0.9)
    target = trained(case, steps=0, seed=1, ema_decay=0.9)
    target.load_state_dict(changed(source, globals()[change]))
    check_equal(target, source, f"{case.name}, {change}")


def without_communication(case: Case) -> int:
    """How many collectives it takes to load whole tensors, and states that lie as parameters do."""
    from torch.distributed.tensor.debug import CommDebugMode

    source = trained(case)
    contents = [changed(source, as_a_whole), source.state_dict()]
    target = trained(case, steps=0, seed=1)
    with CommDebugMode() as counted:
        for content in contents:
            target.load_state_dict(content)
    return counted.get_total_counts()


def dtypes() -> None:
    """As for plain tensors: an asked-for dtype wins, else that which the checkpoint asked for; without one nothing
    becomes narrower, or stays narrower than new ones are."""
    bf16 = trained(ADAM, state_dtype=torch.bfloat16)
    for change in (None, as_a_whole, placed_otherwise):
        content = changed(bf16, change) if change else bf16.state_dict()
        for options in ({"state_dtype": torch.bfloat16}, {}):
            kept = trained(ADAM, steps=0, **options)
            kept.load_state_dict(content)
            check_equal(kept, bf16)
            assert kept.param_groups[0]["state_dtype"] is torch.bfloat16
        for group in content["param_groups"]:
            del group["state_dtype"]  # as older versions saved it
        widened = trained(ADAM, steps=0)
        with pytest.warns(UserWarning, match="have been widened"):
            widened.load_state_dict(content)
        assert {states(widened)[i]["exp_avg"].dtype for i in range(len(SHAPES))} == {torch.float32}
    fp32 = trained(ADAM)
    narrow = trained(ADAM, steps=0, dtype=torch.bfloat16)
    narrow.load_state_dict(fp32.state_dict())
    check_equal(narrow, fp32)


def scalars_of_every_kind() -> None:
    """``step`` as a number, and as somebody distributed it; those of one number stay plain."""
    from torch.distributed.tensor import Replicate

    for case in (ADAM, BY_NAME["norm_adaptive_all"]):
        source = trained(case)
        for make in (float, lambda t: distributed(t, flat(), Replicate())):
            content = copy.deepcopy(source.state_dict())
            for entry in content["state"].values():
                for name in {"step", "avg_grad_norm"} & entry.keys():
                    entry[name] = make(entry[name])
            target = trained(case, steps=0)
            target.load_state_dict(content)
            check_equal(target, source)


def carried_along() -> None:
    """Entries of a wrapper, and states of what is frozen, stay what they are."""
    from torch.distributed.tensor import Shard

    source = trained(ADAM)
    content = copy.deepcopy(source.state_dict())
    anything = {"plain": torch.arange(15.0).reshape(5, 3), "sharded": distributed(torch.ones(5, 3), flat(), Shard(1))}
    for entry in content["state"].values():
        entry.update(copy.deepcopy(anything), number=3)
    target = trained(ADAM, steps=0)
    target.param_groups[0]["params"][4].requires_grad_(False)
    content["state"][4]["exp_avg"] = distributed(torch.ones(6, 4), flat(), Shard(1))
    target.load_state_dict(content)
    for entry in states(target):
        assert type(entry["plain"]) is Tensor and torch.equal(entry["plain"], anything["plain"])
        assert entry["sharded"].placements == (Shard(1),) and entry["number"] == 3
    assert states(target)[4]["exp_avg"].placements == (Shard(1),)


def refused() -> dict[str, str]:
    """What each wrong state raises, after which nothing has changed."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    half = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    wrong = {
        "a DTensor for a plain parameter": (4, lambda v: distributed(v, flat(), Shard(0))),
        "replicated for a plain parameter": (4, lambda v: distributed(v, flat(), Replicate())),
        "on other ranks": (0, lambda v: DTensor.from_local(torch.zeros(3, 3), half, [Shard(0)], run_check=False)),
        "a shard": (1, lambda v: torch.zeros(5 if dist.get_rank() < 3 else 2)),
        "of another shape": (0, lambda v: distributed(torch.zeros(5, 4), flat(), Shard(0))),
        "a whole one of another shape": (0, lambda v: torch.zeros(4, 4)),
        "integers": (0, lambda v: distributed(torch.zeros(5, 3, dtype=torch.int32), flat(), Shard(0))),
    }
    found = {}
    for what, (i, change) in wrong.items():
        target = trained(ADAM)
        before, groups = copy.deepcopy(target.state_dict()), target.param_groups
        held = [dict(entry) for entry in states(target)]
        content = copy.deepcopy(trained(ADAM, steps=3).state_dict())
        content["param_groups"][0]["lr"] = 7.0
        content["state"][i]["exp_avg_sq"] = change(content["state"][i]["exp_avg_sq"])
        with pytest.raises(ValueError) as caught:
            target.load_state_dict(content)
        found[what] = str(caught.value)
        assert target.param_groups is groups and groups[0]["lr"] == before["param_groups"][0]["lr"]
        for old, now, value in zip(held, states(target), before["state"].values(), strict=True):
            assert old.keys() == now.keys() and all(now[name] is old[name] for name in now)
            for name in now:
                assert_same_bits(shard(now[name]), shard(value[name]))
    return found


# ---- the tests ----


@pytest.mark.parametrize("case", FULL, ids=str)
def test_states_that_lie_as_their_parameters(case: Case) -> None:
    run(WORLD, as_saved, case)


def test_states_from_each_ranks_file() -> None:
    run(WORLD, from_a_file)


@pytest.mark.parametrize("case", [c for c in FULL if c.in_torch], ids=str)
def test_torchs_states_and_back(case: Case) -> None:
    run(WORLD, from_torch, case)


@pytest.mark.parametrize("change", [placed_otherwise, on_another_mesh, as_a_whole], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_states_that_lie_elsewhere(case: Case, change: Callable[..., Any]) -> None:
    run(WORLD, from_elsewhere, case, change.__name__)


@pytest.mark.parametrize("case", [ADAM, BY_NAME["norm_adaptive_all"]], ids=str)
def test_what_needs_no_communication_makes_none(case: Case) -> None:
    assert run(WORLD, without_communication, case) == [0] * WORLD


def test_dtypes() -> None:
    run(WORLD, dtypes)


def test_scalars() -> None:
    run(WORLD, scalars_of_every_kind)


def test_what_no_step_reads_is_carried_along() -> None:
    run(WORLD, carried_along)


def test_what_is_wrong_changes_nothing_and_says_what_to_do() -> None:
    texts = run(WORLD, refused)
    assert all(text.keys() == texts[0].keys() for text in texts)
    for text in texts:
        for what in ("a DTensor for a plain parameter", "replicated for a plain parameter"):
            assert "parameter 4 of group 0" in text[what] and "full_tensor()" in text[what]
            assert "torch.distributed.checkpoint" in text[what]
        assert "ranks [0, 1], the parameter on [0, 1, 2, 3]" in text["on other ranks"]
        assert "shape of this rank's shard" in text["a shard"]
        assert (
            "has shape (5, 4)" in text["of another shape"]
            and "has shape (4, 4)" in text["a whole one of another shape"]
        )
        assert "unsupported dtype torch.int32" in text["integers"]

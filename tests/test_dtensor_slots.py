"""What is read of DTensors is private to torch: one that has it elsewhere, or under other names, is stepped as well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from ranks import run
from sharded_layouts import Training

from fusedoptim._dtensor import same_layout

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
SLOTS = ("_local_tensor", "_spec")


@contextmanager
def read_by_functions() -> Iterator[None]:
    """Of Python, which find the same, so that no object has them at a known place."""
    with replaced(lambda slot: property(slot.__get__, slot.__set__)):
        yield


@contextmanager
def under_other_names() -> Iterator[None]:
    """Nothing is found by the package, and all of it by torch."""

    def hidden(slot: Any) -> property:
        def get(t: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__", "").startswith("fusedoptim.") and frame.f_code.co_name in READERS:
                raise AttributeError(f"no {slot.__name__}")
            return slot.__get__(t)

        return property(get, slot.__set__)

    with replaced(hidden):
        yield


#: Of this package, which read slots by themselves or in C++, where torch's own reads have frames of torch.
READERS = {"local", "hides_shard", "same_layout", "build", "refresh", "_step", "_step_afresh", "step_afresh"}


@contextmanager
def replaced(change: Any) -> Iterator[None]:
    from torch.distributed.tensor import DTensor

    slots = {name: DTensor.__dict__[name] for name in SLOTS}
    for name, slot in slots.items():
        setattr(DTensor, name, change(slot))
    try:
        yield
    finally:
        for name, slot in slots.items():
            setattr(DTensor, name, slot)


TORCHS = {"as functions": read_by_functions, "renamed": under_other_names}
CASES = [
    *FULL,
    Case("clipped", "AdamW", {**BY_NAME["adamw_amsgrad"].options, "max_grad_norm": 0.1, "ema_decay": 0.9}),
]


def trained(torchs: str, layout: str, backend: str) -> None:
    cases = [replace(case, options={**case.options, "backend": backend}) for case in CASES if case.runs_on(backend)]
    expected = Training(layout, cases).go_on(range(3))
    with TORCHS[torchs]():
        found = Training(layout, cases).go_on(range(3))
    for name, of in expected.items():
        assert_same_bits(torch.stack(found[name]["losses"]), torch.stack(of["losses"]), name)
        for left, right in zip(found[name]["content"], of["content"], strict=True):
            assert left.keys() == right.keys()
            for key in left:
                assert_same_bits(left[key], right[key], f"{name}: {key}")


@pytest.mark.parametrize(
    ("torchs", "backend"), [("as functions", "cpu"), ("as functions", "reference"), ("renamed", "reference")]
)
@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), ("both", 4)])
def test_the_same_bits(layout: str, world: int, torchs: str, backend: str) -> None:
    run(world, trained, torchs, layout, backend)


def test_placements_that_differ_in_the_order_of_their_shards() -> None:
    """Of two mesh dimensions that shard one dimension of a tensor, either may come first, where torch says which."""

    def made(order: Any) -> SimpleNamespace:
        return SimpleNamespace(placements="same", device_mesh="same", _spec=SimpleNamespace(**order))

    assert same_layout(made({"shard_order": (0, 1)}), made({"shard_order": (0, 1)})) and same_layout(made({}), made({}))
    assert not same_layout(made({"shard_order": (0, 1)}), made({"shard_order": (1, 0)}))


def without_a_backend() -> None:
    """A warning where the backend is chosen, an error where it was asked for."""
    with under_other_names():
        with pytest.warns(UserWarning, match="stepped by the eager reference"):
            Training("fsdp2", [CASES[0]]).go_on(range(1))
        with pytest.raises(RuntimeError, match="keeps the shards of DTensors in another place"):
            Training("fsdp2", [replace(CASES[0], options={**CASES[0].options, "backend": "cpu"})]).go_on(range(1))


def test_kernels_that_cannot_follow_shards() -> None:
    run(2, without_a_backend)

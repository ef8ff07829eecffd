"""Optimizers over DTensors keep nothing that is stale and nothing of a gradient; version counters rise."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case
from ranks import run
from sharded_models import MODELS, Sharded, built, is_dtensor, shard
from test_dtensors import assert_placed, assert_same_shards, shards_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
Change = Callable[[torch.optim.Optimizer, Sharded], None]


# ---- changes by hand, to the first parameter ----


def replace_gradient(o: torch.optim.Optimizer, s: Sharded) -> None:
    s.params[0].grad = torch.full_like(s.params[0].detach(), 0.5)


def replace_gradients_shard(o: torch.optim.Optimizer, s: Sharded) -> None:
    s.params[0].grad._local_tensor = torch.full_like(shard(s.params[0]), 0.25)


def write_gradient_in_place(o: torch.optim.Optimizer, s: Sharded) -> None:
    s.params[0].grad.mul_(-2)


def no_gradient(o: torch.optim.Optimizer, s: Sharded) -> None:
    s.params[0].grad = None


def replace_state(o: torch.optim.Optimizer, s: Sharded) -> None:
    state = o.state[s.params[0]]
    for name in list(state):
        state[name] = torch.full_like(state[name], 0.5)


def replace_states_shard(o: torch.optim.Optimizer, s: Sharded) -> None:
    for t in o.state[s.params[0]].values():
        if is_dtensor(t):
            t._local_tensor = torch.full_like(shard(t), 0.25)


def write_state_in_place(o: torch.optim.Optimizer, s: Sharded) -> None:
    for t in o.state[s.params[0]].values():
        t.fill_(3)


def drop_state(o: torch.optim.Optimizer, s: Sharded) -> None:
    del o.state[s.params[0]]


def clear_all_state(o: torch.optim.Optimizer, s: Sharded) -> None:
    o.state.clear()


def reload(o: torch.optim.Optimizer, s: Sharded) -> None:
    o.load_state_dict(o.state_dict())


def change_values(o: torch.optim.Optimizer, s: Sharded) -> None:
    o.param_groups[0].update(lr=0.5, weight_decay=0.25)


def reset_parameters(o: torch.optim.Optimizer, s: Sharded) -> None:
    for p in s.params:
        p.detach().fill_(0.125)


def replace_shards(o: torch.optim.Optimizer, s: Sharded) -> None:
    for p in s.params:
        p._local_tensor = shard(p) * 2


def empty_and_reset(o: torch.optim.Optimizer, s: Sharded) -> None:
    """As models that were made on the meta device come to memory. Gradients are emptied, too."""
    s.model.to_empty(device="cpu")
    reset_parameters(o, s)
    set_gradients(s, 3)


def to_double(o: torch.optim.Optimizer, s: Sharded) -> None:
    s.model.to(torch.float64)
    for p in s.params:
        p.grad = torch.ones_like(p.detach())


CHANGES: list[Change] = [
    replace_gradient, replace_gradients_shard, write_gradient_in_place, no_gradient, replace_state,
    replace_states_shard, write_state_in_place, drop_state, clear_all_state, reload, change_values, reset_parameters,
    replace_shards, empty_and_reset, to_double,
]  # fmt: skip


def set_gradients(s: Sharded, step: int) -> None:
    for i, p in enumerate(s.params):
        p.grad = torch.full_like(p.detach(), 1.0)
        shard(p.grad).copy_(torch.randn(shard(p).shape, generator=torch.Generator().manual_seed(100 * step + i)))


@torch.no_grad()
def check_changes(model: str, case: Case, changes: list[Change]) -> None:
    for change in changes:
        found = []
        for backend in ("cpu", "reference"):
            sharded = MODELS[model][1]()
            optimizer = case.make(sharded.params, backend=backend)
            for step in range(6):
                set_gradients(sharded, step)
                if step == 3:
                    change(optimizer, sharded)
                optimizer.step()
            if change is not to_double:
                assert_placed(sharded, optimizer)
            found.append(shards_of(sharded, optimizer))
        assert_same_shards(*found, change.__name__)


@pytest.mark.parametrize("case", [case for case in FULL if case.runs_on("cpu")], ids=str)
def test_a_change_takes_effect_at_the_next_step(case: Case) -> None:
    """The reference looks at everything anew, so it is what a step without a cache does."""
    run(2, check_changes, "fsdp2", case, CHANGES)


@pytest.mark.parametrize("case", [BY_NAME["adamw_amsgrad"], BY_NAME["norm_adaptive_all"]], ids=str)
def test_a_change_takes_effect_over_two_dimensions_of_a_mesh(case: Case) -> None:
    in_place = [c for c in CHANGES if c not in (empty_and_reset, to_double)]
    run(4, check_changes, "tensor_parallel_and_fsdp2", case, in_place)


# ---- gradients whose memory is not what they are ----


def negated(g: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(g.neg())


def on_its_way(g: torch.Tensor) -> torch.Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(g)


def check_gradients(make: Callable[[torch.Tensor], torch.Tensor], backend: str) -> None:
    found = []
    for change in (None, make):
        sharded = built("fsdp2")
        optimizer = BY_NAME["adamw_amsgrad"].make(sharded.params, backend=backend, max_grad_norm=0.1)
        for step in range(3):
            set_gradients(sharded, step)
            for p in sharded.params if change else ():
                p.grad._local_tensor = change(shard(p.grad))
                assert p.grad._local_tensor.is_neg() or type(p.grad._local_tensor) is not torch.Tensor
            optimizer.step()
        found.append(shards_of(sharded, optimizer))
    assert_same_shards(*found, make.__name__)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("make", [negated, on_its_way], ids=lambda f: f.__name__)
def test_gradients_are_read_as_what_they_stand_for(make: Callable[..., Any], backend: str) -> None:
    run(2, check_gradients, make, backend)


# ---- version counters ----


def versions(optimizer: torch.optim.Optimizer, sharded: Sharded) -> dict[str, int]:
    found = {}
    for i, p in enumerate(sharded.params):
        tensors = {"parameter": p, **optimizer.state[p]}
        for name, t in tensors.items():
            if is_dtensor(t):
                found[f"{name} {i}"] = t._version
                found[f"shard of {name} {i}"] = t._local_tensor._version
            elif t is not None:
                found[f"{name} {i}"] = t._version
    return found


def risen(optimizer: torch.optim.Optimizer, sharded: Sharded) -> set[str]:
    before = versions(optimizer, sharded)
    set_gradients(sharded, 5)
    optimizer.step()
    after = versions(optimizer, sharded)
    return {name for name in before if after[name] > before[name]}


def check_versions(model: str, case: Case) -> None:
    found = []
    for make in (case.make, case.make_torch):
        sharded = built(model)
        optimizer = make(sharded.params, foreach=False)
        set_gradients(sharded, 0)
        optimizer.step()
        found.append(risen(optimizer, sharded))
    assert found[1] and found[0] >= found[1], found[1] - found[0]


# torch's Rprop assigns to a part of its gradient, which DTensors refuse.
@pytest.mark.parametrize("case", [case for case in FULL if case.in_torch], ids=str)
def test_version_counters_rise_wherever_torchs_do(case: Case) -> None:
    run(2, check_versions, "fsdp2", case)
    run(4, check_versions, "tensor_parallel_and_fsdp2", case)


def check_backward_after_a_step() -> None:
    for case in (BY_NAME["adamw"], BY_NAME["norm_adaptive"]):
        sharded = built("tensor_parallel")
        optimizer = case.make(sharded.params)
        sharded.backward(0)
        loss = sharded.loss(1)
        optimizer.step()
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError("backward() used weights that its forward pass did not")


def test_a_backward_pass_after_a_step_is_refused() -> None:
    run(2, check_backward_after_a_step)


# ---- memory ----


def alive() -> dict[str, int]:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    gc.collect()
    kinds = {"DTensors": DTensor, "specs": DTensorSpec, "tensors": torch.Tensor}
    objects = gc.get_objects()
    return {name: sum(type(o) is kind for o in objects) for name, kind in kinds.items()}


def check_memory(case: Case, backend: str, options: dict[str, Any], steps: int) -> None:
    from torch.distributed.tensor import DTensor

    sharded = built("plain_beside")
    optimizer = case.make(sharded.params, backend=backend, **options)
    last: list[weakref.ref] = []

    def steps_of(n: int) -> None:
        for _ in range(n):
            for p in sharded.params:
                g = torch.ones_like(shard(p))
                last.append(weakref.ref(g))
                if is_dtensor(p):
                    how = {"run_check": False, "shape": p.shape, "stride": p.stride()}
                    g = DTensor.from_local(g, p.device_mesh, p.placements, **how)
                    last.append(weakref.ref(g))
                p.grad = g
            optimizer.step()
            del last[: -2 * len(sharded.params)]

    steps_of(5)
    before = alive()
    steps_of(steps)
    grown = {kind: n - before[kind] for kind, n in alive().items()}
    assert max(grown.values()) < 10, grown  # gloo's threads may hold what the last gather was of
    assert any(ref() is not None for ref in last)
    for p in sharded.params:
        p.grad = None
    gc.collect()
    assert all(ref() is None for ref in last)  # nor the last step's


CLIPPED = {"max_grad_norm": 1.0, "skip_nonfinite": True}


@pytest.mark.parametrize(
    ("case", "backend", "options", "steps"),
    [
        (BY_NAME["adamw"], "cpu", CLIPPED, 1000),
        (BY_NAME["adamw"], "cpu", {}, 100),
        (BY_NAME["norm_adaptive"], "cpu", {}, 100),
        (BY_NAME["adamw"], "reference", CLIPPED, 50),
    ],
    ids=["clipped", "plain", "norm_adaptive", "reference"],
)
def test_memory_is_flat(case: Case, backend: str, options: dict[str, Any], steps: int) -> None:
    run(2, check_memory, case, backend, options, steps)

"""Optimizers over DTensors: the bits of torch.optim over the same DTensors, in shards of parameters and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, FULL, Case, assert_same_bits
from ranks import run
from sharded_models import MODELS, Sharded, built, is_dtensor, mesh, shard, whole
from torch import Tensor

from benchmarks.witness import witness_step
from fusedoptim import _members, _native

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 4
IN_TORCH = [case for case in FULL if case.in_torch]
#: Uneven and twofold shards, gradients that are placed otherwise, plain parameters.
OF_EVERY_KIND = ["fsdp2_uneven", "tensor_parallel_and_fsdp2", "sequence_parallel", "plain_beside"]
Gradients = list[list[Tensor]]


def train(sharded: Sharded, optimizer: torch.optim.Optimizer) -> tuple[Gradients, list[Tensor]]:
    """The gradients and the losses of all steps."""
    gradients, losses = [], []
    for step in range(STEPS):
        losses.append(sharded.backward(step))
        gradients.append([p.grad.clone() for p in sharded.params])
        optimizer.step()
    return gradients, losses


def replay(sharded: Sharded, optimizer: torch.optim.Optimizer, gradients: Gradients, as_placed: bool = True) -> None:
    """Steps from the start with gradients from before; unless ``as_placed``, with the parameters' placements."""
    sharded.restore()
    for of_step in gradients:
        for p, g in zip(sharded.params, of_step, strict=True):
            again = not as_placed and is_dtensor(g) and g.placements != p.placements
            p.grad = g.redistribute(p.device_mesh, p.placements) if again else g.clone()
        witness_step(optimizer)


def shards_of(sharded: Sharded, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """What this process has of every parameter and of its states."""
    found = []
    for p in sharded.params:
        tensors = {"parameter": p, **{k: v for k, v in optimizer.state[p].items() if v is not None}}
        found.append({name: shard(torch.as_tensor(t)).clone() for name, t in tensors.items()})
    return found


def assert_same_shards(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], what: str) -> None:
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.keys() == right.keys(), (what, i, left.keys(), right.keys())
        for name in left:
            assert_same_bits(left[name], right[name], f"{what}: {name} of parameter {i}")


def assert_placed(sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
    """Every state of a parameter's shape is where the parameter is."""
    for i, p in enumerate(sharded.params):
        for name, state in optimizer.state[p].items():
            if state is None or state.dim() == 0 < p.dim():
                assert not is_dtensor(state), (i, name)
                continue
            assert is_dtensor(state) == is_dtensor(p) and state.shape == p.shape, (i, name)
            assert state.stride() == p.stride() and shard(state).shape == shard(p).shape, (i, name)
            if is_dtensor(p):
                assert (state.device_mesh, state.placements) == (p.device_mesh, p.placements), (i, name)
                assert getattr(state._spec, "shard_order", 0) == getattr(p._spec, "shard_order", 0), (i, name)


def check_against_torch(model: str, case: Case) -> None:
    sharded = built(model)
    witness = case.make_torch(sharded.params, foreach=False)
    mine = case.make(sharded.params, backend="cpu" if case.runs_on("cpu") else "reference")
    gradients, losses = train(sharded, mine)
    found = shards_of(sharded, mine)
    assert_placed(sharded, mine)
    replay(sharded, witness, gradients, as_placed=False)
    expected = shards_of(sharded, witness)
    assert_same_shards(found, expected, "cpu")
    if model in OF_EVERY_KIND:
        reference = case.make(sharded.params, backend="reference")
        replay(sharded, reference, gradients)
        assert_same_shards(shards_of(sharded, reference), expected, "reference")
        assert_placed(sharded, reference)
    assert len({loss.item() for loss in losses}) == STEPS  # a step is seen by the next forward


def check_losses(model: str) -> None:
    """Trained by torch.optim, every forward pass reads the same weights."""
    found = []
    for make in (BY_NAME["sgd_momentum"].make, BY_NAME["sgd_momentum"].make_torch):
        sharded = built(model)
        found.append(train(sharded, make(sharded.params))[1])
    assert_same_bits(torch.stack(found[0]), torch.stack(found[1]), "losses")


def check_whole_norms(model: str, case: Case) -> None:
    """Against one process that has the whole tensors and the same gradients."""
    for backend in filter(case.runs_on, ("cpu", "reference")):
        sharded = built(model)
        copies = [torch.nn.Parameter(whole(p).clone()) for p in sharded.params]
        mine, alone = case.make(sharded.params, backend=backend), case.make(copies, backend="reference")
        for of_step in train(sharded, mine)[0]:
            for copy, g in zip(copies, of_step, strict=True):
                copy.grad = whole(g).clone()
            alone.step()
        assert_placed(sharded, mine)
        for i, (p, copy) in enumerate(zip(sharded.params, copies, strict=True)):
            assert_same_bits(whole(p), copy.detach(), f"{backend}: parameter {i}")
            assert mine.state[p].keys() == alone.state[copy].keys()
            for name, state in mine.state[p].items():
                assert_same_bits(whole(state), alone.state[copy][name], f"{backend}: {name} of parameter {i}")


@pytest.mark.parametrize("case", IN_TORCH, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_bits_of_torchs_for_loop(model: str, case: Case) -> None:
    run(MODELS[model][0], check_against_torch, model, case)


@pytest.mark.parametrize("model", MODELS)
def test_losses_of_torch(model: str) -> None:
    run(MODELS[model][0], check_losses, model)


@pytest.mark.parametrize(
    ("model", "case"),
    [(model, case) for case in FULL if case.cls.rule.sums for model in (OF_EVERY_KIND if case.own else MODELS)],
    ids=str,
)
def test_bits_of_norms_of_whole_tensors(model: str, case: Case) -> None:
    run(MODELS[model][0], check_whole_norms, model, case)


# ---- options, against an optimizer over the shards as plain tensors, whose every element is stepped alike ----


def check_options(model: str, case: Case, options: dict[str, Any]) -> None:
    for backend in ("cpu", "reference"):
        sharded = built(model)
        copies = [torch.nn.Parameter(shard(p).clone()) for p in sharded.params]
        mine = case.make(sharded.params, backend=backend, **options)
        plain = case.make(copies, backend="reference", **options)
        for of_step in train(sharded, mine)[0]:
            for p, copy, g in zip(sharded.params, copies, of_step, strict=True):
                aligned = g.redistribute(p.device_mesh, p.placements) if is_dtensor(g) else g
                copy.grad = shard(aligned).clone()
            plain.step()
        expected = [{"parameter": p.detach(), **plain.state[p]} for p in copies]
        expected = [{name: t for name, t in tensors.items() if t is not None} for tensors in expected]
        assert_same_shards(shards_of(sharded, mine), expected, backend)
        assert_placed(sharded, mine)
        for i, p in enumerate(sharded.params):
            assert (shard(p.grad).count_nonzero() == 0) or not options.get("zero_grad_in_step"), (backend, i)


OPTIONS = {
    "averaged": {"ema_decay": 0.9},
    "all": {
        "zero_grad_in_step": True, "ema_decay": 0.9, "clip_grad_value": 0.01, "state_dtype": torch.bfloat16,
        "rounding": "nearest",  # random bits follow from places in the whole tensor
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [BY_NAME["adam_amsgrad_decay_max"], BY_NAME["adagrad_all"]], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", OF_EVERY_KIND)
def test_options_of_steps(model: str, options: str, case: Case) -> None:
    run(MODELS[model][0], check_options, model, case, OPTIONS[options])


def check_bf16_parameters() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for case in IN_TORCH:
        full = [torch.randn(s, generator=torch.Generator().manual_seed(0)).bfloat16() for s in ((17, 3), (5,))]
        params = [torch.nn.Parameter(distribute_tensor(t, mesh(2), [Shard(0)])) for t in full]
        copies = [torch.nn.Parameter(t.clone()) for t in full]
        mine, alone = case.make(params), case.make(copies)
        for step in range(STEPS):
            for p, copy in zip(params, copies, strict=True):
                g = torch.randn(copy.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
                p.grad, copy.grad = distribute_tensor(g, mesh(2), [Shard(0)]), g
            mine.step()
            alone.step()
        for p, copy in zip(params, copies, strict=True):
            assert_same_bits(whole(p), copy.detach(), str(case))


def test_parameters_of_16_bits() -> None:
    run(2, check_bf16_parameters)


def looked_at_closely(model: str) -> list[int]:
    """How many parameters Python looks at in a first step, and in one in which the last parameter is met first."""
    sharded, count = built(model), 0
    optimizer = BY_NAME["adamw_amsgrad"].make(sharded.params, backend="cpu")
    check = _members._check

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return check(*args)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_members, "_check", counted)
        for step in range(2):
            sharded.backward(step)
            if step == 0:
                sharded.params[-1].grad = None
            count = 0
            optimizer.step()
            found.append(count)
    return found


@pytest.mark.skipif(_native._C is None, reason=f"no compiled library: {_native.problem}")
@pytest.mark.parametrize(
    ("model", "closely"), [("fsdp2", False), ("tensor_parallel", False), ("sequence_parallel", True)]
)
def test_python_looks_at_unusual_shards_alone(model: str, closely: bool) -> None:
    """It takes a hundred times as long. Unusual are gradients that are placed otherwise than their parameters."""
    for counts in run(MODELS[model][0], looked_at_closely, model):
        assert any(counts) == closely, counts

"""Low precision in torch's own libraries as they are used: ZeroRedundancyOptimizer, FSDP1, FSDP2, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_raw
from low_layouts import BF16, CASES, Net, Part, alone, assert_a_part, differ, distributed, gradient, params_of, value
from ranks import run
from sharded_models import batch, is_dtensor, layers, mesh, shard
from torch import Tensor, nn

import fusedoptim
from fusedoptim import reference, step_in_backward
from fusedoptim._random_places import ids_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 3


# ---- libraries that have parts of their own ----


def zero(grouping: str) -> list[Tensor]:
    """Parameters, which all ranks have, of an optimizer that steps a part of them in each."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    part, case = Part("single", BF16), CASES["8 bits"]
    names = [name for name, _ in part.model.named_parameters()]
    params: Any = {
        "numbered": part.params,
        "named": [{"params": part.params, "param_names": names}],
        "alone": [{"params": [p], "param_names": [name]} for name, p in zip(names, part.params, strict=True)],
    }[grouping]
    optimizer = ZeroRedundancyOptimizer(
        params, getattr(fusedoptim, case.optimizer), lr=0.01, rounding_seed=5, **case.options
    )
    part.advance(optimizer, range(STEPS))
    own = [p for group in optimizer.optim.param_groups for p in group["params"]]
    assert 0 < len(own) < len(part.params)
    if grouping != "alone":  # its names are of more than it has: each rank numbers its own
        assert ids_of(optimizer.optim) == {p: i for i, p in enumerate(own)}
    else:
        for i, (p, found) in enumerate(zip(part.params, alone("8 bits", STEPS, True), strict=True)):
            assert_same_raw(p.detach(), found["parameter"], f"parameter {i}")
    return [p.detach() for p in part.params]


@pytest.mark.parametrize("grouping", ["numbered", "named", "alone"])
def test_zero_redundancy_optimizer(grouping: str) -> None:
    """Replicas stay equal, and runs. With a group for each name they have the bits of one process."""
    one, other = run(2, zero, grouping)
    again, _ = run(2, zero, grouping)
    assert not any(differ(one, other)) and not any(differ(one, again))


def flat_training(case: str, backend: str, seed: int = 0) -> tuple[Any, Any, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Net(BF16), device_id=torch.device("cpu"))
    (flat,) = model.parameters()
    flat.data.copy_(value(dist.get_rank(), flat, seed))
    return model, flat, CASES[case].make([flat], backend=backend)


def advance_flat(flat: Tensor, optimizer: Any, steps: range) -> dict[str, Tensor]:
    for step in steps:
        flat.grad = gradient(dist.get_rank(), flat, step)
        optimizer.step()
    return {"parameter": flat.detach().clone(), **{k: t.clone() for k, t in optimizer.state[flat].items()}}


def check_fsdp1(case: str) -> None:
    """Each process has a part of one dimension, and steps it as if it were all, in blocks of its own. Its checkpoints
    are FSDP's, which takes no scales; those of a process alone resume all."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, flat, optimizer = flat_training(case, "cpu")
    half = advance_flat(flat, optimizer, range(1))
    assert ("exp_avg_scale" in half) == (case == "8 bits")
    if case == "8 bits":
        assert half["exp_avg_scale"].shape == (1, -(-flat.numel() // 128)) and half["exp_avg_q8"].shape == flat.shape
        saved = copy.deepcopy(optimizer.state_dict())
    else:
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    found = advance_flat(flat, optimizer, range(1, STEPS))

    _, flat, witness = flat_training(case, "reference")
    assert_same([found], [advance_flat(flat, witness, range(STEPS))], case)

    model, flat, resumed = flat_training(case, "cpu", seed=1)
    if case != "8 bits":
        saved = FullyShardedDataParallel.optim_state_dict_to_load(model, resumed, saved)
    flat.data.copy_(half["parameter"])
    resumed.load_state_dict(saved)
    assert_same([found], [advance_flat(flat, resumed, range(1, STEPS))], f"{case}, resumed")


@pytest.mark.parametrize("case", ["all stochastic", "remainder", "8 bits"])
def test_fsdp1(case: str) -> None:
    run(2, check_fsdp1, case)


# ---- FSDP2 as it is used ----


class Tanhs(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.of = layers(6, 64, 64, 1).to(dtype)

    def loss(self, step: int) -> Tensor:
        x = batch(step, 0)
        y = self.of(x.to(next(self.parameters()).dtype)).float()
        return (y - x.sum(1, keepdim=True).sin()).square().mean()


def trained(model: Tanhs, optimizer: Any, released: bool = False) -> list[dict[str, Tensor]]:
    release = step_in_backward(optimizer) if released else None
    for step in range(STEPS):
        model.loss(step).backward()
        if release is None:
            optimizer.step()
            optimizer.zero_grad()
    return [
        {k: shard(t).clone() for k, t in {"parameter": p, **optimizer.state[p]}.items() if t is not None}
        for p in model.parameters()
    ]


def sharded(dtype: torch.dtype, **options: Any) -> Tanhs:
    from torch.distributed.fsdp import fully_shard

    model = Tanhs(dtype)
    for module in model.of:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh(2), **options)
    fully_shard(model.of, mesh=mesh(2), **options)
    return model


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], what: str) -> None:
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.keys() == right.keys(), (what, i)
        for name in left:
            assert_same_raw(left[name], right[name], f"{what}: {name} of parameter {i}")


def check_training() -> None:
    """The model's own gradients: the two processes have the same data, so that means are exact."""
    for name in ("8 bits", "8 bits stochastic", "remainder"):
        for released in (False, True):
            model, one = sharded(BF16), Tanhs(BF16)
            found = trained(model, CASES[name].make(model.named_parameters()), released)
            expected = trained(one, CASES[name].make(one.named_parameters()))
            for i, p in enumerate(model.parameters()):
                assert is_dtensor(p)
                for key, own in found[i].items():
                    whole = expected[i][key]
                    part = [*whole.chunk(2), whole[:0]][dist.get_rank()] if whole.dim() else whole
                    assert_same_raw(own, part, f"{name}, {released}: {key} of parameter {i}")
        assert any("exp_avg_q8" in of for of in found) == (name != "remainder")


def check_mixed_precision() -> None:
    """fp32 shards need no master, and lose nothing."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    found = []
    for options in ({}, {"master": "remainder"}):
        model = sharded(torch.float32, mp_policy=policy)
        found.append(trained(model, fusedoptim.AdamW(model.named_parameters(), lr=0.01, **options)))
    assert_same(*found, "master")
    assert all({t.dtype for t in of.values()} == {torch.float32} for of in found[0])


def check_masters() -> None:
    """A remainder holds the number that an fp32 master has, which is that of fp32 parameters with the same gradients;
    the 16-bit parameters are the nearest."""
    numbers = []
    for master in ("remainder", torch.float32, None):
        part = Part("fsdp2", torch.float32 if master is None else BF16)
        optimizer = fusedoptim.AdamW(part.params, lr=0.01, master=master, state_dtype=torch.float32)
        for i, p in enumerate(part.params):
            shard(p).copy_(part.part(i, value(i, p.to(BF16))))
        for step in range(STEPS):
            part.set_gradients(step)
            for i, p in enumerate(part.params):
                shard(p.grad).copy_(part.part(i, gradient(i, torch.empty(p.shape, dtype=BF16), step)))
            optimizer.step()
        storage = {"remainder": ("bf16_remainder", "param_remainder"), torch.float32: ("bf16_master", "param_master")}
        for p in part.params:
            of = optimizer.state[p]
            number = shard(p).clone()
            if master is not None:
                how, extra = storage[master]
                number = reference.decode(how, shard(p), shard(of[extra]))
                nearest = number.to(BF16)
                assert ((shard(p).float() - number).abs() <= (nearest.float() - number).abs()).all()
            numbers.append(number)
    n = len(part.params)
    for i in range(n):
        assert_same_raw(numbers[i], numbers[n + i], f"parameter {i}: remainder and master")
        assert_same_raw(numbers[i], numbers[2 * n + i], f"parameter {i}: remainder and fp32")


def check_offloaded() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = CPUOffloadPolicy(pin_memory=False)
    found = []
    for options in ({}, {"offload_policy": policy}):
        model = sharded(BF16, **options)
        found.append(trained(model, CASES["8 bits"].make(model.named_parameters())))
    assert_same(*found, "offloaded")


def check_compiled() -> None:
    part = Part("fsdp2", BF16)
    optimizer = CASES["8 bits"].make(params_of(part.model, True))
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    try:
        for i in range(STEPS):
            part.set_gradients(i)
            step()
    finally:
        torch.compiler.reset()
    assert_a_part(part, optimizer, alone("8 bits", STEPS, True), "compiled")


def check_containers() -> None:
    """Any 16 bits, as bfloat16, and any 8 come through what moves states: whole, to other shards, and by themselves."""
    from torch.distributed.tensor import Replicate, Shard

    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(BF16)
    for t in (halves, torch.arange(-128, 128, dtype=torch.int8), torch.arange(256).to(torch.uint8)):
        rows = t.view(-1, 4)[:-1]  # uneven
        sharded = distributed(rows, Shard(0))
        for other in (Shard(1), Replicate()):
            moved = sharded.redistribute(placements=[other])
            assert_same_raw(moved.full_tensor(), rows, str(t.dtype))
        found = torch.where(torch.tensor(dist.get_rank() == 0), t, torch.zeros_like(t))
        dist.broadcast(found, 0)
        assert_same_raw(found, t, str(t.dtype))
        dist.scatter(found, [torch.zeros_like(t), t] if dist.get_rank() == 0 else None, 0)
        assert_same_raw(found, t if dist.get_rank() == 1 else torch.zeros_like(t), str(t.dtype))


@pytest.mark.parametrize(
    "check",
    [check_training, check_mixed_precision, check_masters, check_offloaded, check_compiled, check_containers],
)
def test_fsdp2(check: Any) -> None:
    run(2, check)

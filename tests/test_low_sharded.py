"""Stochastic rounding, masters and 8 bits over shards and replicas: the bits of one process that has everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits
from low_layouts import BF16, CASES, Low, Net, Part, alone, assert_a_part, gradient, params_of, value
from ranks import run
from sharded_models import batch, is_dtensor, layers, mesh, shard
from torch import Tensor, nn

import fusedoptim
from fusedoptim import reference, step_in_backward
from fusedoptim._random_places import ids_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 3
LAYOUTS = {
    2: ["fsdp2", "in_columns", "tensor_parallel", "ddp"],
    4: ["fsdp2", "in_columns", "tensor_parallel", "both", "hsdp"],
}


# ---- all cases in every layout ----


def check_layout(layout: str) -> None:
    for name, case in CASES.items():
        for backend in ("cpu", "reference") if name == "8 bits" else ("cpu",):
            part = Part(layout, case.dtype)
            named = name != "sgd"
            optimizer = case.make(params_of(part.model, named), backend=backend)
            part.advance(optimizer, range(STEPS))
            assert_a_part(part, optimizer, alone(name, STEPS, named), f"{name}, {layout}, {backend}")


@pytest.mark.parametrize(("world", "layout"), [(world, layout) for world in LAYOUTS for layout in LAYOUTS[world]])
def test_bits_of_one_process(world: int, layout: str) -> None:
    run(world, check_layout, layout)


# ---- what decides on the random bits ----


def final(names: list[str] | None, dtype: torch.dtype = BF16, threads: int = 1, **options: Any) -> list[Tensor]:
    """Parameters after steps in this process."""
    part = Part("single", dtype)
    params = part.params if names is None else list(zip(names, part.params, strict=True))
    optimizer = CASES["all stochastic"].make(params, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        part.advance(optimizer, range(STEPS))
    finally:
        torch.set_num_threads(before)
    return [p.detach().clone() for p in part.params]


def differ(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_names_say_which_parameter_it_is() -> None:
    names = [name for name, _ in Net(BF16).named_parameters()]
    expected = final(names)
    for wrapped in (
        [f"module.{name}" for name in names],
        [f"_orig_mod.module.{name}" for name in names],
        [name.replace(".", "._orig_mod.") for name in names],
        [f"_fsdp_wrapped_module.{name.replace('.', '._checkpoint_wrapped_module.')}" for name in names],
    ):
        assert not any(differ(final(wrapped), expected)), wrapped[0]
    assert all(differ(final([f"my{name}" for name in names]), expected)[::2])  # the large ones
    assert all(differ(final([name + ".module" for name in names]), expected)[::2])
    assert all(differ(final(None), expected)[::2])


def test_seeds_and_threads() -> None:
    expected = final(None)
    for threads in (1, 2, 3, 7):
        assert not any(differ(final(None, threads=threads), expected)), threads
    assert not any(differ(final(None, backend="reference"), expected))
    assert all(differ(final(None, rounding_seed=6), expected)[::2])


def test_an_interrupted_run_has_the_bits_of_one_that_was_not() -> None:
    for name, case in CASES.items():
        part = Part("single", case.dtype)
        first = case.make(params_of(part.model, True))
        part.advance(first, range(1))
        second = case.make(params_of(part.model, True), rounding_seed=0)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        part.advance(second, range(1, STEPS))
        assert_a_part(part, second, alone(name, STEPS, True), name)


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
            assert_same_bits(p.detach(), found["parameter"], f"parameter {i}")
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
            assert_same_bits(left[name], right[name], f"{what}: {name} of parameter {i}")


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
                    assert_same_bits(own, part, f"{name}, {released}: {key} of parameter {i}")
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
        storage = {"remainder": ("bf16_remainder", "param_remainder"), torch.float32: ("bf16_master", "master")}
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
        assert_same_bits(numbers[i], numbers[n + i], f"parameter {i}: remainder and master")
        assert_same_bits(numbers[i], numbers[2 * n + i], f"parameter {i}: remainder and fp32")


def check_offloaded() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = CPUOffloadPolicy(pin_memory=False)
    found = []
    for options in ({}, {"offload_policy": policy}):
        model = sharded(BF16, **options)
        found.append(trained(model, CASES["8 bits"].make(model.named_parameters())))
    assert_same(*found, "offloaded")


@pytest.mark.parametrize("check", [check_training, check_mixed_precision, check_masters, check_offloaded])
def test_fsdp2(check: Any) -> None:
    run(2, check)


# ---- shards that cannot be stored so ----


def distributed(t: Tensor, *placements: Any, on: Any = None) -> nn.Parameter:
    from torch.distributed.tensor import distribute_tensor

    on = on or mesh(dist.get_world_size())
    return nn.Parameter(distribute_tensor(t.to(BF16), on, placements, src_data_rank=None))


def cut_columns() -> nn.Parameter:
    from torch.distributed.tensor import Shard

    return distributed(torch.ones(16, 384), Shard(1))


def cut_depth() -> nn.Parameter:
    from torch.distributed.tensor import Shard

    return distributed(torch.ones(4, 4, 512), Shard(2))


def in_pieces() -> nn.Parameter:
    from torch.distributed.tensor.placement_types import _StridedShard

    return distributed(torch.ones(17, 256), _StridedShard(0, split_factor=2))


def of_own_sizes() -> nn.Parameter:
    """Those of the first and the last rank are as torch would have them."""
    from torch.distributed.tensor import DTensor, Shard

    rows = [5, 4, 6, 2][dist.get_rank()]
    own = torch.ones(rows, 256, dtype=BF16)
    made = DTensor.from_local(own, mesh(4), [Shard(0)], shape=torch.Size((17, 256)), stride=(256, 1))
    return nn.Parameter(made)


REFUSED: dict[str, tuple[Any, Low]] = {
    "not whole blocks": (cut_columns, CASES["8 bits"]),
    "that are not whole blocks": (cut_depth, CASES["8 bits"]),
    "several pieces": (in_pieces, CASES["all stochastic"]),
    "torch would make one of": (of_own_sizes, CASES["8 bits"]),
}
REMEDIES = [{"state_dtype": BF16}, {"state_dtype": {"exp_avg": BF16, "exp_avg_sq": BF16}}, {"rounding": "nearest"}]


def refusals() -> list[list[str]]:
    """What every rank says of each, and that nothing was written; then they go on by the remedy."""
    from torch.distributed.tensor import Replicate

    found = []
    for (make, case), remedy in zip(REFUSED.values(), [*REMEDIES, REMEDIES[-1]], strict=True):
        params = [distributed(torch.ones(64, 128), Replicate()), make()]
        optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}])
        for p in params:
            p.grad = torch.ones_like(p)
        said = []
        for _ in range(2):  # still
            try:
                optimizer.step()
            except (ValueError, RuntimeError) as error:
                said.append(f"{type(error).__name__}: {error}")
        assert len(said) == 2
        assert all((shard(p) == 1).all() for p in params) and not any(optimizer.state.values())
        optimizer.param_groups[1].update(remedy)
        optimizer.step()
        assert all((shard(p) != 1).all() for p in params)
        assert "exp_avg_q8" in optimizer.state[params[0]] or case is CASES["all stochastic"]
        found.append(said)
    return found


def test_shards_that_cannot_be_stored_so_are_refused_by_all() -> None:
    of_ranks = run(4, refusals)
    for i, text in enumerate(REFUSED):
        said = [line for found in of_ranks for line in found[i]]
        if text == "torch would make one of":  # the others learn of it
            learned = [*said[:2], *said[6:]]
            assert all(line.startswith("RefusedElsewhere: another rank refused") for line in learned)
            said = said[2:6]
        else:
            assert len(set(said)) == 1
        for line in said:
            assert line.startswith("ValueError: parameter 0 of group 1") and text in line, line
            assert "state_dtype=torch.bfloat16" in line or "rounding='nearest'" in line

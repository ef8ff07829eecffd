"""Stochastic rounding, masters and 8 bits over shards and replicas: the bits of one process that has everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_layouts import BF16, CASES, Low, Net, Part, alone, assert_a_part, differ, distributed, params_of
from ranks import run
from sharded_models import mesh, shard
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 3
LAYOUTS = {
    2: ["fsdp2", "in_columns", "tensor_parallel", "ddp"],
    4: ["fsdp2", "in_columns", "tensor_parallel", "both", "both_in_columns", "hsdp"],
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


# ---- shards that cannot be stored so ----


def of_ones(shape: tuple[int, ...], *placements: Any) -> nn.Parameter:
    return nn.Parameter(distributed(torch.ones(shape, dtype=BF16), *placements))


def cut_columns() -> nn.Parameter:
    from torch.distributed.tensor import Shard

    return of_ones((16, 384), Shard(1))


def cut_depth() -> nn.Parameter:
    from torch.distributed.tensor import Shard

    return of_ones((4, 4, 512), Shard(2))


def in_pieces() -> nn.Parameter:
    from torch.distributed.tensor.placement_types import _StridedShard

    return of_ones((17, 256), _StridedShard(0, split_factor=2))


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
        params = [of_ones((64, 128), Replicate()), make()]
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

"""Steps within the backward pass of sharded models: the bits of ordinary steps, on the shards of every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import FULL, Case, assert_same_bits
from sharded_models import mesh
from torch import Tensor, nn

import fusedoptim
from fusedoptim import step_in_backward
from fusedoptim._dtensor import local

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS, ROWS, WIDTH = 3, 4, 10


class Block(nn.Module):
    """The norm is for sequences in parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    """The last bias, which thaws later, has one element, so that all processes but one have none."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.blocks, self.last = (
                nn.Linear(5, WIDTH),
                nn.Sequential(Block(), Block()),
                nn.Linear(WIDTH, 1),
            )
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def in_parallel(model: Stack, on: Any) -> None:
    """Norms have gradients that are Partial, and parameters that are Replicate."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    for block in model.blocks:
        plan = {
            "norm": tp.SequenceParallel(),
            "up": tp.ColwiseParallel(input_layouts=Shard(1)),
            "down": tp.RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        tp.parallelize_module(block, on, plan)
    whole, parts = (Replicate(),), (Shard(1),)
    into = tp.PrepareModuleInput(input_layouts=whole, desired_input_layouts=parts)
    tp.parallelize_module(model.blocks[0], on, into)
    tp.parallelize_module(model.blocks, on, tp.PrepareModuleOutput(output_layouts=parts, desired_output_layouts=whole))


def fully_shard(model: Stack, **options: Any) -> None:
    from torch.distributed import fsdp

    for module in (*model.blocks, model):
        fsdp.fully_shard(module, **options)


def build(way: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

    model = Stack()
    if way in ("hsdp", "tensor parallel and fsdp2"):
        square = mesh(2, 2, names=("a", "b"))
    if way == "fsdp2":
        fully_shard(model)
    elif way == "fsdp2, not resharded":
        fully_shard(model, reshard_after_forward=False)
    elif way == "fsdp2, bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
    elif way == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif way == "hsdp":
        fully_shard(model, mesh=square)
    elif way == "tensor parallel":
        in_parallel(model, mesh(2))
    else:
        in_parallel(model, square["b"])
        fully_shard(model, mesh=square["a"])
    return model


def loss_of(model: nn.Module, step: int, data_rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + data_rank)
    y = model(torch.randn(2, ROWS, 5, generator=generator))
    return y.float().square().mean()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The shards of this process."""
    states = [v for p in model.parameters() for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [local(t.detach()).clone() for t in [*model.parameters(), *states]]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:3]}, {"params": named[3:], "lr": 0.02}]


def train(way: str, case: Case, release: bool, passes: int) -> list[list[Tensor]]:
    model = build(way)
    optimizer = case.make(groups_of(model))
    if release:
        step_in_backward(optimizer)
    data_rank = {"tensor parallel": 0, "tensor parallel and fsdp2": dist.get_rank() // 2}.get(way, dist.get_rank())
    seen = []
    for step in range(STEPS):
        for i in range(passes):
            if passes > 1:
                model.set_requires_gradient_sync(i == passes - 1)
            loss_of(model, 10 * step + i, data_rank).backward()
        if step == 0 and way.endswith("fsdp2"):
            model.last.bias.requires_grad_(True)
        if way == "tensor parallel" and not release:
            assert "Partial" in str(model.blocks[0].norm.weight.grad.placements)
        releases = release and way != "fsdp1"
        assert not releases or all(p.grad is None for p in model.parameters())
        if releases:
            before = contents(model, optimizer)
        if step % 2 or not releases:
            optimizer.step()
        if releases:
            assert all(map(torch.equal, before, contents(model, optimizer)))
        optimizer.zero_grad()
        seen.append(contents(model, optimizer))
    return seen


def both(way: str, cases: list[Case], passes: int) -> list[tuple[str, Any, Any]]:
    return [(case.name, *(train(way, case, release, passes) for release in (True, False))) for case in cases]


WAYS: dict[str, tuple[int, int]] = {  # processes, passes
    "fsdp2": (2, 1),
    "fsdp2, not resharded": (2, 3),
    "fsdp2, bf16": (2, 2),
    "tensor parallel": (2, 1),
    "fsdp1": (2, 1),
    "hsdp": (4, 2),
    "tensor parallel and fsdp2": (4, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bits_of_ordinary_steps(way: str) -> None:
    world, passes = WAYS[way]
    few = [case for case in FULL if case.optimizer == "AdamW" or (case.optimizer == "NormAdaptive" and way != "fsdp1")]
    for of_rank in ranks.run(world, both, way, FULL if way == "fsdp2" else few, passes):
        for name, one, two in of_rank:
            assert len(one) == STEPS and not all(map(torch.equal, one[0], one[1]))
            for first, second in zip(one, two, strict=True):
                assert len(first) == len(second) > 10
                for a, b in zip(first, second, strict=True):
                    assert_same_bits(a, b, name)


def raised(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def errors() -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    for way in ("fsdp2", "tensor parallel"):
        for when, who in (("before", "all"), ("before", "one"), ("first", "all"), ("second", "all")):
            found[f"{way}, {when}, {who}"] = refused(way, when, wrong=who == "all" or dist.get_rank() == 1)
    flat = nn.Sequential(nn.Linear(3, 3))
    model = FullyShardedDataParallel(flat, device_id=torch.device("cpu"))
    found["flat"] = raised(lambda: step_in_backward(fusedoptim.SGD(model.parameters())))
    return found


def refused(way: str, when: str, wrong: bool) -> str:
    """A state of the first parameter that is reached does not fit, in all processes or in one."""
    model = build(way)
    optimizer = fusedoptim.AdamW(groups_of(model))
    weight = model.blocks[1].down.weight

    def spoil() -> None:
        if wrong:
            states = dict.fromkeys(("exp_avg", "exp_avg_sq"), model.blocks[0].up.weight.detach())
            optimizer.state[weight] = {"step": torch.tensor(1.0), **states}

    def step(n: int) -> Any:
        return loss_of(model, n, 0 if way == "tensor parallel" else dist.get_rank()).backward()

    if when == "before":
        spoil()
        return raised(lambda: step_in_backward(optimizer))
    step_in_backward(optimizer)
    if when == "second":
        step(0)
    spoil()
    before = local(weight.detach()).clone()
    found = raised(lambda: step(1))
    assert not found.startswith("ValueError") or torch.equal(local(weight.detach()), before)
    return found


def test_errors_name_the_parameter_and_are_raised_by_all() -> None:
    found = ranks.run(2, errors)
    state = "ValueError: state 'exp_avg' of parameter 9 'blocks.1.down.weight' of group 1 (shape (10, 16), "
    for rank, of_rank in enumerate(found):
        assert of_rank.pop("flat").startswith(
            "ValueError: parameter 0 of group 0 (shape (6,), torch.float32, cpu) is a flat"
        )
        for what, text in of_rank.items():
            elsewhere = what.endswith("one") and rank == 0
            assert text.startswith("RefusedElsewhere: another rank refused" if elsewhere else state), f"{what}: {text}"


def scaled() -> tuple[str, bool]:
    model = build("fsdp2")
    optimizer, scaler = fusedoptim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    before = local(model.first.weight.detach()).clone()
    step_in_backward(optimizer)
    scaler.scale(loss_of(model, 0, 0)).backward()
    return raised(lambda: scaler.step(optimizer)), torch.equal(local(model.first.weight.detach()), before)


def test_a_scaler_finds_no_gradients() -> None:
    for text, unchanged in ranks.run(2, scaled):
        assert text.startswith("AssertionError: No inf checks were recorded") and not unchanged


def stage() -> bool:
    """Of a pipeline, whose processes have other numbers of parameters."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(1 + dist.get_rank())]
    optimizer = fusedoptim.NormAdaptive(params, norm_group=dist.group.WORLD)
    step_in_backward(optimizer)
    torch.cat(params).square().sum().backward()
    return all(p.grad is None and bool((p != 1).all()) for p in params)


def test_no_process_waits_for_the_others_norms() -> None:
    assert ranks.run(2, stage, timeout=60) == [True, True]

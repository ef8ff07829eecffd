"""Moving averages of sharded models in their parameters' place: every forward has the right weights."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import assert_same_bits
from torch import Tensor, nn

import fusedoptim
from fusedoptim import _resharding
from fusedoptim._dtensor import local

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def make(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Of 9 rows two processes have 5 and 4, of 1 row one process has none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Linear(9, 1)).to(dtype)


def fsdp2(model: nn.Sequential, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model[:2]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp1(model: nn.Sequential, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model[0])})
    return FSDP(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def x_of(step: int, dtype: torch.dtype) -> Tensor:
    """The same in all processes, so that means of gradients are exact."""
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(step)).to(dtype)


class Interruption(Exception):
    pass


def interrupted(module: nn.Module, x: Tensor) -> None:
    """A forward that ends in the middle, after the first block, when the root has gathered its parameters."""

    def stop(*_: Any) -> None:
        raise Interruption

    handle = module[2].register_forward_pre_hook(stop)
    try:
        module(x)
    finally:
        handle.remove()


def train(model: nn.Module, dtype: torch.dtype, *given: nn.Module, interrupt: bool = False, look: bool = True) -> Any:
    """What comes out of every forward, by whether it is one of training."""
    optimizer = fusedoptim.AdamW(model.parameters(), lr=0.05, ema_decay=0.5)
    trained, seen = [], []

    @torch.no_grad()
    def evaluate() -> None:
        seen.append(model(x_of(0, dtype)))

    for step in range(3):
        optimizer.zero_grad()
        y = model(x_of(step, dtype))
        trained.append(y.detach())
        y.square().mean().backward()
        optimizer.step()
        if not look:
            continue
        with optimizer.ema_weights(*given):
            pass
        evaluate()
        with optimizer.ema_weights(*given):
            evaluate()
            evaluate()
        evaluate()
        with pytest.raises(Interruption), optimizer.ema_weights(*given):
            evaluate()
            raise Interruption
        if interrupt:
            with torch.no_grad(), pytest.raises(Interruption), optimizer.ema_weights(*given):
                interrupted(model, x_of(0, dtype))
            evaluate()
        with optimizer.ema_weights(*given):
            evaluate()
    return trained, seen


def sharded(way: str, options: dict[str, Any], dtype: torch.dtype, interrupt: bool) -> list[Any]:
    model = globals()[way](make(dtype), **options)
    return [
        train(model, dtype, model, interrupt=interrupt),
        train(make(dtype), dtype, interrupt=interrupt),
        train(make(dtype), dtype, look=False),
    ]


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("fsdp2", {}),
    "fsdp2, resharded after forward": ("fsdp2", {"reshard_after_forward": True}),
    "fsdp2, not resharded": ("fsdp2", {"reshard_after_forward": False}),
    "fsdp1": ("fsdp1", {}),
    "fsdp1, original parameters": ("fsdp1", {"use_orig_params": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_forward_has_the_right_weights(way: str, dtype: torch.dtype) -> None:
    """Those of one process, also after an exception; evaluations change nothing of what follows."""
    kind, options = WAYS[way]
    interrupt = kind == "fsdp2" and can_reset()  # FSDP1 takes no forward after an interrupted one
    for (trained, seen), (same_trained, same_seen), (alone, _) in ranks.run(
        2, sharded, kind, options, dtype, interrupt
    ):
        assert len(seen) == len(same_seen) > 10
        assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and torch.equal(seen[0], seen[3])
        for a, b, c in zip(trained, same_trained, alone, strict=True):
            assert_same_bits(a, b)
            assert_same_bits(a, c)
        for a, b in zip(seen, same_seen, strict=True):
            assert_same_bits(a, b)


def can_reset() -> bool:
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "reset_iter_state")


def without_reset() -> str:
    """As with a torch that cannot reset an interrupted forward."""
    from torch.distributed.fsdp import FSDPModule

    reset = FSDPModule.__dict__.get("reset_iter_state")
    if reset is not None:
        del FSDPModule.reset_iter_state
    try:
        model = fsdp2(make())
        optimizer = stepped(model)
        with pytest.raises(RuntimeError) as error, torch.no_grad(), optimizer.ema_weights(model):
            interrupted(model, x_of(0, torch.float32))
        assert isinstance(error.value.__context__, Interruption)
        return str(error.value)
    finally:
        if reset is not None:
            FSDPModule.reset_iter_state = reset


def test_a_model_that_keeps_the_averages_is_reported() -> None:
    for text in ranks.run(2, without_reset):
        assert text.startswith("the forward of an FSDP2 model was interrupted within ema_weights()")


def stepped(model: nn.Module) -> fusedoptim.FusedOptimizer:
    optimizer = fusedoptim.SGD(model.parameters(), lr=0.1, ema_decay=0.5)
    model(x_of(0, torch.float32)).sum().backward()
    optimizer.step()
    return optimizer


def raised(optimizer: fusedoptim.FusedOptimizer, *given: Any) -> str:
    before = [local(p).clone() for p in optimizer.param_groups[0]["params"]]
    try:
        with optimizer.ema_weights(*given):
            return "nothing was raised"
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True):
            assert_same_bits(local(p.detach()), q)


def without_model() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallel = parallelize_module(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 1)), mesh, plan)
    tensor_parallel = stepped(parallel)
    found = {"tensor parallel": raised(tensor_parallel)}
    y = parallel(x_of(0, torch.float32)).sum()
    before = [p._version for p in parallel.parameters()]
    with tensor_parallel.ema_weights():
        found["versions"] = [p._version > v for p, v in zip(parallel.parameters(), before, strict=True)]
    try:
        y.backward()
    except RuntimeError as error:
        found["backward"] = str(error)

    one, two = fsdp2(make()), fsdp2(make())
    optimizer = stepped(one)
    found["tensor parallel beside fsdp2"] = raised(tensor_parallel)
    found["tensor parallel, given"] = raised(tensor_parallel, parallel)
    found["fsdp2"] = raised(optimizer)
    found["part"] = raised(optimizer, one[0])
    found["another"] = raised(optimizer, two)
    found["both"] = raised(optimizer, nn.ModuleList([two, one]))
    found["no module"] = raised(optimizer, optimizer)
    known = _resharding.sys.modules["torch.distributed._composable_state"]._module_state_mapping
    try:
        del one, two
        optimizer = None
        gc.collect()
        found["gone"] = raised(tensor_parallel)
        del _resharding.sys.modules["torch.distributed._composable_state"]._module_state_mapping
        found["cannot be told"] = raised(tensor_parallel)
    finally:
        _resharding.sys.modules["torch.distributed._composable_state"]._module_state_mapping = known
    found["fsdp1"] = raised(stepped(fsdp1(make())))
    return found


def test_a_model_is_asked_for_where_it_is_needed() -> None:
    for outcome in ranks.run_apart(2, without_model):  # where no other test has left a model
        assert not outcome.bad, outcome.trace
        found = outcome.result
        assert all(found["versions"]) and "modified by an inplace operation" in found["backward"]
        for what in ("tensor parallel", "tensor parallel, given", "both", "gone"):
            assert found[what] == "nothing was raised", what
        for what in ("tensor parallel beside fsdp2", "fsdp2", "another", "cannot be told", "fsdp1"):
            assert "pass the model, ema_weights(model)" in found[what], what
        assert found["part"].startswith("RuntimeError: 6 sharded parameters")
        assert found["no module"] == "TypeError: model must be a torch.nn.Module, but is a SGD"

"""FullyShardedDataParallel and ZeroRedundancyOptimizer: the bits of one process. FSDP's parameters are refused where a
norm is needed and no ``norm_group`` says who has the other parts of every tensor."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from cases import FULL
from ranks import run
from stacks import batch, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedoptim

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD, STEPS = 2, 3
ELEMENTWISE = [case for case in FULL if not case.cls.rule.sums]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: bool = False) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        if accumulate:
            x, y = batch(100 + step)
            with getattr(model, "no_sync", nullcontext)():
                nn.functional.mse_loss(model(x), y).backward()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def refusals(model: nn.Module) -> dict[str, str]:
    """What each attempt raises, and whether anything was written."""
    attempts = {
        "max_grad_norm": lambda: fusedoptim.AdamW(model.parameters(), max_grad_norm=1.0).step(),
        "skip_nonfinite": lambda: fusedoptim.SGD(model.parameters(), skip_nonfinite=True).step(),
        "NormAdaptive": lambda: fusedoptim.NormAdaptive(model.parameters()).step(),
        "NormAdaptive with norm_group": lambda: fusedoptim.NormAdaptive(
            model.parameters(), norm_group=dist.group.WORLD
        ).step(),
        "clip_grad_norm_": lambda: fusedoptim.clip_grad_norm_(model.parameters(), 1.0),
        "later": lambda: later(model),
    }
    found = {}
    for name, attempt in attempts.items():
        before = [p.detach().clone() for p in model.parameters()]
        try:
            attempt()
            found[name] = "nothing was raised"
        except ValueError as error:
            found[name] = str(error)
        if not all(map(torch.equal, before, (p.detach() for p in model.parameters()))):
            found[name] = "something was written"
    return found


def later(model: nn.Module) -> None:
    optimizer = fusedoptim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.step()


def work() -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.optim import ZeroRedundancyOptimizer

    results: dict[str, object] = {}
    for original in (False, True):
        for case in ELEMENTWISE:
            model = FSDP(make_model(), use_orig_params=original, device_id=torch.device("cpu"))
            train(model, case.make(model.parameters()))
            with FSDP.summon_full_params(model):
                results[f"{case} {original}"] = [p.detach().clone() for p in model.parameters()]
        model = FSDP(make_model(), use_orig_params=original, device_id=torch.device("cpu"))
        x, y = batch(0)
        nn.functional.mse_loss(model(x), y).backward()
        results[f"refusals {original}"] = refusals(model)
        model = FSDP(make_model(), use_orig_params=original, device_id=torch.device("cpu"))
        train(model, fusedoptim.AdamW(model.parameters(), lr=0.1), accumulate=True)
        with FSDP.summon_full_params(model):
            results[f"accumulated {original}"] = [p.detach().clone() for p in model.parameters()]
    model = DistributedDataParallel(make_model())
    train(model, fusedoptim.AdamW(model.parameters(), lr=0.1), accumulate=True)
    results["accumulated ddp"] = [p.detach().clone() for p in model.parameters()]
    plain = make_model()
    groups = fusedoptim.decay_groups(plain, 0.5)
    model = FSDP(plain, use_orig_params=True, device_id=torch.device("cpu"))
    train(model, fusedoptim.AdamW(groups, lr=0.1))
    with FSDP.summon_full_params(model):
        results["groups"] = [p.detach().clone() for p in model.parameters()]
    for case in FULL:
        model = DistributedDataParallel(make_model())
        train(model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=case.cls, **case.arguments()))
        results[f"{case} zero"] = [p.detach().clone() for p in model.parameters()]
    return results


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run(WORLD, work)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_rules_that_work_element_by_element(case: object, original: bool, results: list[dict]) -> None:
    model = make_model()
    train(model, case.make(model.parameters()))
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for of_rank in results:
        found: list[Tensor] = of_rank[f"{case} {original}"]
        # Means over two processes of equal gradients are exact; flat parameters are padded.
        assert torch.equal(torch.cat([p.reshape(-1) for p in found])[: expected.numel()], expected)


def test_gradients_of_passes_that_exchange_none(results: list[dict]) -> None:
    """FSDP and DDP within no_sync(), then a pass that sends the sums."""
    model = make_model()
    train(model, fusedoptim.AdamW(model.parameters(), lr=0.1), accumulate=True)
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for of_rank in results:
        for what in ("accumulated False", "accumulated True", "accumulated ddp"):
            found = torch.cat([p.reshape(-1) for p in of_rank[what]])
            assert torch.equal(found[: expected.numel()], expected), what


def test_groups_from_before_a_model_is_wrapped(results: list[dict]) -> None:
    model = make_model()
    train(model, fusedoptim.AdamW(fusedoptim.decay_groups(model, 0.5), lr=0.1))
    for of_rank in results:
        assert all(map(torch.equal, of_rank["groups"], model.parameters()))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_optimizers_that_have_some_of_the_tensors(case: object, results: list[dict]) -> None:
    model = make_model()
    train(model, case.make(model.parameters()))
    for of_rank in results:
        assert all(map(torch.equal, of_rank[f"{case} zero"], model.parameters()))


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "what",
    ["max_grad_norm", "skip_nonfinite", "NormAdaptive", "NormAdaptive with norm_group", "clip_grad_norm_", "later"],
)
def test_norms_are_refused_in_every_process(what: str, original: bool, results: list[dict]) -> None:
    texts = [of_rank[f"refusals {original}"][what] for of_rank in results]
    assert texts[0] == texts[1]
    remedy = "fully_shard" if "NormAdaptive" in what else "norm_group="
    assert "needs the norm of whole gradients" in texts[0] and remedy in texts[0]

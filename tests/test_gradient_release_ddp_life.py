"""Steps within the backward pass of DistributedDataParallel: how they end, what they leave to others, and errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import assert_same_bits
from replicas import SMALL, Branches, Plain, contents, groups_of, losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedoptim
from fusedoptim import _release_ddp, step_in_backward

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
LR = 0.1


def wrapped(kind: type = Plain, **options: Any) -> tuple[nn.Module, DistributedDataParallel]:
    model = kind()
    return model, DistributedDataParallel(model, **SMALL, **options)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def raised(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def ends(views: bool, told: bool) -> list[Any]:
    """Ordinary steps, and some in the backward pass: by handles that come and go, of half of the parameters."""
    keep_back = _release_ddp._keep_back
    if not told:
        _release_ddp._keep_back = lambda ddp: False
    try:
        found = []
        for release in (False, True):
            model, ddp = wrapped(Branches, find_unused_parameters=True, gradient_as_bucket_view=views)
            half, rest = (fusedoptim.AdamW([g], lr=LR) for g in groups_of(model))
            seen, handle = [], None
            for step in range(8):
                if release and step in (1, 5):
                    handle = step_in_backward(half, ddp=ddp)
                    other = step_in_backward(rest, ddp=ddp) if step == 5 else None
                if handle is not None and step in (3, 7):
                    handle.remove()
                    if other is not None:
                        other.remove()
                losses(ddp, step, 1)[-1].backward()
                stepped = release and step in (1, 2, 5, 6)
                own = gradients(model)
                assert not stepped or own[:3] == [None] * 3
                assert not stepped or step < 5 or own == [None] * len(own)
                seen.append([g for g in own[3:] if g is not None] if step < 5 or step == 7 else [])
                half.step()
                rest.step()
                half.zero_grad()
                rest.zero_grad()
                seen.append(contents(model, half) + contents(model, rest))
            found.append(seen)
        return found
    finally:
        _release_ddp._keep_back = keep_back


@pytest.mark.parametrize("told", [True, False], ids=["told", "this torch cannot be told"])
@pytest.mark.parametrize("views", [False, True], ids=["gradients apart", "gradients in buckets"])
def test_ddp_averages_what_is_not_stepped(views: bool, told: bool) -> None:
    outcomes = ranks.run(2, ends, views, told)
    first = outcomes[0][0]
    for outcome in outcomes:
        for seen in outcome:
            for one, two in zip(first, seen, strict=True):
                assert len(one) == len(two)
                for a, b in zip(one, two, strict=True):
                    assert_same_bits(a, b)


def one_is_wrong(views: bool) -> dict[str, Any]:
    """A learning rate that one process cannot step with, then one that none can; and what the next pass does."""
    model, ddp = wrapped(gradient_as_bucket_view=views)
    names = [n for n, _ in model.named_parameters()]
    optimizer = fusedoptim.SGD([{"params": list(model.parameters())[:2]}, {"params": [model[1].bias]}], lr=LR)
    rest = fusedoptim.SGD([p for n, p in model.named_parameters() if n in ("1.weight", "2.weight", "2.bias")], lr=LR)
    for o in (optimizer, rest):
        step_in_backward(o, ddp=ddp)
    found: dict[str, Any] = {"names": names}
    for what, is_wrong in (("one", dist.get_rank() == 0), ("all", True), ("none", False)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.param_groups[1]["lr"] = float("nan") if is_wrong else LR
        found[what] = raised(lambda: losses(ddp, 0, 1)[-1].backward())
        found[f"{what} changed"] = [
            n for n, p, q in zip(names, model.parameters(), before, strict=True) if (p != q).any()
        ]
        found[f"{what} left"] = [n for n, p in model.named_parameters() if p.grad is not None]
        if what == "one":
            optimizer.zero_grad()  # else the next pass adds to what was left
    return found


@pytest.mark.parametrize("views", [False, True], ids=["gradients apart", "gradients in buckets"])
def test_errors_are_raised_by_backward_and_hold_up_nobody(views: bool) -> None:
    first, second = ranks.run(2, one_is_wrong, views)
    message = "ValueError: parameter group 1: 'lr' is NaN"
    assert first["one"].startswith(message) and second["one"] == "nothing was raised"
    for found in (first, second):
        others = [n for n in found["names"] if n != "1.bias"]
        assert found["all"].startswith(message) and found["none"] == "nothing was raised"
        assert found["all changed"] == others and found["all left"] == ["1.bias"]
        assert found["none changed"] == found["names"] and found["none left"] == []
    assert first["one changed"] == others and first["one left"] == ["1.bias"]
    assert second["one changed"] == second["names"] and second["one left"] == []


def refusals() -> dict[str, str]:
    found = {}
    model, ddp = wrapped()

    def attempt(what: str, params: Any = model.parameters, ddp: Any = ddp) -> None:
        optimizer = fusedoptim.SGD(params(), lr=LR)
        found[what] = raised(lambda: step_in_backward(optimizer, ddp=ddp))
        assert not vars(optimizer).keys() & {"_step_in_backward", "add_param_group"}
        assert not any(p._post_accumulate_grad_hooks for p in params())

    attempt("module", ddp=model)
    stranger = nn.Parameter(torch.ones(3))
    attempt("stranger", lambda: [*model.parameters(), stranger])
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    attempt("ignored", ddp=DistributedDataParallel(model))
    del model._ddp_params_and_buffers_to_ignore

    hooked = DistributedDataParallel(model)
    hooked.register_comm_hook(None, lambda state, bucket: pytest.fail("not called"))
    attempt("hook", ddp=hooked)
    built_in = DistributedDataParallel(model)
    built_in._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    attempt("built-in hook", ddp=built_in)
    late = DistributedDataParallel(
        model, delay_all_reduce_named_params=[("0.bias", model[0].bias)], param_to_hook_all_reduce=model[2].bias
    )
    attempt("delayed", ddp=late)

    optimizer = fusedoptim.SGD(list(model.parameters())[:2], lr=LR)
    step_in_backward(optimizer, ddp=ddp)
    found["again"] = raised(lambda: step_in_backward(fusedoptim.SGD(model.parameters()), ddp=ddp))
    found["without ddp"] = raised(lambda: step_in_backward(fusedoptim.SGD(model.parameters())))
    found["new group"] = raised(lambda: optimizer.add_param_group({"params": [stranger]}))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model[1].bias]})
    losses(ddp, 0, 1)[-1].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["0.weight", "0.bias", "1.bias"]
    return found


def test_what_cannot_be_combined_is_refused() -> None:
    found, second = ranks.run(2, refusals)
    assert found == second
    for what, message in {
        "module": "TypeError: ddp= must be a DistributedDataParallel, but is a Plain",
        "stranger": "ValueError: parameter 6 of group 0 (shape (3,), torch.float32, cpu) is none that",
        "ignored": "ValueError: parameter 1 of group 0 (shape (17,), torch.float32, cpu) is none that",
        "hook": "ValueError: this DistributedDataParallel has a communication hook",
        "built-in hook": "ValueError: this DistributedDataParallel has a communication hook",
        "delayed": "ValueError: this DistributedDataParallel has delay_all_reduce_named_params",
        "again": "ValueError: parameter 0 of group 0 (shape (17, 6), torch.float32, cpu) is stepped in the backward",
        "without ddp": "ValueError: parameter 0 of group 0 (shape (17, 6), torch.float32, cpu) is stepped in the",
        "new group": "ValueError: parameter 0 of group 1 (shape (3,), torch.float32, cpu) is none that",
    }.items():
        assert found[what].startswith(message), found[what]


def later() -> dict[str, Any]:
    found, gone = thaws_and_joins()
    gc.collect()
    return {**found, "kept": [r() is not None for r in gone]}


def thaws_and_joins() -> tuple[dict[str, Any], list[weakref.ref]]:
    model = Plain()
    model[0].bias.requires_grad_(False)
    ddp = DistributedDataParallel(model, **SMALL)
    optimizer = fusedoptim.SGD(model.parameters(), lr=LR)
    step_in_backward(optimizer, ddp=ddp)
    losses(ddp, 0, 1)[-1].backward()
    before = model[0].bias.detach().clone()
    model[0].bias.requires_grad_(True)
    found: dict[str, Any] = {"thawed": raised(lambda: losses(ddp, 1, 1)[-1].backward())}
    assert_same_bits(model[0].bias.detach(), before)
    model[0].bias.grad = None
    model[0].bias.requires_grad_(False)
    own = [p.detach().clone() for p in model.parameters()]
    with ddp.join():
        found["joined"] = raised(lambda: losses(ddp, 1, 1)[-1].backward())
    for p, q in zip(model.parameters(), own, strict=True):
        assert_same_bits(p.detach(), q)
    return found, [weakref.ref(x) for x in (optimizer, ddp, model[0].weight)]


def test_what_changes_later() -> None:
    """A parameter that DDP does not know, unequal numbers of batches, and the end of all."""
    for found in ranks.run(2, later):
        assert found["thawed"].startswith(
            "RuntimeError: parameter 1 of group 0 (shape (17,), torch.float32, cpu) was froz"
        )
        assert found["joined"].startswith("RuntimeError: ddp.join() cannot be combined")
        assert found["kept"] == [False] * 3


def dies(rank: int) -> None:
    model, ddp = wrapped()
    step_in_backward(fusedoptim.SGD(model.parameters(), lr=LR), ddp=ddp)
    for step in range(3):
        if step == 1 and dist.get_rank() == rank:
            model[1].weight.register_hook(lambda g: 1 / 0)
        losses(ddp, step, 1)[-1].backward()


def test_a_process_that_fails_ends_the_others_by_the_groups_time_out() -> None:
    outcomes = ranks.run_apart(2, dies, 1, timeout=40, group_timeout=3)
    assert outcomes[1].error is not None and "ZeroDivisionError" in outcomes[1].error
    assert outcomes[0].error is not None and outcomes[0].error.startswith("RuntimeError")

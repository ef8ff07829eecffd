"""Steps within the backward pass: the bits of ordinary steps, and gradients that never exist all at once."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, FULL, Case, assert_same_bits, assert_same_optimizers, gradient, parameters

import fusedoptim
from fusedoptim import step_in_backward
from fusedoptim._native_runner import NativeRunner
from fusedoptim._reference_runner import ReferenceRunner

Params = list[torch.nn.Parameter]
SHAPES = [(5,), (3, 4), (1025,), (), (0,), (17,), (6,)]
#: Of SHAPES: used twice in the graph, left out of it in every other pass, never in it, frozen.
TWICE, SOMETIMES, NEVER, FROZEN = 1, 2, 5, 6


def loss_of(params: Params, step: int) -> torch.Tensor:
    """Its gradients are :func:`cases.gradient`'s, and a sum of two for the parameter that is used twice."""
    total = torch.zeros(())
    for i, p in enumerate(params):
        if i == NEVER or (i == SOMETIMES and step % 2):
            continue
        total = total + (p * gradient(p, step, i)).sum()
        if i == TWICE:
            total = total + (p * gradient(p, step + 100, i)).sum()
    return total


def in_groups(params: Params) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:4], "lr": 0.02}, {"params": params[4:], "weight_decay": 0.3}]


def make(case: Case, **more: Any) -> tuple[Params, fusedoptim.FusedOptimizer]:
    params = parameters(SHAPES)
    params[FROZEN].requires_grad_(False)
    return params, case.make(in_groups(params), **more)


def ordinary(o: torch.optim.Optimizer, params: Params, step: int) -> None:
    loss_of(params, step).backward()
    o.step()
    o.zero_grad()


def released(params: Params, step: int) -> None:
    loss_of(params, step).backward()
    assert all(p.grad is None for p in params)


def both_ways(one: Params, a: fusedoptim.FusedOptimizer, two: Params, b: fusedoptim.FusedOptimizer, steps: int) -> None:
    """Steps the first in the backward pass, the second after it."""
    step_in_backward(a)
    for step in range(steps):
        released(one, step)
        ordinary(b, two, step)


def assert_same_state_dicts(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for k, values in one["state"].items():
        assert list(values) == list(two["state"][k])
        for name, value in values.items():
            assert_same_bits(value, two["state"][k][name], name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_ordinary_steps(case: Case) -> None:
    """With several groups, a schedule, and parameters used twice, not always, never, and frozen."""
    (one, a), (two, b) = make(case), make(case)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (a, b)]
    step_in_backward(a)
    for step in range(6):
        released(one, step)
        if step % 2:
            a.step()
        ordinary(b, two, step)
        for schedule in schedules:
            schedule.step()
        assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_other_dtypes_and_states_in_fp32(case: Case, dtype: torch.dtype) -> None:
    one, two = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a, b = (case.make(in_groups(ps), state_dtype=torch.float32) for ps in (one, two))
    both_ways(one, a, two, b, 3)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_with_clipped_values_and_averages(case: Case) -> None:
    (one, a), (two, b) = (make(case, clip_grad_value=0.1, ema_decay=0.8) for _ in range(2))
    both_ways(one, a, two, b, 4)
    assert_same_state_dicts(a, b)
    assert "ema" in a.state[one[0]]
    with a.ema_weights(), pytest.raises(RuntimeError, match=r"step\(\) within ema_weights"):
        loss_of(one, 4).backward()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_reference_does_it_too(case: Case) -> None:
    (one, a), (two, b) = make(case, backend="reference"), make(case)
    both_ways(one, a, two, b, 3)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_loading_a_state_dict_in_between(case: Case) -> None:
    (one, a), (two, b) = make(case), make(case)
    other, c = make(case)
    for step in range(2):
        ordinary(c, other, step)
    with step_in_backward(a):
        for step in range(2, 6):
            if step == 4:
                for o in (a, b):
                    o.load_state_dict(c.state_dict())
            released(one, step)
            ordinary(b, two, step)
    assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


def test_states_are_the_owners_whoever_makes_or_changes_them() -> None:
    case = BY_NAME["adamw"]
    (one, a), (two, b) = make(case), make(case)
    ordinary(a, one, 0)
    ordinary(b, two, 0)
    step_in_backward(a)
    for step in range(1, 8):
        for o, params in ((a, one), (b, two)):
            if step == 2:
                o.state[params[0]]["exp_avg"] = torch.full((5,), 0.5)
            if step == 3:
                del o.state[params[0]]
            if step == 4:
                o.state.clear()
            if step == 5:
                o.param_groups[0]["betas"] = (0.5, 0.6)
                o.param_groups[1]["amsgrad"] = True
            if step == 6:
                o.param_groups[1] = {**o.param_groups[1], "lr": 0.3}
                o.param_groups = list(o.param_groups)
        released(one, step)
        ordinary(b, two, step)
        assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


@pytest.mark.parametrize("first", [True, False], ids=["before the first pass", "later"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_groups_added_while_it_is_active(case: Case, first: bool) -> None:
    (one, a), (two, b) = make(case), make(case)
    step_in_backward(a)
    for step in range(4):
        if step == (0 if first else 2):
            for o, params in ((a, one), (b, two)):
                new = parameters([(9,), (2, 2)], seed=1)
                o.add_param_group({"params": iter(new), "lr": 0.5})
                params += new
        released(one, step)
        ordinary(b, two, step)
    assert_same_optimizers(a, b)
    assert_same_state_dicts(a, b)


def test_parameters_that_thaw_or_leave_the_optimizer() -> None:
    case = BY_NAME["adamw"]
    (one, a), (two, b) = make(case), make(case)
    step_in_backward(a)
    for step in range(6):
        for o, params in ((a, one), (b, two)):
            params[FROZEN].requires_grad_(step >= 1)
            if step == 3:  # from its end, and from its beginning, where it is the parameter whose hook notices
                del o.param_groups[2]["params"][-1], o.param_groups[0]["params"][0]
        loss_of(one, step).backward()
        assert [i for i, p in enumerate(one) if p.grad is not None] == ([0, FROZEN] if step >= 3 else [])
        for i in (0, FROZEN):
            one[i].grad = None
        ordinary(b, two, step)
        for i in (0, FROZEN):
            two[i].grad = None
        assert_same_optimizers(a, b)
        for p, q in zip(one, two, strict=True):
            assert_same_bits(p.detach(), q.detach())


def test_groups_changed_by_hand() -> None:
    """A pass hooks what was appended, for those that follow, and lets go of what was deleted."""
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    step_in_backward(a)
    new = {a: parameters([(9,)], seed=1)[0], b: parameters([(9,)], seed=1)[0]}
    for step in range(6):
        for o, params in ((a, one), (b, two)):
            if step == 1:
                o.param_groups.append({**o.param_groups[0], "params": [new[o]]})
            if step == 4:
                del o.param_groups[2:]
            loss_of([params[5] if step >= 4 else params[0], *([new[o]] if step in (2, 3) else [])], step).backward()
        assert (one[5].grad is not None) == (step >= 4) and one[0].grad is None and new[a].grad is None
        b.step()
        b.zero_grad()
        assert_same_optimizers(a, b)


def test_a_value_deleted_from_a_group() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    del o.param_groups[1]["eps"]
    with pytest.raises(ValueError, match="parameter group 1 has no 'eps'"):
        (params[2] * 2).sum().backward()


def test_a_tensor_lr_changed_in_place() -> None:
    def with_tensor() -> tuple[Params, fusedoptim.FusedOptimizer]:
        params = parameters([(5,), (6,)])
        return params, fusedoptim.AdamW(params, lr=torch.tensor(0.1))

    (one, a), (two, b) = with_tensor(), with_tensor()
    step_in_backward(a)
    for step in range(3):
        released(one, step)
        ordinary(b, two, step)
        for o in (a, b):
            o.param_groups[0]["lr"].mul_(0.5)
    assert_same_optimizers(a, b)


def test_gradients_that_were_there_before_are_part_of_the_sum() -> None:
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    for params in (one, two):
        loss_of(params, 7).backward()
    step_in_backward(a)
    assert not a.state
    loss_of(one, 0).backward()
    one[NEVER].grad = two[NEVER].grad = torch.ones(17)
    a.step()  # what the pass has not reached is left to it
    ordinary(b, two, 0)
    assert_same_optimizers(a, b)


def test_a_closure() -> None:
    (one, a), (two, b) = make(BY_NAME["sgd_momentum"]), make(BY_NAME["sgd_momentum"])
    step_in_backward(a)

    def closure() -> torch.Tensor:
        loss = loss_of(one, 0)
        loss.backward()
        return loss

    assert torch.equal(a.step(closure), loss_of(two, 0))
    ordinary(b, two, 0)
    assert_same_optimizers(a, b)


def test_it_ends() -> None:
    (one, a), (two, b) = make(BY_NAME["adamw"]), make(BY_NAME["adamw"])
    with step_in_backward(a) as handle:
        released(one, 0)
    handle.remove()  # once more does no harm
    ordinary(b, two, 0)
    loss_of(one, 1).backward()
    assert one[0].grad is not None
    a.step()
    a.zero_grad()
    ordinary(b, two, 1)
    handle = step_in_backward(a)
    released(one, 2)
    handle.remove()
    ordinary(b, two, 2)
    a.add_param_group({"params": parameters([(3,)])})
    assert not any(vars(a).keys() & {"_step_in_backward", "add_param_group"})
    assert all(not p._post_accumulate_grad_hooks for p in one)
    del a.param_groups[-1]
    assert_same_optimizers(a, b)


def test_a_removed_handle_does_not_end_its_successor() -> None:
    params, o = make(BY_NAME["sgd"])
    first = step_in_backward(o)
    first.remove()
    step_in_backward(o)
    first.remove()
    released(params, 0)
    o.add_param_group({"params": (new := parameters([(3,)]))})
    released(params + new, 1)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_step_in_the_ordinary_way(how: Callable) -> None:
    params, a = make(BY_NAME["adamw"])
    step_in_backward(a)
    released(params, 0)
    b = how(a)
    others = [p for g in b.param_groups for p in g["params"]]
    released(params, 1)
    ordinary(b, others, 1)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("keep", ["optimizer", "handle", "neither"])
def test_it_lasts_as_long_as_the_optimizer_or_the_handle(keep: str) -> None:
    params, o = make(BY_NAME["adamw"])
    handle = step_in_backward(o)
    released(params, 0)
    gone = weakref.ref(o)
    if keep != "optimizer":
        del o
    if keep != "handle":
        del handle
    gc.collect()
    loss_of(params, 1).backward()
    assert (gone() is None) == (params[0].grad is not None) == (keep == "neither")
    if keep == "neither":
        step_in_backward(fusedoptim.SGD(params))


def test_a_model_is_freed_with_its_optimizer() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    gone = [weakref.ref(o), *map(weakref.ref, params)]
    del params, o
    gc.collect()
    assert all(r() is None for r in gone)


# ---- costs ----


def stack(layers: int, width: int = 8) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def bytes_of_gradients(model: torch.nn.Module) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("release", [True, False])
def test_gradients_never_exist_all_at_once(release: bool) -> None:
    model = stack(20, 32)
    peak = 0

    def watch(_: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, bytes_of_gradients(model))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)  # before the one that steps, so that it sees the gradient
    o = fusedoptim.AdamW(model.parameters())
    if release:
        step_in_backward(o)
    model(torch.ones(2, 32)).sum().backward()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert peak == (max(sizes) if release else sum(sizes))
    assert bytes_of_gradients(model) == (0 if release else sum(sizes))


@pytest.mark.parametrize(("backend", "runner"), [("cpu", NativeRunner), ("reference", ReferenceRunner)])
def test_tables_are_built_once_per_parameter(
    monkeypatch: pytest.MonkeyPatch, backend: str, runner: type[NativeRunner]
) -> None:
    built = []
    build = runner.build
    monkeypatch.setattr(runner, "build", lambda self, *rest: (built.append(self), build(self, *rest))[1])
    model = stack(10)
    o = fusedoptim.AdamW(model.parameters(), backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(o, 0.9)
    step_in_backward(o)
    counts = []
    for _ in range(4):
        built.clear()
        model(torch.ones(2, 8)).sum().backward()
        schedule.step()
        counts.append(len(built))
    # The reference keeps no tables.
    assert counts == ([20, 0, 0, 0] if backend == "cpu" else [20] * 4)


def calls(function: Callable[[], Any]) -> int:
    """How many functions it calls, Python's and C's."""
    n = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n


def test_costs_grow_with_the_number_of_parameters_and_no_faster() -> None:
    """Attaching, the first pass, one that finds everything in place, and the first after a checkpoint was loaded."""

    def costs(layers: int) -> list[int]:
        model = stack(layers)
        o = fusedoptim.AdamW([{"params": [p]} for p in model.parameters()])

        def backward() -> None:
            model(torch.ones(2, 8)).sum().backward()

        step_in_backward(o).remove()
        seen = [calls(lambda: step_in_backward(o)), calls(backward), calls(backward)]
        o.load_state_dict(o.state_dict())
        return [*seen, calls(backward)]

    few, many, more = costs(20), costs(40), costs(80)
    for a, b, c in zip(few, many, more, strict=True):
        assert c - b == pytest.approx(2 * (b - a), rel=0.02)


# ---- errors ----


CANNOT_BE_COMBINED = {
    "max_grad_norm": (
        lambda o: o.param_groups[2].update(max_grad_norm=1.0),
        "max_grad_norm=1.0 cannot.*set it to None",
    ),
    "skip_nonfinite": (lambda o: o._options.update(skip_nonfinite=True), "skip_nonfinite=True cannot.*without it"),
    "zero_grad": (lambda o: o._options.update(zero_grad_in_step=True), "zero_grad_in_step=True cannot.*without it"),
    "scaling": (lambda o: setattr(o, "_step_supports_amp_scaling", True), "amp_in_step=True cannot.*bfloat16"),
    "pre-hook": (lambda o: o.register_step_pre_hook(lambda *a: None), "pre-hooks cannot.*remove them"),
}


@pytest.mark.parametrize("name", CANNOT_BE_COMBINED)
def test_what_cannot_be_combined_is_refused(name: str) -> None:
    change, message = CANNOT_BE_COMBINED[name]
    params, o = make(BY_NAME["adamw"])
    change(o)
    with pytest.raises(ValueError, match=message):
        step_in_backward(o)
    loss_of(params, 0).backward()
    assert params[0].grad is not None and "add_param_group" not in vars(o)


@pytest.mark.parametrize("name", CANNOT_BE_COMBINED)
def test_what_is_set_later_is_refused_by_the_backward_pass(name: str) -> None:
    change, message = CANNOT_BE_COMBINED[name]
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    change(o)
    before = params[4].detach().clone()
    with pytest.raises(ValueError, match=message):
        (params[4] * torch.ones(0)).sum().backward()
    assert_same_bits(params[4].detach(), before)
    assert params[4].grad is not None


def test_absent_options_are_no_reason() -> None:
    params, o = make(BY_NAME["adamw"])
    for group in o.param_groups:
        group["max_grad_norm"] = None
    o._options["skip_nonfinite"] = False
    step_in_backward(o)
    released(params, 0)


def test_attaching_twice() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    for second in (o, fusedoptim.SGD(params[:1])):
        with pytest.raises(ValueError, match=r"parameter 0 of group 0.*already.*remove\(\)"):
            step_in_backward(second)
    released(params, 0)
    third = fusedoptim.SGD(parameters([(3,)]))
    step_in_backward(third)
    with pytest.raises(ValueError, match=r"parameter 1 of group 1.*already"):
        third.add_param_group({"params": [*parameters([(4,)]), params[0]]})
    assert len(third.param_groups) == 1 and len(third._all_params) == 1


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    new = parameters([(3,)])
    with pytest.raises(ValueError, match="max_grad_norm"):
        o.add_param_group({"params": new, "max_grad_norm": 1.0})
    released(params, 0)
    (new[0] * 2).sum().backward()
    assert len(o.param_groups) == 3 and new[0].grad is not None


def test_only_for_this_packages_optimizers() -> None:
    with pytest.raises(TypeError, match="needs an optimizer of fusedoptim, but was given a LBFGS"):
        step_in_backward(torch.optim.LBFGS(parameters([(3,)])))


def test_parameters_that_share_memory() -> None:
    p = parameters([(6,)])[0]
    with pytest.raises(ValueError, match="shares memory"):
        step_in_backward(fusedoptim.SGD([p, torch.nn.Parameter(p.detach()[2:])]))


def test_errors_name_the_parameter_as_the_optimizer_has_it() -> None:
    params = parameters([(5,), (6,), (7,)])
    o = fusedoptim.AdamW([{"params": [("a", params[0])]}, {"params": [("b", params[1]), ("c", params[2])]}])
    step_in_backward(o)
    assert all(len(part.group["param_names"]) == 1 for part in o._step_in_backward._parts.values())
    o.state[params[2]]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 'c' of group 1 \(shape \(7,\)"):
        loss_of(params, 0).backward()
    del o.state[params[2]]
    o.zero_grad()
    o.param_groups[1]["lr"] = float("nan")
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match="parameter group 1: 'lr' is NaN"):
        (params[1] * 2).sum().backward()
    assert_same_bits(params[1].detach(), before)


def test_torch_refuses_a_second_pass_over_the_graph() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    loss = (params[0] ** 2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scaler_finds_no_gradients() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(params, 0)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(o)


def test_post_hooks_run_where_step_is_called() -> None:
    params, o = make(BY_NAME["sgd"])
    seen = []
    o.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
    step_in_backward(o)
    released(params, 0)
    assert not seen
    o.step()
    assert_same_bits(seen[0], params[0].detach())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_on_a_gpu(case: Case, backend: str) -> None:
    """The bits of ordinary steps, and the allocator's word that gradients do not pile up."""
    one, two = (stack(20, 512).cuda() for _ in range(2))
    a, b = (case.make(model.parameters(), backend=backend) for model in (one, two))
    step_in_backward(a)
    peaks = []
    for _ in range(3):
        peaks.clear()
        for model, o in ((one, a), (two, b)):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(torch.ones(2, 512, device="cuda")).sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            o.step()
            o.zero_grad()
        assert_same_optimizers(a, b)
    gradients = sum(p.numel() * p.element_size() for p in one.parameters())
    assert peaks[1] >= gradients > 4 * peaks[0]

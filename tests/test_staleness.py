"""Caches are never stale: whatever is replaced by hand takes effect at the next step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    BACKEND,
    BY_NAME,
    CASES,
    COVERING,
    FULL,
    LOW,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    force_grad,
    parameters,
    set_gradients,
)

import fusedoptim
from fusedoptim import _native

Change = Callable[[torch.optim.Optimizer, list], None]


def replace_storage(o: torch.optim.Optimizer, ps: list) -> None:
    ps[1].data = ps[1].detach() * 2


def replace_by_transposed(o: torch.optim.Optimizer, ps: list) -> None:
    ps[1].data = (ps[1].detach() + 1).t().contiguous().t()


def transpose_in_place(o: torch.optim.Optimizer, ps: list) -> None:
    ps[3].data = ps[3].detach().t()  # the same memory, shape and size


def read_as_another_dtype(o: torch.optim.Optimizer, ps: list) -> None:
    ps[4].data = ps[4].detach().view(torch.float16)  # the same memory and size


def stretch(o: torch.optim.Optimizer, ps: list) -> None:
    ps[0].data = torch.as_strided(ps[0].detach(), (3,), (2,))
    ps[0].grad = torch.ones(3, dtype=ps[0].dtype)
    o.state.pop(ps[0], None)


def transpose_state_in_place(o: torch.optim.Optimizer, ps: list) -> None:
    for s in o.state[ps[3]].values():
        if s.dim() == 2 and s.shape == ps[3].shape:
            s.data = s.t()


def replace_state(o: torch.optim.Optimizer, ps: list) -> None:
    state = o.state[ps[1]]
    for name in list(state):
        state[name] = torch.full_like(state[name], 0.5)


def replace_state_memory(o: torch.optim.Optimizer, ps: list) -> None:
    for s in o.state[ps[1]].values():
        s.data = torch.full_like(s, 0.25)


def write_state_in_place(o: torch.optim.Optimizer, ps: list) -> None:
    for s in o.state[ps[1]].values():
        s.fill_(3)


def share_memory(o: torch.optim.Optimizer, ps: list) -> None:
    for s in o.state[ps[1]].values():
        s.share_memory_()


def drop_state(o: torch.optim.Optimizer, ps: list) -> None:
    del o.state[ps[1]]


def clear_all_state(o: torch.optim.Optimizer, ps: list) -> None:
    o.state.clear()


def other_state_dict_object(o: torch.optim.Optimizer, ps: list) -> None:
    o.state[ps[1]] = dict(o.state[ps[1]])


def reload(o: torch.optim.Optimizer, ps: list) -> None:
    o.load_state_dict(o.state_dict())


def change_values(o: torch.optim.Optimizer, ps: list) -> None:
    o.param_groups[0].update(lr=0.5, weight_decay=0.25)


def lists_as_betas(o: torch.optim.Optimizer, ps: list) -> None:
    if "betas" in o.param_groups[0]:
        o.param_groups[0]["betas"] = [0.5] * len(o.defaults["betas"])


def split_groups(o: torch.optim.Optimizer, ps: list) -> None:
    group = o.param_groups[0]
    o.param_groups.append({**group, "params": group["params"][2:], "lr": 0.3})
    group["params"] = group["params"][:2]


def reorder(o: torch.optim.Optimizer, ps: list) -> None:
    o.param_groups[0]["params"].reverse()


def no_gradient(o: torch.optim.Optimizer, ps: list) -> None:
    ps[1].grad = None


def double(o: torch.optim.Optimizer, ps: list) -> None:
    ps[1].data = ps[1].data.double()
    ps[1].grad = torch.ones_like(ps[1])


def resize(o: torch.optim.Optimizer, ps: list) -> None:
    ps[1].grad = None
    ps[1].data = torch.ones(9, 9)
    ps[1].grad = torch.ones(9, 9)
    o.state.pop(ps[1], None)


CHANGES = [
    replace_storage, replace_by_transposed, transpose_in_place, read_as_another_dtype, stretch,
    transpose_state_in_place, replace_state, replace_state_memory, write_state_in_place, share_memory,
    drop_state, clear_all_state, other_state_dict_object, reload, change_values, lists_as_betas, split_groups, reorder,
    no_gradient, double, resize,
]  # fmt: skip


def named(value: object) -> str:
    return getattr(value, "__name__", str(value))


def changes(cases: list[Case]) -> list[tuple[Case, Change]]:
    """All with each, or all changes with the rules in turn."""
    return [
        (case, change)
        for i, case in enumerate(cases)
        for k, change in enumerate(CHANGES)
        if not COVERING or k % len(cases) == i
    ]


def change_in_between(case: Case, change: Change, make: Callable[[], list]) -> None:
    """The reference looks at everything anew, so it is what a step without a cache does."""
    optimizers = []
    for backend in (BACKEND or "cpu", "reference"):
        ps = make()
        o = case.make(ps, backend=backend)
        for step in range(6):
            set_gradients(ps, step)
            if step == 3:
                change(o, ps)
            if change in (double, resize, read_as_another_dtype, stretch) and step >= 3:
                for p in ps:
                    p.grad = torch.ones_like(p)
            o.step()
        optimizers.append(o)
    assert_same_optimizers(*optimizers)


@pytest.mark.parametrize(("case", "change"), changes(FULL), ids=named)
def test_a_change_takes_effect_at_the_next_step(case: Case, change: Change) -> None:
    shapes = [(5,), (6, 7), (1025,), (9, 9)]
    change_in_between(case, change, lambda: [*parameters(shapes), *parameters([(20,)], torch.bfloat16)])


@pytest.mark.parametrize(("case", "change"), changes(LOW), ids=named)
def test_a_change_takes_effect_in_fewer_bits(case: Case, change: Change) -> None:
    """Also of what is kept beside a parameter, or of a state's codes and scales alone."""
    if change in (double, read_as_another_dtype):
        pytest.skip("not every way to store is for these dtypes")
    shapes = [(5,), (65, 70), (1025,), (66, 66)]
    change_in_between(case, change, lambda: parameters(shapes, torch.bfloat16))


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_replaced_and_written_in_place(in_place: bool) -> None:
    ps, qs = parameters([(100,)] * 5), parameters([(100,)] * 5)
    a, b = fusedoptim.AdamW(ps, backend=BACKEND or "cpu"), fusedoptim.AdamW(qs, backend="reference")
    for step in range(4):
        set_gradients(qs, step)
        for p, q in zip(ps, qs, strict=True):
            if in_place and p.grad is not None:
                p.grad.copy_(q.grad)
            else:
                p.grad = q.grad.clone()
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in the same memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_gradient_of_another_dtype_than_before(case: Case, dtype: torch.dtype, in_place: bool) -> None:
    ps, qs = parameters([(100,), (33, 5)], dtype), parameters([(100,), (33, 5)], dtype)
    a = case.make(ps, backend=BACKEND or "cpu", max_grad_norm=1.0)
    b = case.make(qs, backend="reference", max_grad_norm=1.0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, dtype, torch.bfloat16, torch.float32]
    memories = [torch.zeros(p.numel(), dtype=torch.float64) for p in ps]
    for step, of_gradients in enumerate(dtypes):
        set_gradients(qs, step)
        for p, q, memory in zip(ps, qs, memories, strict=True):
            g = q.grad.to(of_gradients)
            q.grad = p.grad = None
            force_grad(q, g)
            force_grad(p, memory.view(g.dtype)[: g.numel()].view(g.shape).copy_(g) if in_place else g.clone())
            assert p.grad.dtype == of_gradients
        a.step()
        b.step()
        assert_same_optimizers(a, b, f"step {step}: ")


def test_a_tensor_lr_written_in_place_takes_effect() -> None:
    ps = parameters([(5,)])
    lr = torch.tensor(0.0)
    o = fusedoptim.SGD(ps, lr=lr)
    before = ps[0].detach().clone()
    ps[0].grad = torch.ones(5)
    o.step()
    assert_same_bits(ps[0].detach(), before)
    lr.fill_(1.0)
    o.step()
    assert_same_bits(ps[0].detach(), before - 1)


def test_two_optimizers_over_the_same_parameters() -> None:
    ps, qs = parameters([(50,)]), parameters([(50,)])
    mine = [fusedoptim.SGD(ps, lr=0.1, momentum=0.9), fusedoptim.AdamW(ps)]
    theirs = [fusedoptim.SGD(qs, lr=0.1, momentum=0.9, backend="reference"), fusedoptim.AdamW(qs, backend="reference")]
    for step in range(6):
        set_gradients(ps, step)
        set_gradients(qs, step)
        mine[step % 2].step()
        theirs[step % 2].step()
    for a, b in zip(mine, theirs, strict=True):
        assert_same_optimizers(a, b)


# ---- step counts ----


def elsewhere(steps: list[torch.Tensor]) -> None:
    steps[1].data = torch.tensor(7.0)


def put_elsewhere(steps: list[torch.Tensor]) -> None:
    steps[1].set_(torch.tensor([3.0, 7.0]).untyped_storage(), 1, ())


def exchanged(steps: list[torch.Tensor]) -> None:
    first, last = steps[0].detach(), steps[2].detach()
    steps[0].data, steps[2].data = last, first


def wider(steps: list[torch.Tensor]) -> None:
    steps[1].data = steps[1].double()


def read_as_wider(steps: list[torch.Tensor]) -> None:
    """At the same address."""
    memory, at = steps[2].untyped_storage(), steps[2].storage_offset()
    assert at % 2 == 0 and memory.nbytes() >= 4 * at + 8
    steps[2].data = torch.empty(0, dtype=torch.float64).set_(memory, at // 2, ())


def counted_on(steps: list[torch.Tensor]) -> None:
    steps[1].fill_(7)


@pytest.mark.parametrize(
    "change", [elsewhere, put_elsewhere, exchanged, wider, read_as_wider, counted_on], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("views", [False, True], ids=["apart", "views"])
def test_a_step_count_changed_by_hand(change: Callable[[list[torch.Tensor]], None], views: bool) -> None:
    """Also where all are views of one buffer, as on a GPU, which alone would not show it."""
    optimizers = []
    for backend in (BACKEND or "cpu", "reference"):
        ps = parameters([(5,), (2, 3), (4,)])
        o = fusedoptim.AdamW(ps, lr=0.1, backend=backend)
        for step in range(5):
            set_gradients(ps, step)
            if step == 1:
                buffer = torch.tensor([1.0, 4.0, 9.0, 0.0])
                for i, p in enumerate(ps):
                    o.state[p]["step"] = buffer[i] if views else buffer[[i, 3]][0]
            if step == 3:
                change([o.state[p]["step"] for p in ps])
            o.step()
        optimizers.append(o)
    assert_same_optimizers(*optimizers)


def test_a_group_that_is_the_attributes_of_an_object() -> None:
    """They are written without a dict's own functions."""

    class Settings:
        pass

    ps, qs = parameters([(5,)]), parameters([(5,)])
    settings = Settings()
    settings.params, settings.lr = ps, 0.5
    a = fusedoptim.SGD([vars(settings)], lr=1.0)
    assert a.param_groups[0] is vars(settings)
    b = fusedoptim.SGD(qs, lr=0.5, backend="reference")
    for step in range(200):
        set_gradients(ps, step)
        set_gradients(qs, step)
        if step % 3:
            settings.lr = 0.5 / (step + 1)
        b.param_groups[0]["lr"] = settings.lr
        a.step()
        b.step()
        assert_same_bits(ps[0].detach(), qs[0].detach())


def test_the_plan_is_kept_while_nothing_changes() -> None:
    """Otherwise every step would be slow, and no other test would notice."""
    ps = parameters([(50,), (7,)])
    o = fusedoptim.AdamW(ps)
    set_gradients(ps, 0)
    o.step()
    runners = o._runners
    for step in range(1, 9):
        set_gradients(ps, step)
        if step == 3:
            ps[1].grad = None
        if step == 5:
            ps[0].grad = torch.zeros(100)[::2]
        o.param_groups[0]["lr"] = 1e-3 / step
        if step == 6:
            torch.set_num_threads(1)
        if step == 7:
            _native._C.set_cpu_capability("portable")
        o.step()
        assert o._runners is runners, step


def test_a_step_allocates_nothing_that_grows_with_the_model() -> None:
    ps = parameters([(1 << 20,), (1 << 18,)])
    set_gradients(ps, 0)
    for case in (BY_NAME["adamw"], BY_NAME["norm_adaptive"]):
        o = case.make(ps)
        o.step()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            o.step()
        allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
        assert allocated == 0


@pytest.mark.parametrize("case", [*CASES, *LOW], ids=str)
def test_a_failed_step_leaves_everything_as_it_was(case: Case) -> None:
    ps = parameters([(5,), (6,)])
    o = case.make(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    ps[1].data = torch.ones(7)
    before = [p.detach().clone() for p in ps]
    state = {p: dict(s) for p, s in o.state.items()}
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \(shape \(7,\).*gradient of shape \(6,\)"):
        o.step()
    for p, b in zip(ps, before, strict=True):
        assert_same_bits(p.detach(), b)
    assert {p: dict(s) for p, s in o.state.items()} == state
    ps[1].data = torch.ones(6)
    if case.optimizer == "Adagrad":
        assert set(o.state) == set(ps)
    o.step()


def test_a_first_step_that_fails_is_still_first_when_repeated() -> None:
    ps, qs = parameters([(5,), (6,)]), parameters([(5,), (6,)])
    a, b = fusedoptim.SGD(ps, momentum=0.9, dampening=0.5), fusedoptim.SGD(qs, momentum=0.9, dampening=0.5)
    for step in range(3):
        set_gradients(ps, step)
        set_gradients(qs, step)
        if step == 0:
            a.param_groups[0]["lr"] = float("nan")
            with pytest.raises(ValueError, match="'lr' is NaN"):
                a.step()
            a.param_groups[0]["lr"] = 1e-3
        a.step()
        b.step()
    assert_same_optimizers(a, b)

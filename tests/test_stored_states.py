"""``state_dtype=`` and ``rounding=``: states as they are stored, changed in place and stepped in other ways."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F32, WITH_SLOTS
from policies import (
    CASES,
    MIXED,
    POLICIES,
    SGD,
    SHAPES,
    SMALLEST,
    beside,
    go,
    moved,
    params_of,
    trained,
)
from torch import Tensor

from fusedoptim import Adagrad, AdamW, reference, step_in_backward

# ---- the same bits, however a run goes on ----


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_with_the_same_bits(case: Case, policy: str, how: str) -> None:
    a = trained(case, steps=2, **POLICIES[policy])
    if how == "deepcopy":
        b = copy.deepcopy(a)
    elif how == "pickle":
        b = pickle.loads(pickle.dumps(a))
    else:
        b = beside(a, case)  # which takes the policy over
        b.load_state_dict(moved(a))
    for o in (a, b):
        go(o, 2, 4)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("names", [False, True], ids=["numbers", "names"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_in_the_backward_pass(case: Case, policy: str, names: bool) -> None:
    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(BF16)
        members = list(model.named_parameters() if names else model.parameters())
        return model, case.make([{"params": members[:1]}, {"params": members[1:]}], **POLICIES[policy])

    (plain, a), (hooked, b) = build(), build()
    handle = step_in_backward(b)
    for step in range(3):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(BF16)
        for model, o in ((plain, a), (hooked, b)):
            model(x).square().mean().backward()
            o.step()
            o.zero_grad()
    handle.remove()
    assert_same_optimizers(a, b)


def test_compiled_and_watched_steps() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def watched(o: Any) -> None:
        with Watches():
            o.step()

    a = trained(**SMALLEST, steps=1)
    others: list[tuple[Any, Callable[[Any], None]]] = [
        (copy.deepcopy(a), torch.compile(lambda o: o.step(), backend="eager")),
        (copy.deepcopy(a), watched),
    ]
    go(a, 1, 3)
    for o, step in others:
        for k in range(1, 3):
            set_gradients(params_of(o), k)
            step(o)
        assert_same_optimizers(a, o)


@pytest.mark.parametrize("names", [False, True], ids=["numbers", "names"])
def test_a_traced_step_with_states_from_outside(names: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def build() -> Any:
        ps = parameters(SHAPES[:2], BF16)
        return AdamW([("weight.0", ps[0]), ("weight.1", ps[1])] if names else ps, **SMALLEST)

    a, b = build(), build()
    for o in (a, b):
        go(o, 0, 1)
    ps = params_of(b)
    keys = [list(b.state[p]) for p in ps]

    def step(params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> Any:
        old = b.param_groups[0]["params"], dict(b.state)
        b.param_groups[0]["params"] = params
        b.state.clear()
        for p, g, names_, values in zip(params, grads, keys, states, strict=True):
            p.grad = g
            b.state[p] = dict(zip(names_, values, strict=True))
        b.step()
        b.param_groups[0]["params"] = old[0]
        b.state.clear()
        b.state.update(old[1])
        return params

    def given() -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        return (
            [p.detach() for p in ps],
            [torch.full_like(p, 0.25).detach() for p in ps],
            [[b.state[p][k] for k in names_] for p, names_ in zip(ps, keys, strict=True)],
        )

    graph = make_fx(step)(*copy.deepcopy(given()))
    for _ in range(2):
        for p in params_of(a):
            p.grad = torch.full_like(p, 0.25)
        a.step()
        graph(*given())
    assert_same_optimizers(a, b)


def test_fake_parameters_get_the_states_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in CASES:
        real = trained(case, steps=1, **SMALLEST)
        with FakeTensorMode():
            ps = [torch.nn.Parameter(torch.empty(shape, dtype=BF16)) for shape in SHAPES]
            o = case.make(ps, **SMALLEST)
            for p in ps:
                p.grad = torch.empty_like(p)
            o.step()
        for p, q in zip(params_of(real), ps, strict=True):
            mine = {name: (v.shape, v.dtype) for name, v in real.state[p].items()}
            assert {name: (v.shape, v.dtype) for name, v in o.state[q].items()} == mine


# ---- changes in place ----


@pytest.mark.filterwarnings("ignore:states of this checkpoint were narrower")
@pytest.mark.parametrize("second", [None, F32, BF16, "int8"], ids=str)
@pytest.mark.parametrize("first", [F32, BF16, "int8"], ids=str)
def test_a_group_changes_how_its_states_are_stored(first: Any, second: Any) -> None:
    """As a checkpoint would, loaded with the other."""
    for case in CASES:
        a = trained(case, state_dtype=first, steps=2)
        b = beside(a, case, state_dtype=second)
        b.load_state_dict(a.state_dict())
        for o in (a, b):
            if second is None:
                del o.param_groups[0]["state_dtype"]
            else:
                o.param_groups[0]["state_dtype"] = second
            go(o, 2, 4)
        assert_same_optimizers(a, b)
        names = set().union(*a.state.values())
        assert any(name.endswith("_q8") for name in names) == (second == "int8")


def test_a_change_that_fails_changes_nothing() -> None:
    a = trained(**SMALLEST)
    ps = params_of(a)
    before = copy.deepcopy(a.state_dict())
    a.param_groups[0]["state_dtype"] = F32
    set_gradients(ps, 3)
    ps[0].grad = torch.zeros(5, dtype=BF16).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        a.step()
    a.param_groups[0]["state_dtype"] = "int8"
    assert str(a.state_dict()["param_groups"]) == str(before["param_groups"])
    for i, p in enumerate(ps):
        assert set(a.state[p]) == set(before["state"][i])
        for name, value in before["state"][i].items():
            assert_same_bits(a.state[p][name], value, name)


def test_states_that_are_put_there_by_hand_are_encoded() -> None:
    a = trained(**SMALLEST)
    b = copy.deepcopy(a)
    p, q = params_of(a)[1], params_of(b)[1]
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    a.state[p]["exp_avg"] = x
    codes, scales = reference.encode("q8", x, None)
    b.state[q].update(exp_avg_q8=codes, exp_avg_scale=scales)
    for o in (a, b):
        go(o, 3, 4)
    assert "exp_avg" not in a.state[p]
    assert_same_optimizers(a, b)


def test_shared_parameters_and_policies_of_groups() -> None:
    """Embeddings may stay as they are."""
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(80, 64), torch.nn.Linear(64, 80)
    head.weight = embedding.weight
    body = torch.nn.Linear(64, 64).to(BF16)
    o = AdamW(
        [
            {"params": [embedding.weight], "state_dtype": None},
            {"params": body.parameters(), "master": "remainder"},
            {"params": [head.bias], "rounding": "stochastic"},
        ],
        state_dtype="int8",
    )
    go(o, 0, 2)
    assert set(o.state[embedding.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "state_dtype" not in o.param_groups[0]
    assert {"exp_avg_q8", "param_remainder"} <= set(o.state[body.weight])
    assert o.state[head.bias]["exp_avg"].dtype == BF16
    twin = copy.deepcopy(o)
    twin.load_state_dict(copy.deepcopy(o.state_dict()))
    for opt in (o, twin):
        go(opt, 2, 3)
    assert_same_optimizers(o, twin)


def test_sgd_counts_steps_only_where_it_needs_them() -> None:
    o = trained(SGD, **MIXED)
    assert all("step" not in values for values in o.state.values())
    o.param_groups[0]["rounding"] = {"momentum_buffer": "stochastic"}
    go(o, 3, 5)
    assert all(values["step"].item() == 2 for values in o.state.values())


@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_memory_of_policies(case: Case) -> None:
    """What is to come comes, in the states' own sizes."""
    names = (
        [slot.name for slot in FULL[0].make(parameters([(2,)])).rule.states]
        if case.optimizer in ("Adam", "AdamW")
        else []
    )
    dtype: Any = {"exp_avg": "int8", "exp_avg_sq": "int8"} if names else "int8"
    if case.optimizer == "RMSprop":  # which is centered
        dtype = {"momentum_buffer": "int8"}
    if case.optimizer == "AdamWScheduleFree":  # which refuses it for the other
        dtype = {"exp_avg_sq": "int8"}
    for options in ({"master": "remainder", "state_dtype": dtype}, {"master": F32}, {"rounding": "stochastic"}):
        o = case.make(parameters(SHAPES, BF16), **options)
        before = o.memory()
        go(o, 0, 1)
        after = o.memory()
        found: dict[str, int] = {}
        for values in o.state.values():
            for name, value in values.items():
                found[name] = found.get(name, 0) + value.numel() * value.element_size()
        assert after.states == found == before.states | before.to_come
        assert not after.to_come


def test_memory_says_what_an_element_takes() -> None:
    o = AdamW([torch.nn.Parameter(torch.zeros(1 << 10, 1 << 8, dtype=BF16))], **SMALLEST)
    assert o.memory().per_element["exp_avg_q8 (to come)"] == 1.0
    go(o, 0, 1)
    m = o.memory()
    assert m.per_element["parameters"] == 2.0 and m.per_element["param_remainder8"] == 1.0
    assert m.per_element["exp_avg_q8"] == m.per_element["exp_avg_sq_q8"] == 1.0
    assert m.per_element["exp_avg_scale"] == 4 / 128
    o.zero_grad()
    assert o.memory().per_element["total"] == 5.0 + 2 * 4 / 128 + 4 / (1 << 18)
    shown = str(o.memory()).split("\n")
    assert shown[-1] == "total                1.27 MiB     5.06 B/element"
    meta = Adagrad([torch.nn.Parameter(torch.empty(1 << 20, 1 << 20, device="meta", dtype=BF16))], state_dtype="int8")
    assert meta.memory().per_element["sum_q8 (to come)"] == 1.0

"""``state_dtype=`` and ``rounding=``: states as they are stored, loaded, changed in place and stepped in other ways."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F16, F32, F64, WITH_SLOTS, cast
from torch import Tensor

from fusedoptim import SGD, Adagrad, AdamW, RMSprop, reference, step_in_backward

#: The second and the last can be in blocks; the last has rows that are no whole blocks.
SHAPES = [(5,), (64, 128), (), (0, 70), (30, 200)]
IN_BLOCKS = [1, 4]
#: Everything at once. Adam's maximum is not for 8 bits.
SMALLEST: dict[str, Any] = {"master": "remainder8", "state_dtype": "int8"}
MIXED: dict[str, Any] = {"master": "remainder", "state_dtype": BF16}
ROUNDED: dict[str, Any] = {"rounding": "stochastic", "state_dtype": "int8", "rounding_seed": 7}
POLICIES = {"smallest": SMALLEST, "mixed": MIXED, "rounded": ROUNDED}
CASES = [
    Case("adamw", "AdamW"),
    Case("sgd", "SGD", {"momentum": 0.9, "lr": 0.01}),
    Case("rmsprop", "RMSprop", {"centered": True, "momentum": 0.5, "lr": 1e-3}),
    Case("adagrad", "Adagrad", {"initial_accumulator_value": 0.5}),
]
ADAMW = CASES[0]


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def go(optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(params_of(optimizer), step)
        optimizer.step()


def trained(case: Case = ADAMW, dtype: torch.dtype = BF16, steps: int = 3, **options: Any) -> Any:
    optimizer = case.make(parameters(SHAPES, dtype), **options)
    go(optimizer, 0, steps)
    return optimizer


def beside(optimizer: Any, case: Case = ADAMW, **options: Any) -> Any:
    """Another one, of a model with the same weights."""
    return case.make([torch.nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], **options)


def moved(optimizer: Any) -> dict[str, Any]:
    """A state_dict as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def decoded(optimizer: Any, p: Tensor, name: str) -> Tensor:
    values = optimizer.state[p]
    if name in values:
        return values[name].float()
    kind = next(slot.kind for slot in optimizer.rule.states if slot.name == name)
    codes, scales = values[f"{name}_q8"], values[f"{name}_scale"]
    return reference.decode("q8_squares" if kind == "squares" else "q8", codes, scales)


def slots(optimizer: Any) -> list[str]:
    group = optimizer.param_groups[0]
    return [slot.name for slot in optimizer.rule.states if slot.needed_in(group)]


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


# ---- what is loaded ----


@pytest.mark.filterwarnings("ignore:states of this checkpoint were narrower")
@pytest.mark.parametrize("asked", [None, F32, BF16, "int8"], ids=str)
@pytest.mark.parametrize("saved", [F32, BF16, "int8"], ids=str)
@pytest.mark.parametrize("param", [F32, BF16], ids=str)
def test_every_storage_loads_into_every_other(param: Any, saved: Any, asked: Any) -> None:
    """To nearest. What is asked for wins; else the checkpoint's own, but that nothing is narrower than new states."""
    for case in CASES:
        a = trained(case, param, steps=1, state_dtype=saved)
        b = beside(a, case, state_dtype=asked)
        b.load_state_dict(moved(a))
        wanted = saved if asked is None else asked
        assert b.param_groups[0]["state_dtype"] == wanted
        for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
            for name in slots(a):
                assert (f"{name}_q8" in b.state[q]) == (wanted == "int8" and i in IN_BLOCKS) == (name not in b.state[q])
                x, y = decoded(a, p, name), decoded(b, q, name)
                if wanted == "int8" and i in IN_BLOCKS and saved != "int8":
                    kind = next(slot.kind for slot in b.rule.states if slot.name == name)
                    expected = reference.encode("q8_squares" if kind == "squares" else "q8", x, None)
                    assert_same_bits(b.state[q][f"{name}_q8"], expected[0])
                    assert_same_bits(b.state[q][f"{name}_scale"], expected[1])
                else:
                    stored = BF16 if wanted == "int8" and i not in IN_BLOCKS else wanted
                    assert_same_bits(y, x if stored == "int8" else x.to(stored).float())
                    assert stored == "int8" or b.state[q][name].dtype == stored
        go(b, 1, 2)


def test_states_by_name() -> None:
    a = trained(state_dtype={"exp_avg": "int8"})
    p = params_of(a)[1]
    assert set(a.state[p]) == {"step", "exp_avg_q8", "exp_avg_scale", "exp_avg_sq"}
    assert a.state[p]["exp_avg_sq"].dtype == BF16
    b = beside(a, state_dtype={"exp_avg_sq": F32})
    with pytest.warns(UserWarning, match=r"'exp_avg_sq' of parameter 0 .* from torch.bfloat16 to torch.float32, and 6"):
        b.load_state_dict(moved(a))
    assert {n: v.dtype for n, v in b.state[params_of(b)[1]].items()} == {
        "step": F32,
        "exp_avg": BF16,
        "exp_avg_sq": F32,
    }
    go(b, 3, 4)


def test_new_states_of_a_master_are_not_narrower_when_they_are_loaded() -> None:
    a = trained()
    b = beside(a, master=F32)
    with pytest.warns(UserWarning, match="widened"):
        b.load_state_dict(a.state_dict())
    assert {v.dtype for values in b.state.values() for v in values.values()} == {F32}


@pytest.mark.parametrize("saved", [F16, F64], ids=str)
def test_states_of_other_dtypes_are_encoded(saved: torch.dtype) -> None:
    a = trained(dtype=F32)
    content = cast(a.state_dict(), {"exp_avg", "exp_avg_sq"}, saved)
    b = beside(a, state_dtype="int8")
    b.load_state_dict(content)
    p, q = params_of(a)[1], params_of(b)[1]
    expected = reference.encode("q8", a.state[p]["exp_avg"].to(saved).float(), None)
    assert_same_bits(b.state[q]["exp_avg_q8"], expected[0])


def test_what_is_loaded_is_not_shared() -> None:
    """The state_dict keeps its numbers; so does an optimizer that lent its tensors to it."""
    a = trained(**SMALLEST)
    content = moved(a)
    before = copy.deepcopy(content)
    b = beside(a)
    b.load_state_dict(content)
    go(b, 3, 5)
    for k, values in before["state"].items():
        for name, value in values.items():
            assert_same_bits(content["state"][k][name], value, name)
    c = beside(a)
    c.load_state_dict(b.state_dict())
    assert all(
        c.state[q][n] is not v for p, q in zip(params_of(b), params_of(c), strict=True) for n, v in b.state[p].items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("exp_avg_scale"), r"has 'exp_avg_q8', but lacks 'exp_avg_scale'"),
        (lambda v: v.pop("exp_avg_sq_q8"), r"has 'exp_avg_sq_scale', but lacks 'exp_avg_sq_q8'"),
        (lambda v: v.update(exp_avg_scale=torch.ones(64, 2)), r"'exp_avg_scale' .* has shape \(64, 2\)"),
        (
            lambda v: v.update(exp_avg_q8=v["exp_avg_q8"].to(torch.uint8)),
            r"'exp_avg_q8' .* unsupported dtype torch.uint8",
        ),
        (lambda v: v.update(param_remainder8=torch.ones(64, 128)), r"'param_remainder8' .* unsupported dtype"),
    ],
    ids=["scales", "codes", "shape", "sign", "remainder"],
)
def test_states_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    a = trained(**SMALLEST)
    b = beside(a)
    content = copy.deepcopy(a.state_dict())
    change(content["state"][1])
    with pytest.raises(ValueError, match=message):
        b.load_state_dict(content)
    assert not b.state and "master" not in b.param_groups[0]
    change(a.state[params_of(a)[1]])
    weights = [p.detach().clone() for p in params_of(a)]
    with pytest.raises(ValueError, match=message):
        go(a, 3, 4)
    for p, before in zip(params_of(a), weights, strict=True):
        assert_same_bits(p.detach(), before)


def test_a_policy_that_these_parameters_cannot_have_is_refused() -> None:
    a = trained(**MIXED)
    b = AdamW(parameters(SHAPES, F16))
    with pytest.raises(ValueError, match=r"float16, which is no upper part .*Nothing was loaded"):
        b.load_state_dict(a.state_dict())
    c = beside(a, state_dtype="int8")
    content = copy.deepcopy(a.state_dict())
    content["param_groups"][0]["amsgrad"] = True
    with pytest.raises(
        ValueError, match=r"parameter group 0, as this checkpoint has it: .*max_exp_avg_sq.*Nothing was"
    ):
        c.load_state_dict(content)
    content["param_groups"][0].update(amsgrad=False, rounding="up")
    with pytest.raises(ValueError, match="Invalid rounding: 'up'"):
        c.load_state_dict(content)
    assert not c.state


def test_states_of_parameters_of_other_shapes_and_frozen_ones_are_carried_along() -> None:
    a = trained(**SMALLEST)
    b = beside(a)
    frozen = params_of(b)[1]
    frozen.requires_grad_(False)
    frozen.data = torch.ones(3, dtype=BF16)
    b.load_state_dict(moved(a))
    for name, value in a.state[params_of(a)[1]].items():
        assert_same_bits(b.state[frozen][name], value, name)


# ---- bitsandbytes ----


def of_bitsandbytes(optimizer: Any, block: int, wrapped: bool) -> dict[str, Any]:
    """As its optimizers save it: codes of a table, blocks of the flat tensor, small tensors in fp32."""
    content = optimizer.state_dict()
    signed = torch.cat(
        [-torch.logspace(0, -6, 127).flip(0).flip(0), torch.zeros(1), torch.logspace(-6, 0, 128)]
    ).sort()[0]
    unsigned = torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)])
    states = {}
    for k, values in content["state"].items():
        own: dict[str, Any] = {"step": int(values.get("step", torch.tensor(1.0)).item())}
        quantised: dict[str, Any] = {}
        for i, name in enumerate([s for s in slots(optimizer) if s in values][:2], 1):
            x = values[name].float()
            if x.numel() < 4096:
                quantised[f"state{i}"] = x
                continue
            table = signed if i == 1 else unsigned
            blocks = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % block)).view(-1, block)
            largest = blocks.abs().amax(1)
            nearest = (blocks / largest.clamp(min=1e-30)[:, None]).unsqueeze(2).sub(table).abs().argmin(2)
            codes = nearest.to(torch.uint8).view(-1)[: x.numel()].view(x.shape)
            quantised |= {f"state{i}": codes, f"qmap{i}": table, f"absmax{i}": largest}
        states[k] = {**own, "__bnb_optimizer_quant_state__": quantised} if wrapped else {**own, **quantised}
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "alpha": 0.0, "params": g["params"]}
        for g in content["param_groups"]
    ]
    return {"state": states, "param_groups": groups}


@pytest.mark.parametrize(("block", "wrapped"), [(256, True), (2048, False)], ids=["new", "old"])
@pytest.mark.parametrize("asked", [F32, "int8"], ids=str)
def test_checkpoints_of_bitsandbytes_load(asked: Any, block: int, wrapped: bool) -> None:
    a = trained(dtype=F32)
    b = beside(a, state_dtype=asked)
    content = of_bitsandbytes(a, block, wrapped)
    b.load_state_dict(content)
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        assert b.state[q]["step"].item() == 3
        for name in slots(a):
            x, y = a.state[p][name], decoded(b, q, name)
            if i in IN_BLOCKS:
                assert (x - y).abs().max() <= 0.1 * x.abs().max() and (x - y).norm() < 0.1 * x.norm()
            else:
                assert_same_bits(y, x.to(F32 if asked == F32 else BF16).float())
        assert not any(n.startswith(("state", "qmap", "absmax", "__bnb")) for n in b.state[q])
    assert b.param_groups[0]["betas"] == (0.9, 0.99)
    go(b, 3, 4)


def test_codes_of_bitsandbytes_mean_their_number_of_the_table_times_the_maximum_of_their_block() -> None:
    codes = torch.arange(64 * 128).remainder(256).to(torch.uint8).view(64, 128)
    table, largest = torch.linspace(-1, 1, 256), torch.arange(1.0, 33.0)
    o = SGD([torch.nn.Parameter(torch.zeros(64, 128))], momentum=0.9)
    content = o.state_dict()
    content["state"] = {0: {"step": 2, "state1": codes, "qmap1": table, "absmax1": largest}}
    o.load_state_dict(content)
    expected = table[codes.long()] * largest.repeat_interleave(256).view(64, 128)
    assert_same_bits(o.state[params_of(o)[0]]["momentum_buffer"], expected)


def test_states_of_bitsandbytes_that_cannot_be_read_are_refused() -> None:
    a = trained(dtype=F32)
    content = of_bitsandbytes(a, 256, False)
    for missing in ("qmap1", "absmax2"):
        other = copy.deepcopy(content)
        del other["state"][1][missing]
        with pytest.raises(ValueError, match=r"codes of bitsandbytes .* optim_bits=32"):
            beside(a).load_state_dict(other)
    other = copy.deepcopy(content)
    other["state"][1]["absmax1"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"codes of bitsandbytes"):
        beside(a).load_state_dict(other)
    with pytest.raises(ValueError, match=r"bitsandbytes that has 2 states"):
        RMSprop(parameters(SHAPES)).load_state_dict(content)
    for values in content["state"].values():
        values.pop("state2")
    with pytest.raises(ValueError, match=r"bitsandbytes that has 1 states"):
        beside(a).load_state_dict(content)


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


def test_values_that_no_group_can_have_are_refused_at_the_step() -> None:
    a = trained(**MIXED)
    for key, value in (
        ("master", "half"),
        ("state_dtype", F16),
        ("rounding", {"exp": "nearest"}),
        ("rounding_seed", -1),
    ):
        before = a.param_groups[0].get(key)
        a.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"parameter group 0.*{key}"):
            go(a, 3, 4)
        a.param_groups[0].pop(key)
        if before is not None:
            a.param_groups[0][key] = before
    go(a, 3, 4)


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
    o = trained(CASES[1], **MIXED)
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

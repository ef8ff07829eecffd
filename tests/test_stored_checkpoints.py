"""Checkpoints that load into states as they are stored here: of other policies, of torch.optim and of bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, parameters
from checkpoints import BF16, F16, F32, F64, cast
from policies import (
    CASES,
    IN_BLOCKS,
    MIXED,
    SGD,
    SHAPES,
    SMALLEST,
    beside,
    decoded,
    go,
    moved,
    params_of,
    slots,
    storage_in_blocks,
    trained,
)

from fusedoptim import AdamW, RMSprop, reference


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
                    expected = reference.encode(storage_in_blocks(b, name), x, None)
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
    o = SGD.make([torch.nn.Parameter(torch.zeros(64, 128))])
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

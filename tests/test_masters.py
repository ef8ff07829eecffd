"""``master=``: the fp32 numbers that 16-bit parameters stand for, loaded, written to, changed and reset."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F16, F32
from torch import Tensor

import fusedoptim
from fusedoptim import SGD, AdamW, reference

SHAPES = [(5,), (33, 65), (), (0, 3), (40, 128)]
KINDS: list[Any] = ["remainder", "remainder8", F32]
STATES: dict[Any, str] = {"remainder": "param_remainder", "remainder8": "param_remainder8", F32: "master"}


def storage(master: Any, dtype: torch.dtype = BF16) -> str:
    return ("bf16_" if dtype == BF16 else "f16_") + {F32: "master"}.get(master, master)


def numbers(optimizer: Any) -> list[Tensor]:
    """What the parameters stand for."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            extra = optimizer.state[p][STATES[group["master"]]]
            found.append(reference.decode(storage(group["master"], p.dtype), p.detach(), extra))
    return found


def trained(master: Any, steps: int = 3, dtype: torch.dtype = BF16, **options: Any) -> tuple[Any, list[Any]]:
    params = parameters(SHAPES, dtype)
    optimizer = AdamW(params, lr=1e-3, master=master, state_dtype=F32, **options)
    go(optimizer, 0, steps)
    return optimizer, params


def go(optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def moved(optimizer: Any, params: Any) -> dict[str, Any]:
    """A state_dict as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def like(params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# ---- checkpoints ----


@pytest.mark.parametrize("how", ["file", "deepcopy"])
@pytest.mark.parametrize("master", KINDS, ids=str)
def test_a_run_goes_on_with_the_same_bits(master: Any, how: str) -> None:
    a, params = trained(master)
    if how == "deepcopy":
        b = copy.deepcopy(a)
    else:
        b = AdamW(like(params), master=master, state_dtype=F32)
        b.load_state_dict(moved(a, params))
    for o in (a, b):
        go(o, 3, 6)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("asked", KINDS, ids=str)
@pytest.mark.parametrize("saved", KINDS, ids=str)
def test_one_kind_loads_into_another(saved: Any, asked: Any) -> None:
    a, params = trained(saved)
    b = AdamW(like(params), master=asked, state_dtype=F32)
    b.load_state_dict(moved(a, params))
    assert b.param_groups[0]["master"] == asked
    assert all(STATES[k] not in values for values in b.state.values() for k in KINDS if k != asked)
    lost = 2.0**-15 if asked == "remainder8" else 2.0**-23 if saved != asked else 0.0
    for x, y, p, q in zip(numbers(a), numbers(b), params, b.param_groups[0]["params"], strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert torch.allclose(x, y, rtol=lost, atol=0)
    go(b, 3, 4)


def test_an_optimizer_without_a_policy_takes_over_the_checkpoints() -> None:
    a, params = trained("remainder")
    b = AdamW(like(params))
    b.load_state_dict(a.state_dict())
    for o in (a, b):
        go(o, 3, 5)
    assert_same_optimizers(a, b)
    assert b.param_groups[0]["master"] == "remainder" and b.param_groups[0]["state_dtype"] == F32


def test_a_master_that_is_asked_for_ends_what_the_checkpoint_says_of_rounding_parameters() -> None:
    a, params = trained(None, rounding={"param": "stochastic", "exp_avg_sq": "nearest"})
    b = AdamW(like(params), master="remainder", state_dtype=F32)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["rounding"] == {"exp_avg_sq": "nearest"}
    go(b, 3, 4)


def test_what_others_rounded_to_even_is_split_within_one_unit_of_the_remainder() -> None:
    """A tie that was rounded towards zero has no remainder of 16 bits."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F800001, 0x3F80FFFF, -0x407F8000, 0x00008000, 0x7F7F8000, 0x7F800000]
    )
    master = bits.to(torch.int32).view(F32)
    for kind, unit in (("remainder", 1), ("remainder8", 256)):
        p = torch.nn.Parameter(master.to(BF16))
        o = AdamW([p], master=kind)
        zeros = torch.zeros(8)
        o.load_state_dict(
            {**o.state_dict(), "state": {0: {"step": 1, "exp_avg": zeros, "exp_avg_sq": zeros, "master": master}}}
        )
        assert (numbers(o)[0].view(torch.int32) - master.view(torch.int32)).abs().max() <= unit


def doubtful(values: list[float], p_values: list[float], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    p = torch.nn.Parameter(torch.tensor(p_values, dtype=dtype))
    o = AdamW([p], master=F32)
    z = torch.zeros(len(values))
    return o, {
        **o.state_dict(),
        "state": {0: {"step": 3, "exp_avg": z, "exp_avg_sq": z, "master": torch.tensor(values)}},
    }


@pytest.mark.parametrize(
    ("dtype", "of_master", "of_p"),
    [
        (BF16, 1 + 2.0**-8, 1.0),  # a tie, to even
        (BF16, 1 + 2.0**-8, 1 + 2.0**-7),  # the same, away from zero
        (BF16, 1 + 2.0**-8 - 2.0**-23, 1.0),
        (BF16, 0.0, -0.0),
        (BF16, float("nan"), float("nan")),
        (BF16, -float("inf"), -float("inf")),
        (F16, 1 + 2.0**-12, 1.0),
    ],
    ids=str,
)
def test_a_master_that_was_rounded_to_its_parameter_loads(dtype: Any, of_master: float, of_p: float) -> None:
    o, content = doubtful([1.0, of_master], [1.0, of_p], dtype)
    o.load_state_dict(content)
    assert len(o.state) == 1


@pytest.mark.parametrize(
    ("dtype", "of_master", "of_p"),
    [
        (BF16, 1 + 2.0**-8 + 2.0**-23, 1.0),
        (BF16, 1 + 2.0**-8 - 2.0**-23, 1 + 2.0**-7),
        (BF16, 0.0, 1e-30),
        (BF16, float("nan"), 1.0),
        (BF16, 1.0, float("nan")),
        (BF16, float("inf"), 3e38),
        (BF16, float("inf"), -float("inf")),
        (F16, 1 + 2.0**-10, 1.0),
    ],
    ids=str,
)
def test_a_master_of_another_step_is_refused(dtype: Any, of_master: float, of_p: float) -> None:
    o, content = doubtful([1.0, of_master], [1.0, of_p], dtype)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0.*1 of 2 elements.*Load the model first.*reset_master"
    ):
        o.load_state_dict(content)
    assert not o.state and o.param_groups[0]["master"] == F32


def test_a_model_and_an_optimizer_of_different_steps() -> None:
    """The optimizer is loaded before the model; then after it."""
    a, params = trained(F32)
    fresh = parameters(SHAPES, BF16)
    b = AdamW([(f"layer.{i}", p) for i, p in enumerate(fresh)], master="remainder")
    content = moved(a, params)
    with pytest.raises(ValueError, match=r"parameter 0 'layer\.0' of group 0"):
        b.load_state_dict(content)
    assert not b.state
    for p, q in zip(fresh, params, strict=True):
        p.data.copy_(q)
    b.load_state_dict(content)
    go(b, 3, 4)


def test_older_checkpoints_have_none_and_go_on_from_the_parameters() -> None:
    a, params = trained(None)
    for master in KINDS:
        b = AdamW(like(params), master=master, state_dtype=F32)
        b.load_state_dict(a.state_dict())
        assert all(STATES[master] not in values for values in b.state.values())
        go(b, 3, 4)
        assert all(STATES[master] in values for values in b.state.values())


# ---- writing to parameters ----


@pytest.mark.parametrize("master", KINDS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_written_to_a_parameter_is_its_new_number(backend: str, master: Any) -> None:
    """Off by less than a unit in its last place with a remainder; a zero stays one, whatever was left."""
    o, params = trained(master, backend=backend)
    one, two, three = params[0], params[1], params[4]
    with torch.no_grad():
        one.zero_()
        two.data = torch.full_like(two, 0.75)
        three.copy_(torch.full_like(three, -3.0))
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in o.param_groups:
        group["lr"] = 0.0
    o.step()
    found = numbers(o)
    assert (found[0] == 0).all() or (found[0].abs() < 1e-38).all()
    for x, value in ((found[1], 0.75), (found[4], -3.0)):
        assert torch.allclose(x, torch.full_like(x, value), rtol=2.0**-8, atol=0)
        assert x.isfinite().all()


@pytest.mark.parametrize("master", KINDS, ids=str)
def test_reset_master_takes_the_parameters_as_they_are(master: Any) -> None:
    o, params = trained(master)
    addresses = [o.state[p][STATES[master]].data_ptr() for p in params]
    versions = [o.state[p][STATES[master]]._version for p in params]
    with torch.no_grad():
        params[1].mul_(0.5)
    o.reset_master()
    for x, p in zip(numbers(o), params, strict=True):
        assert_same_bits(x, p.detach().float())
    assert addresses == [o.state[p][STATES[master]].data_ptr() for p in params]
    assert all(o.state[p][STATES[master]]._version > v for p, v in zip(params, versions, strict=True))
    b = AdamW(like(params), master=F32)
    b.load_state_dict(o.state_dict())
    go(o, 3, 4)


def test_reset_master_where_there_is_nothing_to_reset() -> None:
    params = parameters(SHAPES, BF16)
    o = AdamW(params, master="remainder")
    o.reset_master()
    assert not o.state
    plain = SGD(parameters([(3,)]), momentum=0.9)
    go(plain, 0, 1)
    before = copy.deepcopy(plain.state_dict())
    plain.reset_master()
    assert str(before) == str(plain.state_dict())


def test_reset_master_leaves_a_loaded_state_dict_alone() -> None:
    params = [torch.nn.Parameter(torch.rand(256, 256).to(BF16))]
    a = AdamW(params, master="remainder")
    go(a, 0, 2)
    content = moved(a, params)
    expected = content["state"][0]["param_remainder"].clone()
    b = AdamW(like(params), master="remainder")
    b.load_state_dict(content)
    b.reset_master()
    assert_same_bits(content["state"][0]["param_remainder"], expected)
    assert not b.state[b.param_groups[0]["params"][0]]["param_remainder"].any()


def test_reset_master_within_averages_is_refused() -> None:
    o, _ = trained("remainder", ema_decay=0.5)
    with o.ema_weights(), pytest.raises(RuntimeError, match=r"within ema_weights\(\)"):
        o.reset_master()


# ---- changes of groups and parameters ----


@pytest.mark.parametrize("second", [*KINDS, None], ids=str)
@pytest.mark.parametrize("first", [*KINDS, None], ids=str)
def test_a_group_changes_its_master_between_steps(first: Any, second: Any) -> None:
    """As a checkpoint loaded into the other kind does."""
    o, params = trained(first)
    twin = AdamW(like(params), lr=1e-3, master=second, state_dtype=F32)
    twin.load_state_dict(o.state_dict())
    for opt in (o, twin):
        if second is None:
            opt.param_groups[0].pop("master", None)
        else:
            opt.param_groups[0]["master"] = second
    for opt in (o, twin):
        go(opt, 3, 5)
    assert_same_optimizers(o, twin)
    there = {STATES[k] for k in KINDS} & set().union(*o.state.values())
    assert there == ({STATES[second]} if second else set())


def test_a_remainder_of_before_is_no_longer_known() -> None:
    o, params = trained("remainder", 2)
    o.param_groups[0]["master"] = "remainder8"
    go(o, 2, 3)
    del o.param_groups[0]["master"]
    go(o, 3, 4)
    o.param_groups[0]["master"] = F32
    before = [p.detach().float() for p in params]
    o.param_groups[0]["lr"] = 0.0
    go(o, 4, 5)
    for x, y in zip(numbers(o), before, strict=True):
        assert_same_bits(x, y)


def test_a_step_that_fails_leaves_the_masters_as_they_were() -> None:
    o, params = trained("remainder")
    before = copy.deepcopy(o.state_dict())
    o.param_groups[0]["master"] = F32
    set_gradients(params, 3)
    params[-1].grad = torch.zeros(40, 128, dtype=BF16).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        o.step()
    del o.param_groups[0]["master"]
    assert list(o.state[params[0]]) == list(before["state"][0])
    for i, p in enumerate(params):
        for name, value in before["state"][i].items():
            assert_same_bits(o.state[p][name], value, name)


@pytest.mark.parametrize("master", KINDS, ids=str)
def test_a_model_that_changes_its_dtype(master: Any) -> None:
    """To fp32 it goes on from what the parameters show; back without a step in between, nothing is lost."""
    model = torch.nn.Linear(64, 64).to(BF16)
    o = AdamW(model.parameters(), lr=1e-3, master=master)
    go(o, 0, 2)
    kept = numbers(o)
    model.float()
    model.bfloat16()
    for x, y in zip(kept, numbers(o), strict=True):
        assert_same_bits(x, y)
    model.float()
    go(o, 2, 3)
    assert not {STATES[k] for k in KINDS} & set().union(*o.state.values())
    model.bfloat16()
    before = [p.detach().float() for p in model.parameters()]
    o.param_groups[0]["lr"] = 0.0
    go(o, 3, 4)
    for x, y in zip(before, numbers(o), strict=True):
        assert_same_bits(x, y)
    model.half()
    if master == F32:
        go(o, 4, 5)
    else:
        with pytest.raises(
            ValueError, match=r"float16, which is no upper part of a float32: use master=torch\.float32"
        ):
            go(o, 4, 5)


def test_groups_of_different_kinds_side_by_side() -> None:
    options: list[Any] = [{"master": k, "state_dtype": F32} for k in KINDS]
    options += [{}, {"rounding": {"param": "stochastic"}}, {"master": None}]
    alone = []
    for i, own in enumerate(options):
        o = AdamW([{"params": parameters([(5,), (64, 65)], BF16, i), **own}], lr=1e-2)
        alone.append(o)
    first, *rest = ({"params": parameters([(5,), (64, 65)], BF16, i), **own} for i, own in enumerate(options))
    together = AdamW([first], lr=1e-2)
    for group in rest:
        together.add_param_group(group)
    for step in range(3):
        for o in alone:
            go(o, step, step + 1)
        for group in together.param_groups:
            set_gradients(group["params"], step)
        together.step()
    for k, o in enumerate(alone):
        if k == 4:  # whose random bits are by number
            continue
        for p, q in zip(o.param_groups[0]["params"], together.param_groups[k]["params"], strict=True):
            assert_same_bits(p.detach(), q.detach())
            for name, value in o.state[p].items():
                assert_same_bits(value, together.state[q][name], name)
    assert "master" not in together.param_groups[5]


def test_a_group_that_is_added_is_checked_first() -> None:
    o = AdamW(parameters([(5,)], BF16), master="remainder")
    with pytest.raises(ValueError, match="Invalid master: 'half'"):
        o.add_param_group({"params": parameters([(6,)], BF16), "master": "half"})
    with pytest.raises(ValueError, match="do not go together"):
        o.add_param_group({"params": parameters([(6,)], BF16), "rounding": {"param": "stochastic"}})
    assert len(o.param_groups) == 1


@pytest.mark.parametrize("master", KINDS, ids=str)
def test_parameters_in_other_memory_orders(master: Any) -> None:
    def build(flip: bool) -> tuple[Any, Any]:
        w = torch.rand(8, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(BF16)
        p = torch.nn.Parameter(w.contiguous(memory_format=torch.channels_last) if flip else w)
        return fusedoptim.AdamW([p], master=master, lr=0.1), p

    a, p = build(False)
    b, q = build(True)
    for step in range(3):
        set_gradients([p], step)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    c, r = build(True)
    r.data.copy_(p.data)
    c.load_state_dict(a.state_dict())
    for o, x in ((a, p), (b, q), (c, r)):
        x.grad = torch.ones_like(p)
        o.step()
    for x in (q, r):
        assert_same_bits(p.detach(), x.detach().contiguous())
    assert b.state[q][STATES[master]].stride() == q.stride() == c.state[r][STATES[master]].stride()

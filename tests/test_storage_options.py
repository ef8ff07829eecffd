"""``master=``, ``state_dtype=``, ``rounding=`` and ``rounding_seed=`` as they are given and changed: what is taken for
what, and what is refused."""

from __future__ import annotations

import copy
import cProfile
import math
import pstats
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKEND, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import BF16, F16, F32
from policies import MIXED, SHAPES, beside, go, moved, params_of, trained

from fusedoptim import AdamW, RMSprop


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_dict_that_says_nothing_is_no_option(dtype: torch.dtype) -> None:
    """Second moments are not rounded stochastically either."""
    options: list[dict[str, Any]] = [
        {"state_dtype": {}},
        {"rounding": {}, "state_dtype": {"exp_avg": None}},
        {"rounding": {"exp_avg_sq": "auto"}},
    ]
    for own in options:
        plain, a, b = trained(dtype=dtype), trained(dtype=dtype, **own), trained(dtype=dtype, steps=0)
        b.param_groups[0].update(own)
        go(b, 0, 3)
        for o in (a, b):
            assert_same_optimizers(plain, o)
            assert o.state_dict()["param_groups"] == plain.state_dict()["param_groups"] or o is b
        assert a.param_groups[0].keys() == plain.param_groups[0].keys()


def test_a_group_without_an_option_is_asked_once_how_it_is_stored() -> None:
    """And not for each of its parameters, of which there may be thousands."""

    def asked(n: int) -> int:
        o = AdamW(parameters([(3,)] * n))
        set_gradients(params_of(o), 0)
        with cProfile.Profile() as profile:
            o.step()
        found = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        return sum(calls for (file, _, _), (calls, *_) in found if Path(file).name in ("_storage.py", "_blocks.py"))

    assert 0 < asked(4) == asked(8)


@pytest.mark.parametrize("name", ["{}", "torch.{}"])
def test_dtypes_can_be_given_as_texts(name: str) -> None:
    spelled = [
        {"master": name.format("float32"), "state_dtype": name.format("bfloat16")},
        {"state_dtype": {"exp_avg": name.format("bfloat16"), "exp_avg_sq": name.format("float32")}},
    ]
    for texts, own in zip(
        spelled,
        [{"master": F32, "state_dtype": BF16}, {"state_dtype": {"exp_avg": BF16, "exp_avg_sq": F32}}],
        strict=True,
    ):
        a, b, c = trained(**own), trained(**texts), AdamW([{"params": parameters(SHAPES, BF16), **texts}], lr=1e-3)
        assert {k: a.param_groups[0][k] for k in own} == {k: b.param_groups[0][k] for k in own}
        assert {k: a.param_groups[0][k] for k in own} == {k: c.param_groups[0][k] for k in own}
        assert_same_optimizers(a, b)


def test_a_seed_of_another_library_is_read_back() -> None:
    a = trained(**MIXED, rounding_seed=np.int64(3))
    assert type(a.param_groups[0]["rounding_seed"]) is int
    a.param_groups[0]["rounding_seed"] = np.uint8(4)
    content = moved(a)
    assert type(content["param_groups"][0]["rounding_seed"]) is int
    b = beside(a)
    b.load_state_dict(content)
    for o in (a, b):
        go(o, 3, 5)
    assert_same_optimizers(a, b)


ODD = {
    "array": np.array([1.0, 2.0]),
    "number": np.array(1.0),
    "list": [F32],
    "complex": torch.complex64,
    "object": object(),
    "bits": 8,
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("key", ["master", "state_dtype", "rounding"])
def test_odd_values_are_refused_in_words(key: str, value: Any) -> None:
    a = trained(**MIXED)
    for wrong in (value, {"exp_avg": value}) if key != "master" else (value,):
        with pytest.raises(ValueError, match=f"^Invalid {key}"):
            RMSprop(parameters(SHAPES, BF16), centered=True, **{key: wrong})
        with pytest.raises(ValueError, match=f"^Invalid {key}"):
            a.add_param_group({"params": parameters([(2,)], BF16), key: wrong})
        for backend in ("cpu", "reference"):
            b = trained(backend=backend, **{**MIXED, "rounding": "stochastic", "master": None})
            b.param_groups[0][key] = wrong
            with pytest.raises(ValueError, match=f"parameter group 0: Invalid {key}"):
                go(b, 3, 4)


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_seeds_that_no_group_can_have_are_refused_at_the_step(backend: str) -> None:
    """Though a double, which a step computes with, would have some other number for them."""
    a = trained(**MIXED, backend=backend)
    before = [p.detach().clone() for p in params_of(a)]
    wrong: list[Any] = [1.5, None, True, -1, 2**53, 2**53 + 1, 2**64, 2**2000, "1", torch.tensor(1.5), math.nan]
    for seed in wrong:
        a.param_groups[0]["rounding_seed"] = seed
        text = "a number" if seed is None or isinstance(seed, str) else r"a whole number from 0 to 2\*\*53 - 1"
        with pytest.raises(ValueError, match=f"group 0: 'rounding_seed' is .* must be {text}"):
            go(a, 3, 4)
        with pytest.raises(ValueError, match=f"Invalid rounding_seed: .* must be {text}"):
            AdamW(parameters(SHAPES, BF16), rounding_seed=seed)
    for p, q in zip(params_of(a), before, strict=True):
        assert_same_bits(p.detach(), q)
    results = []
    for seed in (2**53 - 1, np.int64(2**53 - 1), 2**53 - 2):
        b = copy.deepcopy(a)
        b.param_groups[0]["rounding_seed"] = seed
        go(b, 3, 4)
        results.append(torch.cat([b.state[p]["exp_avg_sq"].flatten() for p in params_of(b)]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_options_that_are_equal_make_no_new_plan() -> None:
    """Whether they are the same objects or not: texts, and any kind of dict."""
    (p,) = parameters([(5, 6)], BF16)
    optimizer = AdamW([p], state_dtype=OrderedDict(exp_avg=F32))
    group = optimizer.param_groups[0]
    same = {"state_dtype": OrderedDict(exp_avg=F32), "rounding": "".join(["au", "to"])}
    for step, change in enumerate(({"rounding": "auto"}, same, {"rounding": "nearest"})):
        group.update(change)
        set_gradients([p], step)
        runners = optimizer._runners
        optimizer.step()
        assert step == 0 or (optimizer._runners is runners) == (step == 1) or BACKEND == "reference"

"""The options of a step beyond its bits: averages in use, checkpoints, memory, errors."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, FULL, SHAPES, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients

import fusedoptim
from fusedoptim._native_runner import NativeRunner

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_the_average_starts_as_the_parameter_before_the_first_step() -> None:
    """Not as it was when the optimizer was made."""
    for case in FULL:
        params = parameters([(7,)])
        optimizer = case.make(params, ema_decay=0.75)
        with torch.no_grad():
            params[0].fill_(2.0)
        set_gradients(params, 0)
        optimizer.step()
        expected = torch.full((7,), 2.0).lerp_(params[0].detach(), 0.25)
        assert_same_bits(optimizer.state[params[0]]["ema"], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_in_the_parameters_place(dtype: torch.dtype) -> None:
    params = parameters([(7,), (3, 5)], dtype)
    groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": None}]
    optimizer = fusedoptim.SGD(groups, lr=1.0, ema_decay=0.5)
    with pytest.raises(RuntimeError, match="take a step first"), optimizer.ema_weights():
        pass
    set_gradients(params, 0)
    optimizer.step()
    own = [p.detach().clone() for p in params]
    where = [p.data_ptr() for p in params]
    with pytest.raises(KeyError), optimizer.ema_weights():
        assert_same_bits(params[0].detach(), optimizer.state[params[0]]["ema"].to(dtype))
        assert not torch.equal(params[0].detach(), own[0])
        assert_same_bits(params[1].detach(), own[1])
        with pytest.raises(RuntimeError, match="step after it"):
            optimizer.step(lambda: pytest.fail("the closure ran"))
        with pytest.raises(RuntimeError, match="active already"), optimizer.ema_weights():
            pass
        raise KeyError
    assert where == [p.data_ptr() for p in params]
    for p, q in zip(params, own, strict=True):
        assert_same_bits(p.detach(), q)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = None
    with pytest.raises(RuntimeError, match="no moving averages"), optimizer.ema_weights():
        pass


@pytest.mark.parametrize("case", FULL, ids=str)
def test_checkpoints_and_copies(case: Case) -> None:
    """With averages and options; also through torch.optim, which has neither."""
    mine, theirs = parameters([(5,), (40,)]), parameters([(5,), (40,)])
    a = case.make(mine, **ALL)
    for step in range(3):
        set_gradients(mine, step)
        a.step()
    for p, q in zip(theirs, mine, strict=True):
        p.data.copy_(q)
    b = case.make(theirs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    b._options.update(a._options)
    assert b.param_groups[0]["max_grad_norm"] == 0.5
    for step in range(3, 6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)
    c = copy.deepcopy(a)
    assert c._options == a._options and c._step_supports_amp_scaling
    if case.in_torch:
        stock = case.make_torch(parameters([(5,), (40,)]))
        stock.load_state_dict(a.state_dict())
        a.load_state_dict(stock.state_dict())
        set_gradients(mine, 6)
        a.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
        ({"max_grad_norm": math.nan}, "Invalid max_grad_norm: nan"),
        ({"clip_grad_value": -1.0}, "Invalid clip_grad_value: -1.0"),
        ({"ema_decay": 1.0}, "Invalid ema_decay: 1.0"),
        ({"ema_decay": -0.1}, "Invalid ema_decay: -0.1"),
        ({"state_dtype": torch.int8}, "Invalid state_dtype"),
    ],
    ids=str,
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    for case in FULL:
        with pytest.raises(ValueError, match=message):
            case.make(parameters([(3,)]), **options)
        if "state_dtype" in options:
            continue
        params = parameters([(3,)])
        optimizer = case.make(params)
        set_gradients(params, 0)
        optimizer.step()
        optimizer.param_groups[0].update(options)
        before = params[0].detach().clone()
        ((key, value),) = options.items()
        shown = "NaN" if math.isnan(value) else value
        with pytest.raises(ValueError, match=f"parameter group 0: '{key}' is {shown}, but must be"):
            optimizer.step()
        assert_same_bits(params[0].detach(), before)
        with pytest.raises(ValueError, match=message):
            case.make([{"params": parameters([(3,)]), **options}])


@pytest.mark.parametrize(
    ("name", "argument", "meant"),
    [
        ("Adam", "beta1", "betas"),
        ("AdamW", "beta2", "betas"),
        ("NormAdaptive", "betas", "beta"),
        ("SGD", "learning_rate", "lr"),
        ("RMSprop", "epsilon", "eps"),
        ("Adagrad", "wd", "weight_decay"),
        ("AdamW", "max_norm", "max_grad_norm"),
        ("AdamW", "decoupled_weight_decay", "weight_decay"),  # of Adam, which AdamW calls
        ("SGD", "betas", None),
        ("RMSprop", "beta1", None),
    ],
)
def test_unknown_arguments_are_refused_and_the_right_one_is_named(name: str, argument: str, meant: str | None) -> None:
    """Subclasses with arguments of their own name those, too."""
    base = getattr(fusedoptim, name)

    class Own(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, lr: float = 0.1, warmup: int = 3, **more: Any) -> None:
            super().__init__(params, lr, **more)

    hint = f"; did you mean {meant!r}\\?" if meant else r"\."
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{argument}'{hint} It takes p"
    ):
        base(parameters([(3,)]), **{argument: 1.0})
    with pytest.raises(TypeError, match=r"'warmups'; did you mean 'warmup'\?.*takes.* lr.*; and every.*max_grad_norm"):
        Own(parameters([(3,)]), warmups=3)


def test_averages_follow_their_parameters_dtype() -> None:
    """torch.optim keeps a loaded average in the parameter's dtype; model.double() leaves states as they were."""
    params, others = parameters([(30,)], torch.bfloat16), parameters([(30,)], torch.bfloat16)
    a = fusedoptim.Adam(params, ema_decay=0.9)
    set_gradients(params, 0)
    a.step()
    stock = torch.optim.Adam(others)
    stock.load_state_dict(a.state_dict())
    assert stock.state[others[0]]["ema"].dtype == torch.bfloat16
    a.load_state_dict(stock.state_dict())
    assert a.state[params[0]]["ema"].dtype == torch.float32
    set_gradients(params, 1)
    a.step()
    params[0].data = params[0].data.double()
    params[0].grad = None
    set_gradients(params, 2)
    before = a.state[params[0]]["ema"].double()
    a.step()
    assert_same_bits(a.state[params[0]]["ema"], before.lerp_(params[0].detach(), 1 - 0.9))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_that_share_memory_are_not_zeroed(backend: str | None) -> None:
    """Who reads second would read zeros. Also if they come to share it later."""
    a, b = parameters([(4,), (4,)])
    optimizer = fusedoptim.SGD([a, b], lr=1.0, zero_grad_in_step=True, **({"backend": backend} if backend else {}))

    def refused(match: str) -> None:
        before = a.detach().clone(), b.detach().clone(), a.grad.clone()
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        for now, then in zip((a.detach(), b.detach(), a.grad), before, strict=True):
            assert_same_bits(now, then)

    for _ in range(2):
        a.grad = b.grad = torch.ones(4)
        refused("the gradient of parameter 1 .* shares memory with the gradient of parameter 0")
        a.grad, b.grad = torch.ones(1).expand(4), torch.ones(4)
        refused("gradient with elements that share memory")
        a.grad = a.detach()
        refused("shares memory with")
        a.grad, b.grad = torch.ones(4), torch.ones(4)
        for _ in range(3):
            optimizer.step()
            assert not a.grad.any() and not b.grad.any()


def test_autograd_notices_zeroed_gradients() -> None:
    a, b = parameters([(4,), (4,)])
    a.grad = torch.ones(4)
    optimizer = fusedoptim.SGD([a], zero_grad_in_step=True)
    loss = (b * a.grad).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_let_go_of_after_a_step() -> None:
    a = parameters([(4,)])[0]
    optimizer = fusedoptim.SGD([a], zero_grad_in_step=True)
    for _ in range(3):
        a.grad = torch.ones(4)
        optimizer.step()
    gone = weakref.ref(a.grad)
    a.grad = None
    assert gone() is None


def test_options_of_all_groups_are_refused_in_one() -> None:
    values = {"zero_grad_in_step": True, "skip_nonfinite": True, "backend": "cpu"}
    for name, value in values.items():
        with pytest.raises(ValueError, match=f"a group cannot have its own {name}"):
            fusedoptim.SGD([{"params": parameters([(3,)]), name: value}])
        # A wrapper, as ZeroRedundancyOptimizer is one, may repeat in every group what the optimizer was made with.
        optimizer = fusedoptim.SGD([{"params": parameters([(3,)]), name: value}], **{name: value})
        assert name not in optimizer.param_groups[0]


def test_a_checkpoint_with_averages_is_still_told_from_anothers() -> None:
    params = parameters([(4,)])
    adam = fusedoptim.Adam(params, ema_decay=0.9)
    set_gradients(params, 0)
    adam.step()
    with pytest.raises(ValueError, match="not one of SGD"):
        fusedoptim.SGD(params, momentum=0.9).load_state_dict(adam.state_dict())


def test_numbers_may_be_tensors() -> None:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    options = {
        "max_grad_norm": torch.tensor(0.3),
        "clip_grad_value": torch.tensor(0.01),
        "ema_decay": torch.tensor(0.7),
    }
    a, b = fusedoptim.AdamW(mine, **options), fusedoptim.AdamW(theirs, backend="reference", **options)
    for step in range(4):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def test_parameters_that_were_moved_take_the_count_along() -> None:
    """As if they had been on another device before."""
    params = parameters([(3,)])
    optimizer = fusedoptim.Adam(params, skip_nonfinite=True)
    optimizer._norms.by_device = {torch.device("meta"): torch.tensor([math.nan, 3.0], dtype=torch.float64)}
    set_gradients(params, 0)
    for _ in range(2):
        optimizer.step()
    assert optimizer.skipped_steps.item() == 3 and optimizer.last_grad_norm.isfinite()
    assert optimizer.state[params[0]]["step"].item() == 2


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "copy": copy.copy,  # with the same parameters and states, as torch has it
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_copy_has_a_norm_and_a_count_of_its_own(case: Case, how: str, backend: str) -> None:
    params = parameters([(5,), (3, 4)])
    optimizer = case.make(params, backend=backend, skip_nonfinite=True)

    def step(o: Any, value: float) -> None:
        for p in (p for group in o.param_groups for p in group["params"]):
            p.grad = torch.full_like(p, value)
        o.step()

    step(optimizer, 2.0)
    step(optimizer, math.inf)
    step(optimizer, 3.0)
    norm = optimizer.last_grad_norm
    assert norm == pytest.approx(3 * math.sqrt(17)) and optimizer.skipped_steps == 1
    copied = COPIES[how](optimizer)
    assert copied.skipped_steps == 0
    for value, skipped in ((math.inf, 1), (5.0, 1), (math.nan, 2)):
        step(copied, value)
        assert copied.skipped_steps == skipped
        assert optimizer.last_grad_norm == norm and optimizer.skipped_steps == 1
    step(optimizer, math.inf)
    step(optimizer, 7.0)
    assert optimizer.last_grad_norm == pytest.approx(7 * math.sqrt(17)) and optimizer.skipped_steps == 2
    assert copied.last_grad_norm.isnan() and copied.skipped_steps == 2


def test_no_gradients_at_all() -> None:
    optimizer = fusedoptim.Adam(parameters([(3,)]), **ALL)
    assert optimizer.last_grad_norm is None
    optimizer.step()
    assert optimizer.last_grad_norm.item() == 0.0 and not optimizer.state
    optimizer = fusedoptim.Adam([{"params": [], "max_grad_norm": 1.0}, {"params": parameters([(3,)])}])
    optimizer.step()
    assert optimizer.last_grad_norm is None


def test_new_gradients_make_no_new_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is compared with all other; only where ranges meet is every element looked at."""
    params = parameters([(5,), (40, 3), (7, 2, 3, 1)])
    optimizer = fusedoptim.Adam(params, zero_grad_in_step=True)
    built: list[object] = []
    build = NativeRunner.build
    monkeypatch.setattr(NativeRunner, "build", lambda *args: (built.append(args), build(*args)))
    for step in range(5):
        set_gradients(params, step)
        if step == 3:  # a dimension of size 1 may have any stride
            params[2].grad = params[2].grad.as_strided((7, 2, 3, 1), (6, 3, 1, 99))
        optimizer.step()
    assert len(built) == 1
    memory = torch.ones(10)
    params[0].grad, params[1].grad = memory[::2], torch.ones(40, 3)
    optimizer.step()
    assert memory.sum() == 5 and len(built) == 2
    params[0].grad = params[1].grad.view(-1)[3:8]
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()

"""What a step does around its rule, against the same operations as separate calls, in sequence: bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    BY_NAME,
    CAPABILITIES,
    FULL,
    IN_TORCH,
    SHAPES,
    Case,
    assert_same_bits,
    assert_same_optimizers,
    gradient,
    parameters,
    set_gradients,
)

import fusedoptim
from benchmarks.witness import ieee_sqrt
from fusedoptim._runners import CompiledRunner

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALL: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "clip_grad_value": 0.01,
    "ema_decay": 0.9,
    "zero_grad_in_step": True,
    "skip_nonfinite": True,
}


class Separately:
    """An optimizer without options, with a call of torch's for each option instead. Gradients are fp32 copies, which
    clipping rounds as the step does."""

    def __init__(self, case: Case, params: list, options: dict[str, Any], make: Callable[..., Any]) -> None:
        self.params, self.options = params, options
        self.optimizer = make(params)
        self.ema: dict[torch.Tensor, torch.Tensor] = {}

    def step(self) -> None:
        o, grads = self.options, [p.grad for p in self.params]
        if "max_grad_norm" in o or "skip_nonfinite" in o:
            self.norm = fusedoptim.clip_grad_norm_(self.params, math.inf)
            if "skip_nonfinite" in o and not self.norm.isfinite():
                torch._foreach_zero_(grads) if "zero_grad_in_step" in o else None
                return
        if "max_grad_norm" in o:
            torch.nn.utils.clip_grads_with_norm_(self.params, o["max_grad_norm"], self.norm)
        if "clip_grad_value" in o:
            torch.nn.utils.clip_grad_value_(self.params, o["clip_grad_value"])
        for p in self.params if "ema_decay" in o else []:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            if p not in self.ema:
                self.ema[p] = p.detach().to(wide, copy=True)
        self.optimizer.step()
        for p, ema in self.ema.items():
            ema.lerp_(p.detach().to(ema.dtype), 1 - o["ema_decay"])
        if "zero_grad_in_step" in o:
            self.optimizer.zero_grad(set_to_none=False)


def assert_same(optimizer: Any, separately: Separately) -> None:
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    for p, q in zip(mine, separately.params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        if "zero_grad_in_step" in separately.options:
            assert not p.grad.any() and not q.grad.any()
        state = dict(optimizer.state[p])
        if q in separately.ema:
            assert_same_bits(state.pop("ema"), separately.ema[q])
        others = separately.optimizer.state.get(q, {})
        assert state.keys() == others.keys()
        for name, value in state.items():
            assert_same_bits(value, others[name], name)


SUBSETS = [dict(chosen) for n in range(1, len(ALL) + 1) for chosen in itertools.combinations(ALL.items(), n)]


@pytest.mark.parametrize("options", SUBSETS, ids=lambda o: "+".join(o))
def test_every_combination_is_torchs_calls_in_sequence(options: dict[str, Any]) -> None:
    """With torch's own optimizer as the witness."""
    case = BY_NAME["adamw_amsgrad"]
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    a = case.make(mine, **options)
    b = Separately(case, theirs, options, lambda params: case.make_torch(params, foreach=False))
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 3 and "skip_nonfinite" in options:
            mine[5].grad[3] = theirs[5].grad[3] = math.inf
        a.step()
        with ieee_sqrt():
            b.step()
    assert_same(a, b)
    if "max_grad_norm" in options:
        assert_same_bits(a.last_grad_norm, b.norm)
    assert a.skipped_steps.item() == ("skip_nonfinite" in options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capability", [*CAPABILITIES, "reference"])
@pytest.mark.parametrize("case", [*FULL, BY_NAME["sgd"]], ids=str)
def test_all_at_once(case: Case, capability: str, dtype: torch.dtype) -> None:
    backend = None
    if capability == "reference":
        backend = "reference"
    else:
        assert fusedoptim._native._C.set_cpu_capability(capability)
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a = case.make(mine, **ALL, **({"backend": backend} if backend else {}))
    b = Separately(case, theirs, ALL, lambda params: case.make(params, backend="reference"))
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step in (0, 3):  # also on the first step, which then leaves no states
            mine[-1].grad[3, 3] = theirs[-1].grad[3, 3] = math.nan
        a.step()
        b.step()
        if step == 0 and case.optimizer != "Adagrad":
            assert not a.state
    assert_same(a, b)
    assert a.skipped_steps.item() == 2 and a.skipped_steps.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_kernels_have_the_references_bits_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    """16-bit gradients are not rounded between clipping and the update."""
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    more = {} if case.optimizer == "NormAdaptive" else {"state_dtype": torch.float32}
    a, b = case.make(mine, **ALL, **more), case.make(theirs, **{**ALL, **more, "backend": "reference"})
    for step in range(4):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = gradient(p, step, i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)
    assert_same_optimizers(a, b)
    assert all(not p.grad.any() for p in mine)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_clipping_in_the_step_is_clipping_before_it(case: Case) -> None:
    """And the gradients stay as they are. Groups have limits of their own, over one norm; one has none."""

    def groups(params: list) -> list[dict[str, Any]]:
        return [
            {"params": params[:5], "max_grad_norm": 0.3},
            {"params": params[5:9], "lr": 0.02},
            {"params": params[9:], "max_grad_norm": 0.05},
        ]

    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    a, b = case.make(groups(mine)), case.make([{**g, "max_grad_norm": None} for g in groups(theirs)])
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        mine[4].grad = theirs[4].grad = None
        kept = [None if p.grad is None else p.grad.clone() for p in mine]
        a.step()
        norm = fusedoptim.clip_grad_norm_(theirs, math.inf)
        for group in groups(theirs):
            if "max_grad_norm" in group:
                torch.nn.utils.clip_grads_with_norm_(group["params"], group["max_grad_norm"], norm)
        b.step()
        assert_same_bits(a.last_grad_norm, norm)
        for p, g in zip(mine, kept, strict=True):
            assert (p.grad is None) == (g is None)
            assert g is None or torch.equal(p.grad, g)
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", IN_TORCH, ids=str)
def test_clipping_differs_from_torchs_by_the_error_of_its_norm(case: Case) -> None:
    """In fp64 its norm of 4,000 numbers is within 1e-14; steps follow by as much, and what Adam makes of it."""
    mine, theirs = parameters([(64, 65)], torch.float64), parameters([(64, 65)], torch.float64)
    a, b = case.make(mine, max_grad_norm=0.1), case.make_torch(theirs, foreach=False)
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1)
        with ieee_sqrt():
            b.step()
        assert a.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-14)
    torch.testing.assert_close(mine[0].detach(), theirs[0].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads: int) -> None:
    shapes = [(3_000_001,), (70_000,), *[(100 + i,) for i in range(300)]]
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        params = parameters(shapes)
        optimizer = fusedoptim.NormAdaptive(params, **ALL)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append((optimizer.last_grad_norm, optimizer))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_optimizers(results[0][1], results[1][1])


@pytest.mark.parametrize("case", FULL, ids=str)
def test_memory_layouts_do_not_matter(case: Case) -> None:
    """The norm is that of the logical order."""

    def permuted(t: torch.Tensor) -> torch.Tensor:
        return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    shape = (40, 30, 20)
    plain = parameters([shape, shape, shape])
    others = [
        torch.nn.Parameter(permuted(plain[0].detach())),
        torch.nn.Parameter(torch.zeros(40, 30, 60)[:, :, ::3].copy_(plain[1].detach())),
        torch.nn.Parameter(plain[2].detach().clone()),
    ]
    a, b = case.make(plain, **ALL), case.make(others, **ALL)
    for step in range(4):
        set_gradients(plain, step)
        for i, (p, q) in enumerate(zip(others, plain, strict=True)):
            p.grad = permuted(q.grad) if i != 1 else torch.zeros(40, 30, 40)[:, :, ::2].copy_(q.grad)
        a.step()
        b.step()
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)
        assert all(not p.grad.any() for p in others)
    assert_same_optimizers(a, b)
    assert others[1].grad.stride() == (1200, 40, 2)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("in_step", [True, False])
def test_under_a_scaler(case: Case, in_step: bool) -> None:
    """Unscale, then clip; an overflow zeroes the gradients and changes nothing else."""
    options = {"max_grad_norm": 0.5, "clip_grad_value": 0.1, "ema_decay": 0.5, "zero_grad_in_step": True}
    mine, theirs = parameters([(5,), (40,)]), parameters([(5,), (40,)])
    a = case.make(mine, **options)
    assert a._step_supports_amp_scaling
    b = Separately(case, theirs, options, case.make)
    scalers = [torch.amp.GradScaler("cpu", init_scale=3.0 * 2**9, growth_interval=3) for _ in range(2)]
    for step in range(8):
        for params, optimizer, scaler in zip((mine, theirs), (a, b.optimizer), scalers, strict=True):
            for i, p in enumerate(params):
                g = torch.Generator().manual_seed(10 * step + i)
                loss = (p * torch.randn(p.shape, generator=g)).sum()
                scaler.scale(loss).backward()
            if step in (0, 4):
                params[1].grad[7] = math.inf
            if optimizer is a and in_step:
                scaler.step(a)
            else:
                scaler.unscale_(optimizer)
                if optimizer is a:
                    scaler.step(a)
                elif step not in (0, 4):
                    b.step()
            scaler.update()
            if optimizer is not a:
                optimizer.zero_grad(set_to_none=False)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same(a, b)


def test_options_switched_on_in_mid_training() -> None:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    case = BY_NAME["adamw"]
    a, b = case.make(mine), case.make(theirs, backend="reference")
    for step in range(8):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for o in (a, b):
            group = o.param_groups[0]
            group["max_grad_norm"] = {2: 0.1, 3: 0.1, 5: math.inf}.get(step)
            group["clip_grad_value"] = 0.01 if step in (3, 4) else None
            group["ema_decay"] = 0.8 if step >= 4 and step != 6 else None
        a.step()
        b.step()
        assert (a.last_grad_norm is None) == (step not in (2, 3, 5))
    assert_same_optimizers(a, b)


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
        with pytest.raises(ValueError, match="NaN" if "nan" in message else message):
            optimizer.step()
        assert_same_bits(params[0].detach(), before)
        with pytest.raises(ValueError, match=message):
            case.make([{"params": parameters([(3,)]), **options}])


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'max_norm'.*max_grad_norm"):
        fusedoptim.AdamW(parameters([(3,)]), max_norm=1.0)


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
    for name in ("zero_grad_in_step", "skip_nonfinite", "backend", "state_dtype"):
        with pytest.raises(ValueError, match=f"a group cannot have its own {name}"):
            fusedoptim.SGD([{"params": parameters([(3,)]), name: None}])


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
    optimizer._norm_stats = {torch.device("meta"): torch.tensor([math.nan, 3.0], dtype=torch.float64)}
    set_gradients(params, 0)
    for _ in range(2):
        optimizer.step()
    assert optimizer.skipped_steps.item() == 3 and optimizer.last_grad_norm.isfinite()
    assert optimizer.state[params[0]]["step"].item() == 2


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
    build = CompiledRunner.build
    monkeypatch.setattr(CompiledRunner, "build", lambda *args: (built.append(args), build(*args)))
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

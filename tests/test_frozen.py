"""A parameter without a gradient is nobody's business, whatever it is: it is neither validated nor touched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import FULL, Case, assert_same_bits, parameters, set_gradients
from torch import Tensor, nn

import fusedoptim

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantized|quantization|sparse).*")


class Quantised(nn.Parameter):
    """As bitsandbytes' Params4bit: bytes in the clothes of a parameter."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Quantised:
        return Tensor._make_subclass(cls, data, requires_grad)


class Wrapper(torch.Tensor):
    """As torchao's weights: a tensor that keeps its numbers in others."""

    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} on quantised weights")


def frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


TRAINED = torch.linspace(-1, 1, 12)
KINDS: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: frozen(torch.ones(4, dtype=torch.uint8)),
    "int8": lambda: frozen(torch.ones(4, dtype=torch.int8)),
    "float8": lambda: frozen(torch.ones(4).to(torch.float8_e4m3fn)),
    "complex": lambda: frozen(torch.ones(4, dtype=torch.complex64)),
    "meta": lambda: frozen(torch.ones(4, device="meta")),
    "sparse": lambda: frozen(torch.ones(4).to_sparse()),
    "expanded": lambda: frozen(torch.ones(1).expand(4)),
    "many dimensions": lambda: frozen(torch.ones([1] * 70)),
    "lazy": lambda: nn.UninitializedParameter(requires_grad=False),
    "lazy, trainable": lambda: nn.UninitializedParameter(),
    "meta, trainable": lambda: nn.Parameter(torch.ones(4, device="meta")),
    "quantised": lambda: Quantised(torch.ones(4, dtype=torch.uint8)),
    "wrapper": lambda: nn.Parameter(Wrapper(torch.ones(4, dtype=torch.int8)), requires_grad=False),
    "quantized": lambda: frozen(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)),
    "negated": lambda: torch.ones(4, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_frozen_parameters_of_any_kind(case: Case, kind: str) -> None:
    """At construction, in add_param_group, at every step, in checkpoints and copies."""
    trained, alone = parameters([(5,), (6,)]), parameters([(5,), (6,)])
    odd = KINDS[kind]()
    a, b = case.make([trained[0], odd, trained[1]]), case.make(alone)
    more = KINDS[kind]()
    a.add_param_group({"params": [more]})
    for step in range(4):
        set_gradients(trained, step)
        set_gradients(alone, step)
        a.step()
        b.step()
        if step == 1:
            a.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(trained, alone, strict=True):
        assert_same_bits(p.detach(), q.detach())
        for name, value in b.state[q].items():
            assert_same_bits(a.state[p][name], value, name)
    assert not a.state.get(odd) and not a.state.get(more)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_plan_is_kept_beside_frozen_parameters(case: Case) -> None:
    trained = parameters([(5,)])
    optimizer = case.make([*trained, KINDS["int8"]()])
    for step in range(3):
        set_gradients(trained, step)
        optimizer.step()
        if step == 0:
            runners = optimizer._runners
    assert optimizer._runners is runners or optimizer._options["backend"] == "reference"


@pytest.mark.parametrize("case", FULL, ids=str)
def test_an_error_comes_with_the_gradient(case: Case) -> None:
    good, odd = parameters([(5,)]), nn.Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False)
    optimizer = case.make([*good, odd])
    set_gradients(good, 0)
    optimizer.step()
    odd.grad = torch.ones_like(odd)
    before = good[0].detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* is complex"):
            optimizer.step()
    assert_same_bits(good[0].detach(), before)
    odd.grad = None
    optimizer.step()
    assert not torch.equal(good[0].detach(), before)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_lazy_parameters_after_their_dry_run(case: Case) -> None:
    torch.manual_seed(0)
    lazy, plain = nn.LazyLinear(3), nn.Linear(4, 3)
    a = case.make(lazy.parameters())
    lazy(torch.ones(2, 4))
    plain.load_state_dict(lazy.state_dict())
    b = case.make(plain.parameters())
    for step in range(3):
        for model, optimizer in ((lazy, a), (plain, b)):
            set_gradients(list(model.parameters()), step)
            optimizer.step()
    for p, q in zip(lazy.parameters(), plain.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert a.state[p].keys() == b.state[q].keys()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_meta_parameters_that_are_materialised_in_place(case: Case) -> None:
    """``to_empty`` with swapped modules keeps the parameter objects, which the optimizer has."""
    plain = nn.Linear(4, 3)
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    a, b = case.make(model.parameters()), case.make(plain.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.load_state_dict(plain.state_dict())
    assert a.param_groups[0]["params"][0] is model.weight and model.weight.device.type == "cpu"
    for step in range(3):
        for m, optimizer in ((model, a), (plain, b)):
            set_gradients(list(m.parameters()), step)
            optimizer.step()
    assert_same_bits(model.weight.detach(), plain.weight.detach())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_frozen_view_of_a_trained_parameter(case: Case) -> None:
    memory, other = TRAINED.clone(), nn.Parameter(TRAINED.clone())
    trained, view = nn.Parameter(memory), frozen(memory[:5])
    a, b = case.make([view, trained]), case.make([other])
    for _ in range(3):
        for p, optimizer in ((trained, a), (other, b)):
            set_gradients([p], 0)
            optimizer.step()
    assert_same_bits(trained.detach(), other.detach())
    view.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* shares memory with parameter 0 of group 0"):
        a.step()
    assert_same_bits(trained.detach(), other.detach())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_parameter_that_is_quantised_in_place_between_steps(case: Case) -> None:
    trained, alone = parameters([(5,), (6,)]), parameters([(5,), (6,)])
    a, b = case.make(trained), case.make(alone)
    for step in range(4):
        set_gradients(trained, step)
        set_gradients(alone, step)
        if step == 2:
            trained[1].requires_grad_(False)
            trained[1].data = torch.ones(3, dtype=torch.uint8)
        if step >= 2:
            trained[1].grad = alone[1].grad = None
        a.step()
        b.step()
    assert_same_bits(trained[0].detach(), alone[0].detach())
    assert trained[1].dtype == torch.uint8 and (trained[1] == 1).all()


def test_a_placeholder_whose_states_lie_elsewhere() -> None:
    """As ZeRO-3 leaves parameters between steps: without memory, beside states of their full shape."""
    trained = parameters([(5,), (6,)])
    optimizer = fusedoptim.AdamW(trained)
    set_gradients(trained, 0)
    optimizer.step()
    full = trained[1].data
    trained[1].grad, trained[1].data = None, torch.empty(0)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    trained[1].data = full
    set_gradients(trained, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in trained] == [3.0, 2.0]


@pytest.mark.filterwarnings("ignore:.*(make_fx|deprecated).*")
def test_a_compiled_step_leaves_them_alone() -> None:
    """The operator in the graph gets the parameters that have gradients, and no others."""
    trained, alone = parameters([(5,), (6,)]), parameters([(5,), (6,)])
    a, b = fusedoptim.AdamW([*(make() for make in KINDS.values()), *trained]), fusedoptim.AdamW(alone)
    step = torch.compile(a.step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        set_gradients(trained, i)
        set_gradients(alone, i)
        step()
        b.step()
    for p, q in zip(trained, alone, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_gradients_that_come_and_go_make_no_new_plans() -> None:
    """A parameter that could be stepped is in the plan also without a gradient."""
    params = parameters([(5,), (6,)])
    optimizer = fusedoptim.SGD(params, lr=0.1)
    optimizer.step()
    runners = optimizer._runners
    for step in range(4):
        set_gradients(params, step)
        params[step % 2].grad = None
        optimizer.step()
    assert optimizer._runners is runners


def test_steps_in_the_backward_pass_leave_them_alone() -> None:
    model = nn.Linear(3, 2)
    frozen_ones = [make() for kind, make in KINDS.items() if "trainable" not in kind]
    optimizer = fusedoptim.AdamW([*model.parameters(), *frozen_ones])
    before = model.weight.detach().clone()
    with fusedoptim.step_in_backward(optimizer):
        model(torch.ones(4, 3)).sum().backward()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", ["lazy, trainable", "meta, trainable"])
def test_steps_in_the_backward_pass_need_parameters_with_memory(kind: str) -> None:
    optimizer = fusedoptim.AdamW([KINDS[kind](), *parameters([(5,)])])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* has no memory yet"):
        fusedoptim.step_in_backward(optimizer)


def test_a_compiled_step_that_sees_nothing_says_so() -> None:
    """A frozen parameter of a subclass is left out of what is traced; thawed, it must not be forgotten."""

    class Sub(nn.Parameter):
        pass

    p = Sub(torch.ones(3), requires_grad=False)
    optimizer = fusedoptim.SGD([p])
    p.requires_grad_(True)
    p.grad = torch.ones(3)
    with pytest.raises(Exception, match="compiler cannot look at"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_memory_that_was_freed() -> None:
    params = parameters([(5,), (6,)])
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    params[1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* without memory of its own"):
        optimizer.step()


def test_a_trainable_parameter_that_never_can_be_stepped_is_refused_at_once() -> None:
    good = parameters([(5,)])
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* is complex"):
        fusedoptim.AdamW([*good, nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    optimizer = fusedoptim.AdamW(good)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 .* unsupported dtype"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3).to(torch.float8_e5m2))]})
    assert len(optimizer.param_groups) == 1

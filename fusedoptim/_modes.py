"""Steps while a ``TorchDispatchMode`` watches, traces or fakes what torch does.

Such a mode sees operators. So a step is one then, as within torch.compile: ``fusedoptim::step_``, with the parameters
and their gradients, which a tracer puts into its graph. Fake tensors, which have shapes and no memory, get the states
that a step would give them, and nothing else happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch._functorch import pyfunctorch

from . import _stateless, _torch_compile
from ._backends import BACKENDS
from ._dtensor import is_dtensor, local
from ._dtypes import compute_dtype
from ._fakes import alike, is_fake
from ._members import usual_grad
from ._states import HasStates, StateMaker
from ._torch_compile import Traceable

#: How many modes are active, but for those of PRE_DISPATCH.
count_modes = _len_torch_dispatch_stack
_pre_dispatch_modes = getattr(torch._ops, "_mode_stack_state_for_pre_dispatch", None)
#: The modes of ``make_fx(pre_dispatch=True)``, the first of which is a tracer or None, stand in a list of their own.
#: torch's function that looks there takes 0.6 us, a tenth of a small step.
PRE_DISPATCH: list[Any] = getattr(_pre_dispatch_modes, "_ModeStackStateForPreDispatch__infra_modes", [None])


def is_transformed() -> bool:
    """Whether this runs within ``torch.func``'s transforms, such as vmap and grad."""
    return torch._C._functorch.peek_interpreter_stack() is not None


#: What runs within it does so outside of them.
untransformed = pyfunctorch.temporarily_clear_interpreter_stack


def step(optimizer: Traceable) -> None:
    """Makes a step where a mode is active."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if is_transformed() and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, params)):
        with untransformed():  # functionalize refuses operators that write, and nothing of its own is written here
            step(optimizer)
        return
    active = _with_gradients(params)
    tracer = PRE_DISPATCH[0] or _get_dispatch_mode(_TorchDispatchModeKey.PROXY)
    if tracer is not None:
        if active:
            _trace(optimizer, params, active, tracer)
    elif takes_fakes(optimizer):
        make_fake_states(optimizer)
    elif active:
        _torch_compile.note_params(optimizer)
        params = optimizer._all_params
        active = _with_gradients(params)
        watched = _torch_compile.Traced(optimizer, active)  # for the duration of this call
        _call(optimizer, watched.number, [params[i] for i in active])


def _with_gradients(params: list[Tensor]) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(params) if p.grad is not None)


def _trace(optimizer: Traceable, params: list[Tensor], active: tuple[int, ...], tracer: Any) -> None:
    if hasattr(optimizer, "found_inf"):
        raise RuntimeError(
            "a GradScaler leaves unscaling and skipping to this step, and what is being traced would do neither: build "
            "the optimizer without amp_in_step and zero_grad_in_step, or step outside of what is traced"
        )
    if _stateless.states_are_traced(optimizer, tracer):
        _stateless.trace(optimizer, params, active)
        return
    own = optimizer._all_params
    _torch_compile.note_params(optimizer)
    traced = optimizer._all_params
    active = _with_gradients(traced)
    if any(map(is_fake, params)):
        optimizer._all_params = own
    number = _torch_compile.keep_first(optimizer, active, _torch_compile.Traced(optimizer, active)).number
    _call(optimizer, number, [traced[i] for i in active])


def _call(optimizer: Traceable, number: int, params: list[Tensor]) -> None:
    with torch.no_grad():
        grads = [usual_grad(p) if is_dtensor(p) else p.grad for p in params]
        shards = [None if g is None else local(g) for g in grads]
    _torch_compile.call(optimizer, number, [local(p) for p in params], shards)


# ---- fake tensors ----


def takes_fakes(optimizer: HasStates) -> bool:
    """Whether the parameters that have gradients are fake, or taken for fake: then all that a step does is to make
    their states.

    Raises:
        ValueError: if some are fake and some not.
        RuntimeError: if none is, in a mode for fakes: what was made there would be of no use to a real step.
    """
    stepped = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    fakes = sum(map(is_fake, stepped))
    if fakes == 0:
        mode = _get_dispatch_mode(_TorchDispatchModeKey.FAKE)
        if mode is None or not stepped:
            return False
        if not mode.allow_non_fake_inputs:
            raise RuntimeError(
                "a step of real parameters under a FakeTensorMode would change nothing: make the model within the mode "
                "or its parameters fake (mode.from_tensor), or step outside of it"
            )
        return True
    if fakes < len(stepped):
        raise ValueError(
            f"{fakes} of the {len(stepped)} parameters that have gradients are fake tensors, without memory, and the "
            "others are not: step them with optimizers of their own"
        )
    return True


@torch.no_grad()
def make_fake_states(optimizer: HasStates) -> None:
    """The states that a step would leave, of the fake parameters that have gradients."""
    maker, backend = StateMaker.of(optimizer), optimizer._options["backend"]
    stepped = [(g, p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None and is_fake(p)]
    for group, p in stepped:
        states = dict(optimizer.state.get(p, {}))
        with alike(p) as mode:
            states.update(maker.missing(group, p, states))
            for name, value in states.items():
                if isinstance(value, Tensor) and not is_fake(value):  # made with the optimizer, say
                    states[name] = mode.from_tensor(value)
            if "step" in states and _steps_on(backend, p.device):
                states["step"] = states["step"].to(p.device)
        if states:
            optimizer.state[p].update(states)


def _steps_on(backend: str | None, device: torch.device) -> bool:
    """Whether ``step`` is on the device, too."""
    chosen = [BACKENDS[backend]] if backend else BACKENDS.values()
    return any(b.steps_on_device and b.takes(device) for b in chosen)


def norm_of_fakes(params: Iterable[Tensor]) -> Tensor | None:
    """In place of the norm of all gradients: a fake tensor, if there are any."""
    for p in params:
        if is_fake(p):
            with alike(p):
                return torch.full((), math.nan, dtype=compute_dtype(p), device=p.device)
    return None

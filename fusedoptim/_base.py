"""The base class of all optimizers, with the one step() of the package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import (
    _checkpoint,
    _ema,
    _footprint,
    _group_keys,
    _help,
    _hooks,
    _lending,
    _masters,
    _modes,
    _portable,
    _prepare,
    _torch_compile,
)
from ._check_tensors import check_early
from ._check_values import check_common
from ._modes import PRE_DISPATCH, count_modes
from ._norm_groups import norm_groups
from ._norms import NormResults, given_norm, norm_is_measured
from ._options import DEFAULTS, StepOptions, check_options, scales_in_step
from ._own_groups import completed
from ._random_places import Id
from ._rule import GROUP_OPTIONS, Group, Rule
from ._runners import Steps
from ._storage import check_names

__all__ = ["FusedOptimizer"]


class FusedOptimizer(Optimizer):
    """Steps all parameters of all groups in one pass.

    A subclass declares its :class:`Rule` and has a constructor with a signature. A line of its docstring that
    reads as that on options below is replaced by a text for each option. ``fusedoptim/guides/own_rules.md`` begins with
    an empty file; ``inspect.getsource(fusedoptim.Lion)`` is a whole example.

    Args:
        params: parameters, named parameters or groups, as in torch.optim.
        defaults: the groups' default values.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values, parameters, gradients and states that cannot be stepped; nothing is written then.
        RuntimeError: if the backend asked for cannot be used here.
    """

    rule: Rule
    #: Arguments beside params with which ``python -m fusedoptim`` steps it: such that all of its rule is in use.
    _self_check: ClassVar[dict[str, Any]] = {}
    #: GradScaler looks for it. True with ``amp_in_step`` or ``zero_grad_in_step``.
    _step_supports_amp_scaling: bool = False
    found_inf: Tensor | None
    # See _torch_compile.Traceable.
    _traced_steps: dict[Hashable, _torch_compile.Traced]
    _name: str
    _all_params: list[Tensor]
    _sharded: list[bool]
    _unseen: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("step")
        if own is not None and not hasattr(own, "hooked"):
            cls.step = _hooks.with_hooks(own)  # type: ignore[method-assign]
        _help.complete(cls)
        if "rule" in cls.__dict__:
            check_names(cls.rule)
        if "rule" in cls.__dict__ and cls.__module__.startswith(f"{__package__}."):  # a user's says nothing of others
            _checkpoint.note_signature(cls.__name__, cls.rule)

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: StepOptions) -> None:
        check_options(options, type(self))
        self.rule = completed(type(self).rule, defaults)
        defaults |= {name: options.get(name, off) for name, off in GROUP_OPTIONS.items()}
        _group_keys.switch_off(defaults, self.rule)
        defaults |= _group_keys.settled(defaults)
        self._check_group(defaults)
        self._options: dict[str, Any] = {name: options.get(name, default) for name, default in DEFAULTS.items()}
        self._options["norm_group"] = norm_groups(options.get("norm_group")) or None
        self._begin()
        super().__init__(params, defaults)
        if self.rule.states_at_construction:
            _prepare.make_early_states(self)

    def _begin(self) -> None:
        """Sets what no pickle and no copy takes along."""
        self._norms = NormResults()
        self._has_no_norm = False
        self._agreed = False
        self._averaging = False  # within ema_weights()
        #: States that a loaded state_dict may hold, too: see _lending.take_over.
        self._lent: dict[Tensor, _lending.Lent] = {}
        #: Of parameters, where another optimizer says what they are: see _random_places.py.
        self._ids: dict[Tensor, Id] = {}
        self._loader: _checkpoint.Loader | None = None
        if scales_in_step(self._options):
            self._step_supports_amp_scaling = True
        self._runners: list[Steps] | None = None
        self._captured: list[Steps] = []
        _torch_compile.register(self)

    # ---- the step ----

    @overload
    def step(self, closure: None = None, *, grad_norm: Tensor | float | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, grad_norm: Tensor | float | None = None) -> float: ...

    @_hooks.with_hooks
    def step(
        self, closure: Callable[[], float] | None = None, *, grad_norm: Tensor | float | None = None
    ) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
            grad_norm: what ``max_grad_norm`` and ``skip_nonfinite`` go by, instead of a norm that the step measures:
                that of several optimizers' gradients, say, from :func:`fusedoptim.grad_norm`. A number or a tensor of
                one element, unscaled. Not for steps that are traced or watched by a TorchDispatchMode.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: if anything cannot be stepped; then no parameter and no state has changed.
        """
        loss = None
        if closure is not None:
            self._check_not_evaluating()
            with torch.enable_grad():
                loss = closure()
        if grad_norm is not None:
            if is_compiling() or count_modes() or PRE_DISPATCH[0]:
                raise RuntimeError(
                    "step(grad_norm=...) cannot be traced, nor watched by a TorchDispatchMode: call it outside of "
                    "that, or let the step measure the norm"
                )
            self._step(grad_norm=given_norm(grad_norm, self._options, self.param_groups))
        elif is_compiling():
            _torch_compile.trace(self)
        elif _hooks.profiling():
            n = sum(p.grad is not None for group in self.param_groups for p in group["params"])
            with profiler.record_function(f"fusedoptim.{type(self).__name__}.step({n} tensors)"):
                self._step()
        else:
            self._step()
        return loss

    # Schedulers replace an optimizer's step by one that notes that it was called, in a file that torch.compile does not
    # trace, unless this says that it notes it already.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step(self, in_operator: bool = False, grad_norm: Tensor | None = None) -> None:
        if self._averaging:  # asked here, because a call takes a thirtieth of a small step
            self._check_not_evaluating()
        self._opt_called = True
        if (count_modes() or PRE_DISPATCH[0]) and not in_operator:
            _modes.step(self)
            return
        runners = self._runners
        if self._has_no_norm and grad_norm is None and norm_is_measured(self._options, self.param_groups):
            runners = None  # to be refused
        if runners:
            for runner in runners:
                if not runner.refresh(self.param_groups, self.state):
                    runners = None
                    break
        if not runners:  # none yet, none that fits, or no parameters so far
            self._step_afresh(grad_norm)
        elif grad_norm is not None or hasattr(self, "found_inf"):  # GradScaler sets it, for the duration of this call
            _prepare.run(runners, self, grad_norm)
        else:
            for runner in runners:
                runner.run()

    def _check_not_evaluating(self, call: str = "step") -> None:
        if self._averaging:
            raise RuntimeError(f"{call}() within ema_weights(), whose end would undo it: {call} after it")

    def _step_afresh(self, grad_norm: Tensor | None = None) -> None:
        """Validates everything, makes missing states and runners, and steps; or raises, having changed nothing."""
        if _modes.is_transformed():  # what is made here would be wrapped, and of no use outside
            with _modes.untransformed():
                self._step_afresh(grad_norm)
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph, because it sets up states and tables: take a step before"
                " the capture, and none that changes groups, states, dtypes or memory layouts in between"
            )
        if _modes.takes_fakes(self):
            _modes.make_fake_states(self)
            return
        self._drop_runners()
        _torch_compile.note_params(self)
        _lending.take_over(self._lent, self.state)
        self._runners = _prepare.step_afresh(self, grad_norm)

    def _drop_runners(self) -> None:
        """Forgets the runners, but for the tables that a CUDA graph reads at every replay."""
        for runner in self._runners or ():
            if runner.captured:
                runner.retire()
                self._captured.append(runner)
        self._runners = None

    # ---- what it is, and what it measured ----

    def __repr__(self) -> str:
        return _help.representation(super().__repr__(), self._options)

    def memory(self) -> _footprint.Footprint:
        """The bytes that parameters, gradients and every state take now, and those of states that are still to come.

        ``print(optimizer.memory())`` shows a table, which says as well how many bytes each element of the parameters
        takes, by state and in all. Tables of addresses and the scratch memory of norms are not in it.
        Parameters on the meta device take nothing, so that it says what states a model would need before there is one.
        """
        return _footprint.measure(self)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, unscaled and not clipped: a 0-dim tensor on their device, fp32,
        or fp64 if a parameter has fp64. Reading it waits for nothing. Steps measure it with ``max_grad_norm`` or
        ``skip_nonfinite``: None without, and NaN until the first such step."""
        if not norm_is_measured(self._options, self.param_groups):
            return None
        return self._norms.last(self._all_params) if self._norms.by_device else _modes.norm_of_fakes(self._all_params)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_nonfinite`` skipped, since this optimizer was made: a 0-dim int64 tensor. A step that a
        GradScaler did not even call is not among them; one whose skipping it left to the step is."""
        return self._norms.skipped()

    @contextmanager
    def ema_weights(self, model: nn.Module | None = None) -> Iterator[None]:
        """Within it the parameters have the values of their moving averages, rounded to their dtype.

        Parameters of groups without ``ema_decay`` stay as they are. Memory addresses stay; it takes memory for a copy
        of the parameters. A replayed CUDA graph of a step within it is undone at its end.

        Args:
            model: needed for FSDP2 (``fully_shard``) and FullyShardedDataParallel, whose root keeps whole parameters
                after an evaluation and would go on using these: it is resharded at the beginning and at the end.

        Raises:
            RuntimeError: if there are no averages yet, for a step within, if used within itself, and if sharded
                parameters may be those of an FSDP module that is not in ``model``; nothing is written then.
            TypeError: if ``model`` is no module.
        """
        if self._averaging:
            raise RuntimeError("ema_weights() is active already: the parameters are their moving averages")
        averages = _ema.averages(self.param_groups, self.state, self.rule)
        if not averages:
            raise RuntimeError("there are no moving averages: pass ema_decay= to the optimizer, and take a step first")
        self._averaging = True
        try:
            with _ema.in_place(averages, model):
                yield
        finally:
            self._averaging = False

    # ---- groups, checkpoints, copies ----

    def _check_group(self, group: Group) -> None:
        check_common(group, self.rule, type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does. Its values and parameters are checked first."""
        if isinstance(param_group, dict):
            _group_keys.leave_out_options(param_group, self._options)
            _group_keys.switch_off(param_group, self.rule)
            param_group.update(_group_keys.settled(param_group))
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        _group_keys.leave_out_what_is_off(group, self.rule)
        _torch_compile.note_params(self)
        try:
            for i, p in enumerate(group["params"]):
                check_early(p, group, index, i, type(self).__name__)
        except ValueError:
            del self.param_groups[-1]
            _torch_compile.note_params(self)
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: states, which are the optimizer's own tensors, and groups, without the options of this
        package that are off.

        States are as they are stored, so that training goes on with the same bits: with ``"int8"`` codes and scales,
        on which torch.optim's step raises an error; with ``master="remainder"`` bits that it carries along and does not
        read, so that it goes on from the 16-bit parameters. Others take :meth:`portable_state_dict`.
        """
        _checkpoint.renew_early_states(self)
        # Before the user's own hooks, which may make anything of it.
        handle = self.register_state_dict_post_hook(_portable.complete, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def portable_state_dict(self) -> dict[str, Any]:
        """A state_dict that says the same in torch.optim's words, whatever ``master``, ``state_dtype`` and ``rounding``
        are: for torch.optim's namesake, for other libraries, and for an optimizer with other options of these.

        States have the parameter's shape, in fp32 or fp64: those in 8 bits are decoded. The fp32 numbers that 16-bit
        parameters stand for are a state ``master``, where the optimizer keeps any. States that are in fp32 already are
        the optimizer's own tensors, all others new ones; DTensors stay such. Groups have none of these options.
        torch.optim keeps moments in the parameter's dtype, hence rounds what it loads, and does not read ``master``.
        """
        hooks = self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks = OrderedDict(), OrderedDict()
        try:
            return _portable.portable(self, self.state_dict())
        finally:
            self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks = hooks

    def reset_master(self) -> None:
        """Takes the parameters as they are for the fp32 numbers that they stand for, in groups with ``master``.

        A step takes what others wrote to such a parameter for its new number anyhow, but with a remainder adds what
        that had left of the old one, less than a unit in the parameter's last place; and a ``master`` of before the
        write would be refused with a checkpoint. Counts as a write to the states. Without such states it does nothing.

        Raises:
            RuntimeError: within :meth:`ema_weights`, where the parameters are their averages.
        """
        if self._averaging:
            raise RuntimeError("reset_master() within ema_weights(), whose end writes the parameters: call it after it")
        _lending.take_over(self._lent, self.state)
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(values := self.state.get(p), dict):
                    _masters.reset(p, values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of its namesake in torch.optim.

        What it carries is taken over; an option of this package that it does not carry stays as it is here, and so do
        ``master``, ``state_dtype`` and ``rounding`` where they were given. States are stored as these say: one in
        another dtype, or in 8 bits, is converted, to nearest; a ``master`` of fp32 numbers becomes a remainder, or the
        other way round; where nobody would read it, it is left out, with a warning if it is lost. Without a
        ``state_dtype`` every state keeps the dtype that it was saved in (torch casts it to its parameter's), but that
        none is narrower than a new one would be; a warning names what was widened. ``step`` may be any number. The
        states of bitsandbytes' optimizers, in 32 and 8 bits, are known by their names there. States of parameters that
        no step can take as they are, and entries under names that no optimizer has, are carried along.

        Load the model first: a ``master`` has to be what the parameters were rounded from.

        Two optimizers never share a state. Tensors are copied: at once if anything beside the state_dict holds them, or
        if another device, dtype or memory order is needed; else before the first step, if the state_dict is still there
        by then, which has the copies then. Until that step whoever writes to one of them writes to both.

        Raises:
            ValueError: if it is another optimizer's, does not fit, or has a ``master`` of another step than the
                parameters'; nothing is loaded then.
            RuntimeError: if it did on another rank, and DTensors have masters; nothing is loaded then.
        """
        _checkpoint.load(self, super().load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        had = {*state.get("defaults", self.__dict__.get("defaults", ()))}
        super().__setstate__(state)
        if "differentiable" not in had:  # torch adds it, to whatever optimizer
            self.defaults.pop("differentiable", None)
        self._options = {**DEFAULTS, **self.__dict__.get("_options", {})}
        self.defaults = {**GROUP_OPTIONS, **self.defaults}
        _group_keys.move_state_dtype(self._options, self.defaults, self.param_groups)
        if "_runners" not in self.__dict__:  # a copy; else a state_dict is loaded
            self.rule = completed(type(self).rule, self.defaults)
            self._begin()
        self._drop_runners()
        _torch_compile.note_params(self)
        for group in self.param_groups:
            _group_keys.fill(group, self.defaults, self.rule)
        if self._loader is not None:
            self._loader.restore(self.param_groups, self.state, self._lent)

"""The base class of all optimizers, with the one step() of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import (
    _backends,
    _checkpoint,
    _compiled,
    _distributed,
    _ema,
    _fakes,
    _footprint,
    _help,
    _hooks,
    _members,
    _modes,
)
from ._check_tensors import can_have_states, check_early
from ._check_values import check_common
from ._members import Member, Members
from ._modes import PRE_DISPATCH, count_modes
from ._options import DEFAULTS, GROUP_OPTIONS, StepOptions, check_options, scales_in_step
from ._rule import EMA, FLAGS, Group, Rule
from ._runners import Around, Runner, make_runner
from ._states import Changes, StateMaker, move_steps

__all__ = ["FusedOptimizer"]

#: GradScaler's grad_scale, None if gradients are unscaled already, and its found_inf
Scaling = tuple[Tensor | None, Tensor | None] | None


class FusedOptimizer(Optimizer):
    """Steps all parameters of all groups in one pass.

    A subclass declares its :class:`Rule` and has a constructor with a signature. A line of its docstring that
    reads as that on options below is replaced by a text for each option.

    Args:
        params: parameters, named parameters or groups, as in torch.optim.
        defaults: the groups' default values.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values, parameters, gradients and states that cannot be stepped; nothing is written then.
        RuntimeError: if the backend asked for cannot be used here.
    """

    rule: ClassVar[Rule]
    #: GradScaler looks for it. True with ``amp_in_step`` or ``zero_grad_in_step``.
    _step_supports_amp_scaling: bool = False
    found_inf: Tensor | None
    #: Its steps in compiled code, one for each set of parameters with gradients, however often it is compiled.
    _traced_steps: dict[Hashable, _compiled.Traced]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("step")
        if own is not None and not hasattr(own, "hooked"):
            cls.step = _hooks.with_hooks(own)  # type: ignore[method-assign]
        _help.complete(cls)

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: StepOptions) -> None:
        check_options(options, type(self))
        defaults |= {name: options.get(name) for name in GROUP_OPTIONS}
        _switch_off(defaults)
        self._check_group(defaults)
        self._options: dict[str, Any] = {name: options.get(name, default) for name, default in DEFAULTS.items()}
        self._norm_stats: dict[torch.device, Tensor] = {}
        self._averaging = False  # within ema_weights()
        #: States that a loaded state_dict may hold, too: see _checkpoint.take_over.
        self._lent: dict[Tensor, _checkpoint.Lent] = {}
        self._loader: _checkpoint.Loader | None = None  # while a state_dict is loaded
        self._in_parts = False  # whether parameters may be parts of tensors
        if scales_in_step(self._options):
            self._step_supports_amp_scaling = True
        self._runners: list[Runner] | None = None
        self._captured: list[Runner] = []
        #: The parameters for compiled steps, which must not look at the groups: see _compiled.traceable.
        self._all_params: list[Tensor] = []
        self._unseen = 0  # how many others there are
        self._name = _compiled.register(self)
        super().__init__(params, defaults)

    # ---- the step ----

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_hooks.with_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: if anything cannot be stepped; then no parameter and no state has changed.
        """
        loss = None
        if closure is not None:
            self._check_not_averaging()
            with torch.enable_grad():
                loss = closure()
        if is_compiling():
            _compiled.trace(self)
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

    def _step(self, in_operator: bool = False) -> None:
        if (count_modes() or PRE_DISPATCH[0]) and not in_operator:
            _modes.step(self)
            return
        if self._averaging:  # asked here, because a call takes a thirtieth of a small step
            self._check_not_averaging()
        self._opt_called = True
        runners = self._runners
        if runners and (len(runners) > 1 or self._in_parts) and self._measures_norm():
            runners = None  # to be refused
        if runners:
            for runner in runners:
                if not runner.refresh(self.param_groups, self.state):
                    runners = None
                    break
        scaling = None
        if hasattr(self, "found_inf"):  # GradScaler sets both, for the duration of this call
            scaling = (getattr(self, "grad_scale", None), self.found_inf)
        if not runners:  # none yet, none that fits, or no parameters so far
            self._step_afresh(scaling)
        elif scaling is None:
            for runner in runners:
                runner.run()
        else:
            for runner in runners:
                runner.run_scaled(*scaling)

    def _check_not_averaging(self) -> None:
        if self._averaging:
            raise RuntimeError("step() within ema_weights(), whose end would undo it: step after it")

    def _step_afresh(self, scaling: Scaling) -> None:
        """Validates everything, creates missing states and runners, and steps; or raises, having changed nothing."""
        if _modes.is_transformed():  # what is made here would be wrapped, and of no use outside
            with _modes.untransformed():
                self._step_afresh(scaling)
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph, because it sets up states and tables: take a step before"
                " the capture, and none that changes groups, states, dtypes or memory layouts in between"
            )
        if _modes.step_of_fakes(self):
            return
        self._drop_runners()
        _compiled.note_params(self)
        _checkpoint.take_over(self._lent, self.state)
        changes = Changes(self.state)
        runners: list[Runner] = []
        ran = 0
        try:
            with _members.without_garbage_collection():
                runners = self._prepare(changes)
            for runner in runners:  # one that raises has written nothing
                if scaling is None:
                    runner.run()
                else:
                    runner.run_scaled(*scaling)
                ran += 1
        except BaseException:
            if ran == 0:
                changes.undo()
            raise
        if self._was_skipped(scaling):
            changes.undo()
        else:
            self._runners = runners

    def _was_skipped(self, scaling: Scaling) -> bool:
        """The one place that waits for the device: no state may stay that a skipped step created."""
        if scaling is not None and scaling[1] is not None and scaling[1].item() != 0:
            return True
        return bool(self._options["skip_nonfinite"]) and not all(
            math.isfinite(stats[0].item()) for stats in self._norm_stats.values()
        )

    def _drop_runners(self) -> None:
        """Forgets the runners, but for the tables that a CUDA graph reads at every replay."""
        for runner in self._runners or ():
            if runner.captured:
                runner.retire()
                self._captured.append(runner)
        self._runners = None

    def _prepare(self, changes: Changes) -> list[Runner]:
        """Runners that are ready to run. What is changed in the states is noted in ``changes``."""
        runners = []
        self._in_parts = _distributed.sharded_by_fsdp1(p for group in self.param_groups for p in group["params"])
        if self._in_parts and (self._measures_norm() or self.rule.uses_norm):
            what = type(self).__name__ if self.rule.uses_norm else "max_grad_norm, as skip_nonfinite,"
            _distributed.refuse_norm_of_shards(what, for_clipping=not self.rule.uses_norm)
        found = self._find_members(changes)
        if self._measures_norm():
            found.leave_alone_devices_without_gradients()
        members = found.by_device
        if len(members) > 1 and self._measures_norm():
            raise ValueError(
                f"max_grad_norm and skip_nonfinite need all parameters on one device, but they are on "
                f"{', '.join(sorted(map(str, members)))}: use torch.nn.utils.clip_grad_norm_ before the step"
            )
        stats = self._norm_stats = self._stats_on(members)
        for device, of_device in members.items():
            backend = _backends.choose(self._options["backend"], device)
            if self.rule.has_step and _backends.BACKENDS[backend].steps_on_device:
                move_steps((m.states for m in of_device), device, changes)
            around = Around(stats[device], self._options["skip_nonfinite"], self._options["zero_grad_in_step"])
            runner = make_runner(backend, self.rule, device, around)
            runner.build(self.param_groups, self.state, of_device, found.dormant)
            if not runner.refresh(self.param_groups, self.state):
                raise RuntimeError(f"a plan does not fit what it was made from ({runner.reason}): please report this")
            runners.append(runner)
        return runners

    @torch.no_grad()
    def _create_states(self) -> None:
        """Makes all states before the first step, for those parameters that can have any by now."""
        maker = StateMaker(self.rule, self.defaults, self._options["state_dtype"])
        for group in self.param_groups:
            names = self.rule.state_names(group)
            for p in filter(can_have_states, group["params"]):
                with _fakes.alike(p):
                    self.state[p].update(maker.missing(names, p, self.state[p]))

    def _find_members(self, changes: Changes, steps: Callable[[Tensor], bool] = _members.has_gradient) -> Members:
        maker = StateMaker(self.rule, self.defaults, self._options["state_dtype"])
        zero_grad = self._options["zero_grad_in_step"]
        name = type(self).__name__
        return _members.find(self.param_groups, self.rule, name, maker, changes, zero_grad=zero_grad, steps=steps)

    # ---- what it is, and what it measured ----

    def __repr__(self) -> str:
        return _help.representation(super().__repr__(), self._options)

    def memory(self) -> _footprint.Footprint:
        """The bytes that parameters, gradients and every state take now, and those of states that are still to come.

        ``print(optimizer.memory())`` shows a table. Tables of addresses and the scratch memory of norms are not in it.
        Parameters on the meta device take nothing, so that it says what states a model would need before there is one.
        """
        return _footprint.measure(self)

    def _stats_on(self, members: dict[torch.device, list[Member]]) -> dict[torch.device, Tensor]:
        """For each device the norm of all gradients, and how many steps were skipped for it: so far, if parameters were
        moved."""
        before = next(iter(self._norm_stats.values()), None)
        found = {}
        for device, of_device in members.items():
            stats = self._norm_stats.get(device)
            if stats is None:
                stats = torch.tensor([math.nan, 0.0], dtype=torch.float64, device=device)
                if before is not None:
                    stats[1].copy_(before[1])
            if self._measures_norm() and all(m.param.grad is None for m in of_device):
                stats[0] = 0.0  # nothing may be launched
            found[device] = stats
        return found

    def _measures_norm(self) -> bool:
        return bool(self._options["skip_nonfinite"]) or any(
            g.get("max_grad_norm") is not None and g["params"] for g in self.param_groups
        )

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, unscaled and not clipped: a 0-dim tensor on their device, fp32,
        or fp64 if a parameter has fp64. Reading it waits for nothing. Steps measure it with ``max_grad_norm`` or
        ``skip_nonfinite``: None without, and NaN until the first such step."""
        if not self._measures_norm():
            return None
        if not self._norm_stats:
            return _modes.norm_of_fakes(self._all_params)
        stats = next(iter(self._norm_stats.values()))  # one, or of several devices, on which none was measured
        wide = any(p.dtype == torch.float64 for p in self._all_params)
        return stats[0].to(torch.float64 if wide else torch.float32, copy=True)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_nonfinite`` skipped, since this optimizer was made: a 0-dim int64 tensor. A step that a
        GradScaler did not even call is not among them; one whose skipping it left to the step is."""
        for stats in self._norm_stats.values():
            return stats[1].to(torch.int64)
        return torch.zeros((), dtype=torch.int64, device="cpu")

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it the parameters have the values of their moving averages, rounded to their dtype.

        Parameters of groups without ``ema_decay`` stay as they are. Memory addresses stay; it takes memory for a copy
        of the parameters. A replayed CUDA graph of a step within it is undone at its end.

        Raises:
            RuntimeError: if there are no averages yet, for a step within, and if used within itself.
        """
        if self._averaging:
            raise RuntimeError("ema_weights() is active already: the parameters are their moving averages")
        pairs = [
            (p, self.state[p][EMA])
            for group in self.param_groups
            for p in group["params"]
            if group.get("ema_decay") is not None and self._has_average(p)
        ]
        if not pairs:
            raise RuntimeError("there are no moving averages: pass ema_decay= to the optimizer, and take a step first")
        params, averages = map(list, zip(*pairs, strict=True))
        self._averaging = True
        try:
            with _ema.in_place_of(params, averages):
                yield
        finally:
            self._averaging = False

    def _has_average(self, p: Tensor) -> bool:
        values = self.state.get(p, {})
        return values.get(EMA) is not None and not _members.early_average(self.rule, values)

    # ---- groups, checkpoints, copies ----

    def _check_group(self, group: Group) -> None:
        check_common(group, self.rule, type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does. Its values and parameters are checked first."""
        if isinstance(param_group, dict):
            _switch_off(param_group)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        _checkpoint.leave_out_what_is_off(group, self.rule)
        _compiled.note_params(self)
        try:
            for i, p in enumerate(group["params"]):
                check_early(p, group, index, i, type(self).__name__)
        except ValueError:
            del self.param_groups[-1]
            _compiled.note_params(self)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of its namesake in torch.optim.

        What it carries is taken over; an option of this package that it does not carry stays as it is here. States have
        ``state_dtype`` if that was given; else every one keeps the dtype that it was saved in (torch casts it to its
        parameter's), but that none is narrower than a new one would be; a warning names what was widened. ``step`` may
        be any number. States of parameters that no step can take as they are, and entries under names that no optimizer
        has, are carried along.

        Two optimizers never share a state. Tensors are copied: at once if anything beside the state_dict holds them, or
        if another device, dtype or memory order is needed; else before the first step, if the state_dict is still there
        by then, which has the copies then. Until that step whoever writes to one of them writes to both.

        Raises:
            ValueError: if it is another optimizer's, or does not fit; nothing is loaded then.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError("this is not an optimizer's state_dict: it needs the keys 'state' and 'param_groups'")
        dtype, name = self._options["state_dtype"], type(self).__name__
        self._loader = loader = _checkpoint.Loader(self.param_groups, self.defaults, self.rule, dtype, name)

        def prepare(optimizer: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            return loader.prepare(final)

        # Registered last, so that it sees what the user's own hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(prepare)
        before = {key: self.__dict__[key] for key in ("state", "param_groups")}
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            handle.remove()
            self._loader = None
        loader.warn_of_wider_states()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._options = {**DEFAULTS, **self.__dict__.get("_options", {})}
        self.defaults = {**dict.fromkeys(GROUP_OPTIONS), **self.defaults}
        self.__dict__.setdefault("_norm_stats", {})
        self.__dict__.setdefault("_averaging", False)
        self.__dict__.setdefault("_lent", {})
        self.__dict__.setdefault("_loader", None)
        self.__dict__.setdefault("_in_parts", False)
        if scales_in_step(self._options):
            self._step_supports_amp_scaling = True
        self.__dict__.setdefault("_runners", None)
        self.__dict__.setdefault("_captured", [])
        self._drop_runners()
        _compiled.note_params(self)
        if "_name" not in self.__dict__:
            self._name = _compiled.register(self)
        for group in self.param_groups:
            for key in self.defaults.keys() - self.rule.extensions.keys():
                group.setdefault(key, self.defaults[key])
            _checkpoint.leave_out_what_is_off(group, self.rule)
            _switch_off(group)
        if loader := self.__dict__.get("_loader"):
            self._lent.clear()
            for p, values, lent in loader.restore(self.param_groups, self.state):
                self.state[p] = values
                if lent is not None:
                    self._lent[p] = lent


def _switch_off(group: dict[str, Any]) -> None:
    """Options given as None are off."""
    for key in FLAGS:
        if key in group and group[key] is None:
            group[key] = False


_ABSENT = object()

"""The base class of all optimizers, with the one step() of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _backends, _checkpoint, _checks, _compiled, _ema, _hooks
from ._options import DEFAULTS, GROUP_OPTIONS, StepOptions, check_options
from ._rule import EMA, FLAGS, Group, Rule, Slot
from ._runners import Around, Member, Runner, make_runner
from ._values import number

__all__ = ["FusedOptimizer"]

#: (parameter, name, value before) of each state that a step created, to be undone if it fails
Created = list[tuple[Tensor, str, Any]]
#: GradScaler's grad_scale, None if gradients are unscaled already, and its found_inf
Scaling = tuple[Tensor | None, Tensor | None] | None


class FusedOptimizer(Optimizer):
    """Steps all parameters of all groups in one pass.

    A subclass declares its :class:`Rule` and has a constructor with a signature.

    Args:
        params: parameters, named parameters or groups, as in torch.optim.
        defaults: the groups' default values.
        options: see :class:`fusedoptim.StepOptions`.

    Raises:
        ValueError: for values, parameters, gradients and states that cannot be stepped; nothing is written then.
        RuntimeError: if the backend asked for cannot be used here.
    """

    rule: ClassVar[Rule]
    #: Set it to True on an optimizer to have GradScaler leave unscaling and skipping to the step. False, as here, is
    #: the ordinary way, which PyTorch Lightning's gradient clipping asks for.
    _step_supports_amp_scaling: bool = False
    found_inf: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("step")
        if own is not None and not hasattr(own, "hooked"):
            cls.step = _hooks.with_hooks(own)  # type: ignore[method-assign]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: StepOptions) -> None:
        check_options(options, type(self))
        defaults |= {name: options.get(name) for name in GROUP_OPTIONS}
        _switch_off(defaults)
        self._check_group(defaults)
        self._options: dict[str, Any] = {name: options.get(name, default) for name, default in DEFAULTS.items()}
        self._norm_stats: dict[torch.device, Tensor] = {}
        self._averaging = False  # within ema_weights()
        if self._options["zero_grad_in_step"]:  # a scaler that skips the step itself would leave the gradients
            self._step_supports_amp_scaling = True
        self._runners: list[Runner] | None = None
        self._captured: list[Runner] = []
        #: The parameters of all groups, for compiled steps, which must not look at the groups.
        self._all_params: list[Tensor] = []
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

    def _step(self) -> None:
        self._check_not_averaging()
        self._opt_called = True
        runners = self._runners
        if runners and len(runners) > 1 and self._measures_norm():
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
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph, because it sets up states and tables: take a step before"
                " the capture, and none that changes groups, states, dtypes or memory layouts in between"
            )
        self._drop_runners()
        self._all_params = [p for group in self.param_groups for p in group["params"]]
        created: Created = []
        had_state = set(self.state)
        runners: list[Runner] = []
        ran = 0
        try:
            runners = self._prepare(created)
            for runner in runners:  # one that raises has written nothing
                if scaling is None:
                    runner.run()
                else:
                    runner.run_scaled(*scaling)
                ran += 1
        except BaseException:
            if ran == 0:
                self._undo(created, had_state)
            raise
        if self._was_skipped(scaling):
            self._undo(created, had_state)
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

    def _prepare(self, created: Created) -> list[Runner]:
        """Runners that are ready to run. What is changed in the states is noted in ``created``."""
        runners = []
        members = self._members(created)
        if len(members) > 1 and self._measures_norm():
            raise ValueError(
                f"max_grad_norm and skip_nonfinite need all parameters on one device, but they are on "
                f"{', '.join(sorted(map(str, members)))}: use torch.nn.utils.clip_grad_norm_ before the step"
            )
        stats = self._norm_stats = self._stats_on(members)
        for device, of_device in members.items():
            backend = _backends.choose(self._options["backend"], device)
            if self.rule.has_step and _backends.BACKENDS[backend].steps_on_device:
                self._move_steps([m.param for m in of_device], device, created)
            around = Around(stats[device], self._options["skip_nonfinite"], self._options["zero_grad_in_step"])
            runner = make_runner(backend, self.rule, device, around)
            runner.build(self.param_groups, self.state, of_device)
            if not runner.refresh(self.param_groups, self.state):
                raise RuntimeError(f"a plan does not fit what it was made from ({runner.reason}): please report this")
            runners.append(runner)
        return runners

    def _undo(self, created: Created, had_state: set[Tensor]) -> None:
        for p, name, old in reversed(created):
            if old is _ABSENT:
                del self.state[p][name]
            else:
                self.state[p][name] = old
            if p not in had_state and not self.state[p]:
                del self.state[p]

    def _members(self, created: Created) -> dict[torch.device, list[Member]]:
        """Every parameter that can be stepped, by device. New states are noted in ``created``."""
        name = type(self).__name__
        names = self.rule.state_names()
        members: dict[torch.device, list[Member]] = {}
        steps: list[tuple[Group, Tensor]] = []
        tensors: list[tuple[str, Group, int, int, Tensor]] = []
        _checks.check_lists(self.param_groups)
        for index, group in enumerate(self.param_groups):
            _checks.check_step_values(group, self.rule, index)
            for i, p in enumerate(group["params"]):
                who = _checks.describe(group, index, i)
                _checks.check_param(p, who, name)
                if p.grad is not None:
                    _checks.check_grad(p, who, name)
                    if p.grad.is_neg():  # the kernels read memory, which does not show a negation still owed
                        p.grad = p.grad.resolve_neg()
                    if self._options["zero_grad_in_step"]:
                        _checks.check_written_grad(p.grad, who)
                        tensors.append(("the gradient of ", group, index, i, p.grad))
                state = self.state.get(p, {})
                if not isinstance(state, dict):
                    raise ValueError(f"the state of {who} must be a dict, but is {state!r}")
                self._convert_average(p, state, created)
                _checks.check_states(p, state, self.rule, who)
                tensors.append(("", group, index, i, p))
                states = [(n, s) for n in names if isinstance(s := state.get(n), Tensor)]
                tensors += [(f"state {n!r} of ", group, index, i, s) for n, s in states]
                if p.grad is not None:
                    _checks.check_names(state, self.rule, who, name)
                    steps.append((group, p))
        _checks.check_memory(tensors)
        fresh: set[Tensor] = set()
        for owner, p in steps:
            if self._create_missing_states(owner, p, created):
                fresh.add(p)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                members.setdefault(p.device, []).append(Member(index, p, p in fresh))
        return members

    # ---- states ----

    def _convert_average(self, p: Tensor, state: dict[str, Any], created: Created) -> None:
        """To the compute dtype, which another than the one before may be after ``model.double()``."""
        average, dtype = state.get(EMA), _checks.compute_dtype(p)
        if isinstance(average, Tensor) and average.is_floating_point() and average.dtype != dtype:
            created.append((p, EMA, average))
            state[EMA] = average.to(dtype)

    def _create_missing_states(self, group: Group, p: Tensor, created: Created | None = None) -> bool:
        """Adds the states that the group needs and the parameter lacks. True if one of them counts as absent."""
        missing = [n for n in self.rule.state_names(group) if self.state.get(p, {}).get(n) is None]
        if created is None:  # no step yet, before which a parameter may still be given other values
            missing = [n for n in missing if n != EMA]
        absent = False
        slots = {s.name: s for s in self.rule.slots}
        for name in missing:
            value = self._new_state(name, slots.get(name), p)
            if created is not None:
                created.append((p, name, self.state[p].get(name, _ABSENT)))
            self.state[p][name] = value
            absent = absent or (name in slots and slots[name].starts_absent)
        return absent

    @torch.no_grad()
    def _new_state(self, name: str, slot: Slot | None, p: Tensor) -> Tensor:
        if slot is None:
            if name == "step":
                double = torch.get_default_dtype() == torch.float64
                return torch.tensor(0.0, dtype=torch.float64 if double else torch.float32, device="cpu")
            if name == EMA:  # starts as the parameter
                return p.detach().to(_checks.compute_dtype(p), copy=True, memory_format=torch.preserve_format)
            return torch.zeros((), dtype=torch.float32, device=p.device)
        dtype = self._options["state_dtype"] or p.dtype
        fill = number(self.defaults[slot.initial]) if slot.initial else 0
        return torch.full_like(p, fill, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def _move_steps(self, params: list[Tensor], device: torch.device, created: Created) -> None:
        """Moves steps that are on the CPU to the device, in one copy: they become views of one buffer."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in params:
            step = self.state.get(p, {}).get("step")
            if step is not None and step.device != device:
                by_dtype.setdefault(step.dtype, []).append(p)
        for of_dtype in by_dtype.values():
            steps = torch.stack([self.state[p]["step"].reshape(()) for p in of_dtype]).to(device)
            for p, step in zip(of_dtype, steps.unbind(), strict=True):
                created.append((p, "step", self.state[p]["step"]))
                self.state[p]["step"] = step

    # ---- what a step measured ----

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
            g["max_grad_norm"] is not None and g["params"] for g in self.param_groups
        )

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, unscaled and not clipped: a 0-dim tensor on their device, fp32,
        or fp64 if a parameter has fp64. Reading it waits for nothing. Steps measure it with ``max_grad_norm`` or
        ``skip_nonfinite``: None without, and NaN until the first such step."""
        if not self._measures_norm() or not self._norm_stats:
            return None
        (stats,) = self._norm_stats.values()
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
            if group["ema_decay"] is not None and self.state.get(p, {}).get(EMA) is not None
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

    # ---- groups, checkpoints, copies ----

    def _check_group(self, group: Group) -> None:
        _checks.check_common(group, self.rule, type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does. Its values and parameters are checked first."""
        if isinstance(param_group, dict):
            _switch_off(param_group)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        self._all_params = [p for g in self.param_groups for p in g["params"]]
        try:
            for i, p in enumerate(group["params"]):
                _checks.check_param(p, _checks.describe(group, index, i), type(self).__name__)
        except ValueError:
            del self.param_groups[-1]
            self._all_params = [p for g in self.param_groups for p in g["params"]]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of its namesake in torch.optim.

        Every state keeps the dtype that it was saved in (torch casts it to its parameter's), and is copied: two
        optimizers never share one.

        Raises:
            ValueError: if it is another optimizer's, or does not fit; nothing is loaded then.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError("this is not an optimizer's state_dict: it needs the keys 'state' and 'param_groups'")

        def keep(optimizer: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            return _checkpoint.keep_dtypes(final, self.param_groups, self.rule, type(self).__name__)

        # Registered last, so that it sees what the user's own hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._options = {**DEFAULTS, **self.__dict__.get("_options", {})}
        self.defaults = {**dict.fromkeys(GROUP_OPTIONS), **self.defaults}
        self.__dict__.setdefault("_norm_stats", {})
        self.__dict__.setdefault("_averaging", False)
        if self._options["zero_grad_in_step"]:
            self._step_supports_amp_scaling = True
        self.__dict__.setdefault("_runners", None)
        self.__dict__.setdefault("_captured", [])
        self._drop_runners()
        self._all_params = [p for group in self.param_groups for p in group["params"]]
        if "_name" not in self.__dict__:
            self._name = _compiled.register(self)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            _switch_off(group)
            for p in group["params"]:
                if p in self.state:
                    values = self.state[p]
                    for name, value in values.items():
                        values[name] = _checkpoint.restored(name, value, p)


def _switch_off(group: dict[str, Any]) -> None:
    """Options given as None are off."""
    for key in FLAGS:
        if key in group and group[key] is None:
            group[key] = False


_ABSENT = object()

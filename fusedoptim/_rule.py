"""How an optimizer declares itself: its hyper-parameters, its states, its reference function."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Group = Mapping[str, Any]
#: ``reference(param, grad, states, step, group)`` updates ``param`` and the tensors in ``states`` in place, and sets
#: those states that are numbers. Tensors are contiguous and of the compute dtype; ``step`` counts from 1. A state that
#: is ``None`` is absent so far.
Reference = Callable[[Tensor, Tensor, dict[str, Any], float, Group], None]


#: The moving average of the parameter that any group can have.
EMA = "ema"


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included: where an end is open, the number next to it is given. NaN is
    in none."""

    low: float
    high: float
    #: What a number must be, in words.
    text: str
    #: Whether they are integers, of which no bool is one.
    whole: bool = False

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high and not (self.whole and x % 1)


#: Scalars are rounded to fp32 and must not overflow it: up to here neither does ``lr * weight_decay`` nor
#: ``lr / (1 - beta**t)``, whose divisor is at least 2**-53. torch raises only where one overflows, amid a step. Groups
#: of fp64 parameters have the same limit, so that a group means the same in every dtype.
LARGEST = 1e18
NUMBER = Range(-LARGEST, LARGEST, f"finite, and at most {LARGEST:g} in size")
#: For what is added to a divisor, and to nothing else.
FP32 = Range(-3.4028234663852886e38, 3.4028234663852886e38, "finite in float32")
AT_LEAST_0 = Range(0.0, LARGEST, f"at least 0 and at most {LARGEST:g}")
BELOW_1 = Range(0.0, math.nextafter(1.0, 0.0), "at least 0 and below 1")
#: A group's numbers are doubles: from 2**53 on some integers are none.
SEED = Range(0.0, 2.0**53 - 1, "a whole number from 0 to 2**53 - 1", whole=True)
#: Infinity, as a limit, limits nothing.
ABOVE_0 = Range(math.ulp(0.0), math.inf, "above 0")
#: torch.optim's own.
TORCH_AT_LEAST_0 = Range(0.0, math.inf, "at least 0")


#: Of a number that every group must have.
REQUIRED: Any = object()


@dataclass(frozen=True)
class Hyper:
    """A number that a group has, or one of several that it has under one key."""

    key: str
    #: Which of them, or -1 for one that is the key's value.
    index: int = -1
    #: What a step accepts, and so does a constructor.
    accepts: Range = NUMBER
    #: In a constructor's message, "Invalid <label>: <value>"; by default the key.
    label: str = ""
    #: What torch.optim's own constructor accepts; it refuses all else with that message. None if it checks nothing.
    constructor: Range | None = None
    #: Whether None turns it off.
    optional: bool = False
    #: For what torch.optim's groups do not have: its value where it is off, which is what a group without it has.
    off: Any = REQUIRED
    #: What torch.optim makes of a group without it, for what its older versions did not have.
    absent: Any = REQUIRED
    #: How many there are under the key.
    count: int = 2
    #: In the message for what is no number: what to do.
    instead: str = ""

    @property
    def off_number(self) -> float | None:
        """What a plan has in its table where it is off: options of all rules have -1. None if it never is."""
        return None if self.off is REQUIRED else -1.0 if self.off is None else float(self.off)


def at_least_0(key: str, label: str = "", accepts: Range = NUMBER, absent: Any = REQUIRED) -> Hyper:
    """One that torch.optim's constructor wants to be at least 0, and its step takes as it is."""
    return Hyper(key, accepts=accepts, label=label or f"{key} value", constructor=TORCH_AT_LEAST_0, absent=absent)


def betas(count: int = 2) -> tuple[Hyper, ...]:
    """Decay rates under one key, with torch.optim's messages."""
    labels = [f"beta parameter at index {i}" for i in range(count)]
    return tuple(Hyper("betas", i, BELOW_1, labels[i], BELOW_1, count=count) for i in range(count))


@dataclass(frozen=True)
class Flag(Hyper):
    """One that is on or off, where torch.optim takes None for off."""

    absent: Any = False


#: Of every rule.
LR = at_least_0("lr", "learning rate")
#: Of every group, beside its rule's.
AROUND = (
    Hyper("max_grad_norm", accepts=ABOVE_0, optional=True, off=None),
    Hyper("clip_grad_value", accepts=ABOVE_0, optional=True, off=None),
    Hyper("ema_decay", accepts=BELOW_1, optional=True, off=None),
    Hyper("rounding_seed", accepts=SEED, off=0),
)
#: What a group may ask for of how its parameters and states are stored, with the values that ask for nothing
#: (_storage.py).
STORAGE: dict[str, Any] = {"master": None, "state_dtype": None, "rounding": "auto"}
#: All that a group may have beside what its rule has, with the values that are off.
GROUP_OPTIONS: dict[str, Any] = {**{hyper.key: hyper.off for hyper in AROUND}, **STORAGE}
#: Of states: averages or sums of squares, which are never negative and move slowly; maxima of such.
SQUARES, MAXIMUM = "squares", "maximum"


@dataclass(frozen=True)
class State:
    """A state with the parameter's shape, and in its dtype unless the group's ``state_dtype`` says otherwise; or, among
    a rule's ``numbers``, one number. ``State("exp_avg")`` starts as zeros.

    Args:
        name: its key in ``optimizer.state[p]`` and in what the function gets.
        needed: the groups that need it: a function of the group; all of them if None.
        starts_absent: on a tensor's first step it counts as absent, None, instead of as zeros.
        initial: the value that it starts with: a number, the key of one in the optimizer's defaults, or a function of
            the group.
        kind: ``"squares"`` of averages or sums of squares, ``"maximum"`` of maxima of such, else empty.
    """

    name: str
    needed: Callable[[Group], bool] | None = None
    starts_absent: bool = False
    initial: float | str | Callable[[Group], float] = 0.0
    kind: str = ""

    def needed_in(self, group: Group) -> bool:
        """Whether parameters of a group have it."""
        return self.needed is None or bool(self.needed(group))


@dataclass(frozen=True)
class Rule:
    """An update rule: a function, and the names of what it works on.

    Kernels are compiled ahead for the package's own (csrc/rules): the names of ``hyper`` and ``states`` are theirs, in
    their order, which whoever makes a plan compares. For any other rule they are made of ``reference``, which is run on
    symbols for it, once for a combination of conditions on the group's values. What it reads from elsewhere, such as a
    module's variable, has in them the value of that moment: what may change belongs into the group.
    ``Rule("lion", lion, states=(State("exp_avg"),))`` is one; most need no more.

    Args:
        name: of the rule, in messages.
        reference: the function of the update, ``reference(p, g, s, t, h)``, as fusedoptim/guides/own_rules.md
            explains.
        hyper: the numbers of a group, with their ranges. Where neither they nor ``constants`` are declared, both follow
            from the optimizer's defaults.
        states: those with the parameter's shape.
        constants: keys of a group whose values are no numbers: the function gets them as they are.
        initial: numbers that are read where states are made, and by no step.
        check: raises ValueError for values of a group that are in their ranges, but do not go together.
        has_step: whether a 0-dim tensor ``step`` per parameter counts the steps.
        numbers: states that are one number per parameter, in a 0-dim fp32 tensor: the function gets and sets them as
            numbers.
        sums: how many sums of squares over whole tensors the function asks for, with norm() or mean_square().
        states_at_construction: whether an optimizer has its states before its first step.
        sparse_alternative: the optimizer of torch.optim that takes the sparse gradients which this one does not.

    Raises:
        TypeError: for states that are no :class:`State`, and a function that is none.
    """

    name: str
    reference: Reference
    hyper: tuple[Hyper, ...] = ()
    states: tuple[State, ...] = ()
    constants: tuple[str, ...] = ()
    initial: tuple[Hyper, ...] = ()
    check: Callable[[Group], None] = lambda group: None
    has_step: bool = True
    numbers: tuple[State, ...] = ()
    sums: int = 0
    states_at_construction: bool = False
    sparse_alternative: str = "SGD"

    def __post_init__(self) -> None:
        for name in ("hyper", "states", "constants", "initial", "numbers"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"Rule({self.name!r}, {name}={value!r}): several of them are a tuple, ({value!r},)")
            object.__setattr__(self, name, tuple(value))
        if not callable(self.reference):
            raise TypeError(
                f"Rule({self.name!r}, {self.reference!r}): the second argument is the function of the update, called "
                "with p, g, s, t, h"
            )
        try:
            hash(self.reference)
            weakref.ref(self.reference)
        except TypeError as error:
            raise TypeError(
                f"Rule({self.name!r}, {self.reference!r}): programs are known by their function, and this one has no "
                f"hash, or no weak reference ({error}): pass a plain one"
            ) from None
        wrong = [x for x in (*self.states, *self.numbers) if not isinstance(x, State)]
        if wrong:
            raise TypeError(f"rule {self.name!r} has the state {wrong[0]!r}: write State({str(wrong[0])!r})")

    @property
    def row(self) -> tuple[Hyper, ...]:
        """All that a step reads of a group, in the order of the compiled rule's rows (csrc/rules/common.h)."""
        return (LR, *AROUND, *self.hyper)

    @property
    def extensions(self) -> dict[str, Any]:
        """The keys that torch.optim's groups do not have, with their values where they are off."""
        return {hyper.key: hyper.off for hyper in self.row if hyper.off is not REQUIRED} | STORAGE

    @property
    def flags(self) -> list[str]:
        """The keys of groups that are on or off."""
        return [hyper.key for hyper in self.hyper if isinstance(hyper, Flag)]

    @property
    def absent(self) -> dict[str, Any]:
        """What torch.optim makes of a group of one of its older versions, by the keys that these did not have."""
        own = {h.key: h.absent for h in self.hyper if h.absent is not REQUIRED and h.off is REQUIRED}
        return {"capturable": False, "differentiable": False, "foreach": None, "fused": None, **own}

    def required_states(self) -> set[str]:
        """The states that every group needs."""
        names = {s.name for s in self.states if s.needed is None}
        names |= {s.name for s in self.numbers if s.needed is None}
        return names | ({"step"} if self.has_step else set())

    @property
    def number_names(self) -> list[str]:
        """Of the states that are one number for a parameter."""
        return [s.name for s in self.numbers]

    def signature(self) -> set[str]:
        """The states by which one knows whose a checkpoint is: those that all groups need, or else all that one may."""
        return self.required_states() or {s.name for s in self.states}

"""What runs the steps of one device's parameters: the interface of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ._members import BoundParam

Groups = list[dict[str, Any]]
States = dict[Any, Any]


@dataclass(frozen=True)
class StepSettings:
    """What an optimizer's steps do around the rule, beside what its groups say."""

    #: Two fp64 numbers on the device, which steps write: the norm of all gradients, and how many steps were skipped
    #: because it was not finite.
    norm_stats: Tensor
    skip_nonfinite: bool
    zero_grad: bool


class CannotCompile(RuntimeError):
    """A rule's function can step the parameters, and nothing that is compiled of it can."""


class Steps(Protocol):
    """What an optimizer keeps for its next steps."""

    @property
    def reason(self) -> str:
        """Why refresh() returned False."""

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds on to its tables, so that it must outlive its use here."""

    def retire(self) -> None:
        """Lets go of everything else. It is not used again."""

    def refresh(self, groups: Groups, state: States) -> bool:
        """Looks up gradients and hyper-parameters; False if another runner has to be built. Writes nothing."""

    def run(self) -> None:
        """Steps every member that has a gradient; raises before the first write, or not at all."""

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The same with gradients divided by the scale; changes nothing if found_inf is not 0."""


class Runner(Steps, Protocol):
    """Steps the parameters on one device.

    The parts of a step are for whoever has something to do between them, as adding the sums of other processes. run()
    is all of them, with as few launches as it takes.
    """

    settings: StepSettings

    def build(
        self,
        groups: Groups,
        state: States,
        members: Sequence[BoundParam],
        dormant: Sequence[Tensor],
        wide: bool = False,
    ) -> None:
        """Prepares to step the members, once, for as long as the dormant parameters have no gradient.

        Args:
            wide: whether the norm of all gradients is kept in fp64 in any case: a tensor that is elsewhere has it.
        """

    def release(self) -> None:
        """Lets go of the gradients that refresh() looked up, for a step that does not come."""

    @property
    def numbers(self) -> Tensor:
        """The sums, and one more that is 0: for how many ranks refuse the step (_exchange.py)."""

    @property
    def sums(self) -> Tensor:
        """An fp64 number per parameter of all groups, on the device. measure() writes them, the others read them."""

    def measure(self, of_rule: int | None = None, grad_scale: Tensor | None = None) -> None:
        """Writes sums of squares, 0 where there is no gradient: of the unscaled gradients, or that which of its sums
        the rule asks for, in their order from 0 on: who measures one may as well measure those after it."""

    def reduce(self) -> None:
        """Makes the norm of all gradients, in the settings' ``norm_stats``, of the sums."""

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Steps every member that has a gradient, with that norm; a rule takes the sums that were measured for it."""

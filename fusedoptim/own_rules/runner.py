"""Steps with what is compiled of a user's rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _native
from .._dtypes import compute_dtype
from .._members import BoundParam
from .._native_runner import NativeRunner
from .._rule import Rule
from .._runners import Groups, States, StepSettings
from .._values import numbers
from . import libraries
from .programs import programs_of
from .verify import gives_the_functions_bits


class WrongBits(RuntimeError):
    """A compiled program has other results than the rule's function."""


class OwnRunner(NativeRunner):
    """On the CPU. What a plan lacks is compiled when it says so."""

    def __init__(self, rule: Rule, settings: StepSettings) -> None:
        self.rule, self.settings = rule, settings

    def build(
        self,
        groups: Groups,
        state: States,
        members: Sequence[BoundParam],
        dormant: Sequence[Tensor],
        wide: bool = False,
    ) -> None:
        assert _native._C is not None
        used = sorted({m.group for m in members})
        values = [numbers(groups[k], self.rule) for k in used]
        programs = programs_of(self.rule, values)
        while True:
            capability = _native._C.cpu_capability()
            self.make_plan(libraries.handle(self.rule, programs, capability))
            super().build(groups, state, members, dormant, wide)
            if self.plan.refresh(groups, state) or not self.plan.lacking:
                break
            libraries.provide(programs, [libraries.Need(*need) for need in self.plan.lacking], capability)
        self._verify(groups, members)

    def _verify(self, groups: Groups, members: Sequence[BoundParam]) -> None:
        seen = {(m.group, compute_dtype(m.param)) for m in members}
        for k, dtype in sorted(seen, key=str):
            values = numbers(groups[k], self.rule)
            (program,) = programs_of(self.rule, [values])
            if not gives_the_functions_bits(program, groups[k], dtype, "cpu"):
                raise WrongBits(f"what was compiled of the rule {self.rule.name!r} has other bits than its function")

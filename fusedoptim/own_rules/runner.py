"""Steps with what is compiled of a user's rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._backends import triton_interprets
from .._members import BoundParam
from .._native_runner import GpuRunner, NativeRunner
from .._rule import Rule
from .._runners import CannotCompile, Groups, States, StepSettings
from .._values import numbers
from . import compiler, libraries
from .programs import constants_number, programs_of
from .trace import Program
from .verify import Make, gives_the_functions_bits

#: Of one plan (kMaxPrograms in csrc/rules/program_code.h).
MOST_PROGRAMS = 16


def _programs(rule: Rule, groups: Groups, members: Sequence[BoundParam]) -> tuple[list[Program], list[float]]:
    """The programs of the groups that have members, and for each group what guards know of its constants."""
    constants = [constants_number(rule, group) for group in groups]
    found = programs_of(rule, [numbers(groups[k], rule) for k in sorted({m.group for m in members})])
    if len(found) > MOST_PROGRAMS:
        raise CannotCompile(f"its groups need {len(found)} programs, and {MOST_PROGRAMS} are the most")
    return found, constants


def _verify(rule: Rule, groups: Groups, members: Sequence[BoundParam], device: torch.device, make: Make) -> None:
    for k, dtype in {(m.group, m.param.dtype): None for m in members}:
        if not gives_the_functions_bits(rule, numbers(groups[k], rule), dtype, device, make):
            raise CannotCompile("what was compiled has other bits than the function; please report this")


class OwnCpuRunner(NativeRunner):
    """What its plan lacks is compiled when it says so."""

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
        programs, constants = _programs(self.rule, groups, members)
        lacked = None
        while True:
            capability = _native._C.cpu_capability()
            super().__init__(self.rule, self.settings, handle=libraries.handle(self.rule, programs, capability))
            self.constants = constants
            super().build(groups, state, members, dormant, wide)
            if self.plan.refresh(groups, state) or not self.plan.lacking:
                break
            if lacked == (lacked := self.plan.lacking):
                raise CannotCompile(f"its libraries lack what they were compiled for, {lacked}; please report this")
            try:
                libraries.provide(programs, [libraries.Need(*need) for need in lacked], capability)
            except compiler.CompilerError as error:
                raise CannotCompile(str(error)) from None
        _verify(self.rule, groups, members, self.device, lambda settings: OwnCpuRunner(self.rule, settings))


class OwnTritonRunner(GpuRunner):
    def __init__(self, rule: Rule, settings: StepSettings, device: torch.device) -> None:
        self.rule, self.settings, self.device = rule, settings, device

    def build(
        self,
        groups: Groups,
        state: States,
        members: Sequence[BoundParam],
        dormant: Sequence[Tensor],
        wide: bool = False,
    ) -> None:
        from .triton_module import functions_of

        programs, constants = _programs(self.rule, groups, members)
        handle = libraries.handle(self.rule, programs, None)
        super().__init__(self.rule, self.settings, self.device, "triton", handle, functions_of(programs))
        self.constants = constants
        super().build(groups, state, members, dormant, wide)
        if not triton_interprets():  # takes a second, and rounds an fma twice before Triton 3.9
            make: Make = lambda settings: OwnTritonRunner(self.rule, settings, self.device)  # noqa: E731
            _verify(self.rule, groups, members, self.device, make)

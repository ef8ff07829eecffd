"""Steps with what is compiled of rules' functions: of users' own on the CPU, of all in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._backends import is_own, triton_interprets
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
MOST_PROGRAMS = 64


def _programs(rule: Rule, groups: Groups, members: Sequence[BoundParam]) -> tuple[list[Program], list[float]]:
    """The programs of the groups that have members, and for each group what guards know of its constants."""
    values = [numbers(group, rule) for group in groups]
    constants = [constants_number(rule, group) for group in values]
    found = programs_of(rule, [values[k] for k in sorted({m.group for m in members})])
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


class TritonRunner(GpuRunner):
    """What the package's own rules are printed as is known to have their functions' bits; users' are run against them
    first."""

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
        from ..triton_kernels.device import TritonDevice
        from .triton_module import functions_of

        programs, constants = _programs(self.rule, groups, members)
        launcher = TritonDevice(self.device, functions_of(programs))
        handle = libraries.handle(self.rule, programs, None)
        super().__init__(self.rule, self.settings, self.device, launcher, handle)
        self.constants = constants
        super().build(groups, state, members, dormant, wide)
        # The interpreter takes a second, and rounds an fma twice before Triton 3.9.
        if is_own(self.rule) and not triton_interprets():
            make: Make = lambda settings: TritonRunner(self.rule, settings, self.device)  # noqa: E731
            _verify(self.rule, groups, members, self.device, make)

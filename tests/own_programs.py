"""Rules of one's own that are written by hand in C++, in own_rules: compiled when a plan lacks something, and stepped
by plans."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusedoptim import _backends, _native, _prepare
from fusedoptim._native_runner import NativeRunner
from fusedoptim._rule import Rule

TESTS = Path(__file__).parent
CSRC = os.environ.get("FUSEDOPTIM_TEST_CSRC") or TESTS.parent / "csrc"
CXX = os.environ.get("CXX") or "g++"
needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(CXX)[0]) is None or _native._C is None, reason="needs a C++ compiler and the library"
)
OPTIONS = [
    *("-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"),
    *shlex.split(os.environ.get("CXXFLAGS", "")),
]
ISA = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
#: What a program is to have: a mix of storages, or the loop over tiles.
Need = tuple[int, bool, tuple[int, ...], bool]


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def storage_name(number: int) -> str:
    return next(name for name, n in _native._C.storages().items() if n == number)


def mix(storages: tuple[int, ...], second_moment: int) -> str:
    """That of a parameter, a gradient and states, -1 for one that is not used."""
    param, grad, *states = storages
    used = [s for k, s in enumerate(states) if s >= 0 and k != second_moment]
    state = used[0] if used else grad
    second = states[second_moment] if second_moment >= 0 and states[second_moment] >= 0 else state
    names = ", ".join(f"fusedoptim::Storage::{storage_name(s)}" for s in (param, grad, state, second))
    return f"fusedoptim::Mix<{names}>"


@functools.cache
def compiled(header: str, isa: str, need: Need, second_moment: int) -> int:
    """The address of the code of a program."""
    program, wide, storages, tiles = need
    linear = "" if tiles else mix(storages, second_moment)
    source = Path(folder().name) / f"{header}-{compiled.cache_info().misses}.cpp"
    source.write_text(
        f'#include "cpu/own_program.h"\n#define PROGRAM {program}\n#define TILES {str(tiles).lower()}\n'
        f'#define LINEAR fusedoptim::MixList<{linear}>\n#include "{TESTS / "own_rules" / header}.h"\n'
        f"FUSEDOPTIM_PROGRAM(Own, {'F64' if wide else 'F32'})\n"
    )
    library = source.with_suffix(".so")
    command = [*shlex.split(CXX), *OPTIONS, *ISA[isa], str(source), "-o", str(library)]
    subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})
    loaded = ctypes.CDLL(str(library))
    loaded.fusedoptim_program.restype = ctypes.c_void_p
    address = loaded.fusedoptim_program()
    assert isinstance(address, int)
    return address


class Programs:
    """What is compiled of a rule so far, for the instruction set in use.

    Args:
        guards: of each program; states: those that it uses, as bits.
    """

    def __init__(
        self, header: str, rule: Rule, guards: list[list[tuple[str, float]]], states: int, second_moment: int = -1
    ) -> None:
        self.header, self.rule, self.guards, self.states = header, rule, guards, states
        self.second_moment = second_moment
        #: Of groups, what stands for their constants in guards.
        self.number_constants: Callable[[Any], list[float]] = lambda groups: []
        self.needs: list[Need] = []

    def handle(self) -> Any:
        rule, isa = self.rule, _native._C.cpu_capability()
        codes: list[list[int]] = [[] for _ in self.guards]
        for need in self.needs:
            codes[need[0]].append(compiled(self.header, isa, need, self.second_moment))
        return _native._C.RuleHandle(
            name=rule.name,
            hyper_names=[h.key if h.index < 0 else f"{h.key}[{h.index}]" for h in rule.hyper],
            state_names=[s.name for s in rule.states],
            number_names=rule.number_names,
            has_step=rule.has_step,
            sums=rule.sums,
            divides=True,
            second_moment=self.second_moment,
            programs=[(guard, self.states, 0, of) for guard, of in zip(self.guards, codes, strict=True)],
        )

    @contextmanager
    def in_use(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Optimizers without ``backend="reference"`` are stepped with them."""
        with monkeypatch.context() as m:
            make = _prepare.make_runner

            def make_runner(backend: str, *args: Any) -> Any:
                if backend != "cpu":
                    return make(backend, *args)
                rule, _, settings = args
                return Compiling(self, rule, settings)

            m.setattr(_backends, "is_own", lambda rule: False)
            m.setattr(_prepare, "make_runner", make_runner)
            yield


class Compiling(NativeRunner):
    """Makes another plan where one lacks something."""

    def __init__(self, programs: Programs, rule: Rule, settings: Any) -> None:
        self.programs = programs
        self.begin(rule, settings)

    def begin(self, rule: Rule, settings: Any) -> None:
        super().__init__(rule, settings, handle=self.programs.handle())
        self.refresh: Callable[..., bool] = self.refresh_or_compile

    def build(self, *args: Any) -> None:
        self.built_from = args
        self.constants = self.programs.number_constants(args[0])
        super().build(*args)

    def refresh_or_compile(self, groups: Any, state: Any) -> bool:
        if self.plan.refresh(groups, state):
            return True
        if not self.plan.lacking:
            return False
        self.programs.needs += [(p, wide, tuple(storages), tiles) for p, wide, storages, tiles in self.plan.lacking]
        self.begin(self.rule, self.settings)
        self.build(*self.built_from)
        return bool(self.plan.refresh(groups, state))

"""The compiled libraries of a rule's programs, and the handle by which a plan knows the rule."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import _native
from .._rule import Rule
from . import compiler
from .cpp import Loops, library, scalar_bytes
from .programs import divides, guard, second_moment, states_mask, summed_mask
from .trace import Program


class Need(NamedTuple):
    """A loop that a plan found none for, as it says so (csrc/python/plan.h)."""

    program: int
    #: Whether it computes in fp64.
    wide: bool
    #: Of the parameter, the gradient and each state, by number; -1 for what is not there.
    storages: list[int]
    #: Whether only the loop over tiles can take it.
    tiles: bool


#: Addresses of what was loaded, by instruction set.
_loaded: weakref.WeakKeyDictionary[Program, dict[str, list[int]]] = weakref.WeakKeyDictionary()
#: For the numbers that operations on elements take (kMaxScalarBytes in csrc/rules/program_code.h).
MOST_BYTES = 1024
_lock = threading.Lock()


def excess(rule: Rule) -> str | None:
    """What a rule has more of than there is room for in tables; None if it has not."""
    try:
        handle(rule, [], None)
    except ValueError as error:
        return str(error)
    return None


def handle(rule: Rule, programs: Sequence[Program], capability: str | None) -> Any:
    """What a plan takes: the rule with these programs, and what is compiled of them.

    Args:
        capability: the CPU's instruction set; None for plans of other devices, which need no library.
    """
    assert _native._C is not None
    with _lock:
        addresses = [list(_loaded.get(p, {}).get(capability, ())) if capability else [] for p in programs]
    return _native._C.RuleHandle(
        rule.name,
        [h.key if h.index < 0 else f"{h.key}[{h.index}]" for h in rule.hyper],
        [s.name for s in rule.states],
        rule.number_names,
        rule.has_step,
        rule.sums,
        divides(programs),
        second_moment(rule),
        [(guard(p), states_mask(p), summed_mask(p), found) for p, found in zip(programs, addresses, strict=True)],
    )


def provide(programs: Sequence[Program], needs: Iterable[Need], capability: str) -> None:
    """Compiles and loads what a plan lacks.

    Raises:
        CompilerError: with what the compiler says, or for a program with too many numbers.
    """
    by_library: dict[tuple[int, bool], list[Need]] = {}
    for need in needs:
        by_library.setdefault((need.program, need.wide), []).append(need)
    for (index, wide), of_library in by_library.items():
        program = programs[index]
        size = scalar_bytes(program, wide)
        if size > MOST_BYTES:
            raise compiler.CompilerError(
                f"its operations on elements take numbers of {size} bytes, and {MOST_BYTES} are the most: combine "
                "numbers before they meet elements"
            )
        address = compiler.load(library(program, _loops(program, wide, of_library)), capability)
        with _lock:
            known = _loaded.setdefault(program, {}).setdefault(capability, [])
            if address not in known:
                known.append(address)


def _loops(program: Program, wide: bool, needs: Sequence[Need]) -> Loops:
    assert _native._C is not None
    names = {number: name for name, number in _native._C.storages().items()}
    second = second_moment(program.rule)
    mixes = set()
    for need in needs:
        if need.tiles:
            continue
        param, grad, *states = (names.get(s, "") for s in need.storages)
        state = next((s for k, s in enumerate(states) if s and k != second), grad)
        of_second = states[second] if second >= 0 and states[second] else state
        mixes.add((param, grad, state, of_second))
    return Loops(wide, tuple(sorted(mixes)), any(need.tiles for need in needs))

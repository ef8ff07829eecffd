"""The compiled rules, and of each the number of states of the parameter's shape that its variants have."""

from __future__ import annotations

from fusedoptim import _native

_C = _native._C
STATES: dict[str, tuple[int, ...]] = (
    {} if _C is None else {rule: tuple(_C.find_rule(rule).states_of_variants) for rule in _C.rules()}
)


def rule_called(struct: str) -> str:
    """The rule that a C++ struct is: NormAdaptive is norm_adaptive."""
    return next(rule for rule in STATES if rule.replace("_", "") == struct.lower())

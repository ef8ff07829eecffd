"""Which rows a run has: all combinations of what was asked for, else a choice, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cases import CASES, Case
from .optimizers import DTYPES, SETTINGS, Work, setting
from .results import Result

#: optimizer, dtype, case, condition
Key = tuple[str, str, str, str]
#: A step of the medium model takes a fifth of the other's.
LARGE, MODEL, MEDIUM = "64M", "gpt2-small", "resnet50"
SMALL = ("2000x64", "2000x1024", "465-groups")


@dataclass(frozen=True)
class Condition:
    """What happens between two steps: gradients are kept, or set to None and created anew; caches are evicted, or a
    step that is not timed comes right before."""

    name: str
    renew: bool = False
    evict: bool = True


CONDITIONS = {
    c.name: c for c in (Condition("kept"), Condition("recreated", renew=True), Condition("warm", evict=False))
}


@dataclass(frozen=True)
class Row:
    work: Work
    case: Case
    condition: Condition

    @property
    def key(self) -> Key:
        return (self.work.setting.name, self.work.dtypes.name, self.case.name, self.condition.name)

    @property
    def gradient_sets(self) -> int:
        return 2 if self.condition.renew else 1

    def describe(self) -> Result:
        return {
            **dict(zip(("optimizer", "dtype", "case", "condition"), self.key, strict=True)),
            **{"tensors": len(self.case.shapes), "groups": self.case.groups, "elements": self.case.elements},
            "bytes": int(self.case.elements * self.work.bytes_per_element),
        }


def row(key: Key) -> Row:
    optimizer, dtype, case, condition = key
    return Row(Work(setting(optimizer), DTYPES[dtype]), CASES[case], CONDITIONS[condition])


def _meaningful(key: Key) -> bool:
    """Whether the optimizer has states for the dtypes to differ in. Options of fusedoptim's are measured with AdamW."""
    optimizer, dtype, _, _ = key
    if DTYPES[dtype].options:
        return optimizer == "AdamW"
    return setting(optimizer).states > 0 or not DTYPES[dtype].mixed


def chosen() -> list[Key]:
    """A choice that covers every optimizer, dtype, case and condition, but not all combinations."""
    keys: list[Key] = [("AdamW", "fp32", case, "kept") for case in (MODEL, LARGE, *SMALL)]
    keys += [("AdamW", "bf16", MODEL, "kept"), ("SGD", "fp32", SMALL[0], "kept")]
    keys += [(o, d, MODEL, "kept") for d in DTYPES for o in SETTINGS]
    keys += [(o, "fp32", case, "kept") for case in (LARGE, MEDIUM) for o in SETTINGS]
    keys += [("AdamW", d, LARGE, "kept") for d in DTYPES]
    keys += [("AdamW", "fp32", case, c) for c in ("recreated", "warm") for case in (*SMALL, "5000-odd", MODEL)]
    keys += [("SGD", "fp32", SMALL[0], "warm")]
    keys += [("AdamW", d, case, "kept") for d in ("fp32", "bf16") for case in CASES]
    return [k for k in dict.fromkeys(keys) if _meaningful(k)]


def combinations(
    optimizers: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], conditions: Sequence[str]
) -> list[Key]:
    keys = [(o, d, case, c) for o in optimizers for d in dtypes for case in cases for c in conditions]
    return [k for k in keys if _meaningful(k)]


def rows(keys: Iterable[Key]) -> list[Row]:
    return [row(key) for key in keys]

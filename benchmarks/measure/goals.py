"""What fusedoptim is to reach. For the tables alone, and without torch, so that they can be judged anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from .results import COPY, OURS, STREAM, Result, ratio_of

#: A goal for the time on the host until step() returns, instead of a ratio to a contender.
HOST = "host"


@dataclass(frozen=True)
class Goal:
    """``of`` a peer: its time over fusedoptim's is to be at least ``value``. Of the copy, or of the plain pass:
    fusedoptim's share of its bandwidth. Of the host: at most so many milliseconds."""

    of: str
    value: float
    #: The ratio to a peer is to be at most so much: for other backends of our own.
    at_most: bool = False

    def __str__(self) -> str:
        if self.at_most:
            return f"{self.of} <= {self.value:g}x"
        if self.of == HOST:
            return f"host <= {self.value * 1e3:g} us"
        return f"{self.value:g} of {self.of}" if self.of in (COPY, STREAM) else f"{self.of} {self.value:g}x"

    def found_in(self, row: Result) -> float | None:
        """What the row has to set against the value. None if it was not measured."""
        if self.of not in (HOST, COPY, STREAM):
            return ratio_of(row, self.of)
        found = row.get("contenders", {}).get(OURS, {}).get("host_ms" if self.of == HOST else f"share_of_{self.of}")
        return None if found is None else float(found)

    def reached_in(self, row: Result) -> bool | None:
        found = self.found_in(row)
        if found is None:
            return None
        return found <= self.value if self.of == HOST or self.at_most else found >= self.value


Key = tuple[str, str, str]


def key(row: Result) -> Key:
    """Optimizer, dtype and case."""
    return row["optimizer"], row["dtype"], row["case"]


FUSED, FOREACH = "torch fused", "torch foreach"
OWN = ("Lion", "NAdam")
#: torch has no fused RMSprop, and a fused Adagrad for the CPU alone.
_FASTEST_ON_CUDA = {"AdamW": FUSED, "SGD": FUSED, "RMSprop": FOREACH, "Adagrad": FOREACH}
_LARGE: dict[tuple[str, str], dict[Key, tuple[Goal, ...]]] = {
    # At 0.95 of the bandwidth, Triton's kernels take 1.053 times as long.
    (o, c): {(o, "fp32", c): (Goal(COPY, 0.93), Goal(peer, 1.0), Goal("Triton backend", 1.053, at_most=True))}
    for o, peer in _FASTEST_ON_CUDA.items()
    for c in ("gpt2-xl", "1G")
}
_NARROW: dict[str, dict[Key, tuple[Goal, ...]]] = {
    c: {("AdamW", d, c): (Goal(COPY, 0.9),) for d in ("bf16", "bf16+fp32")} for c in ("gpt2-xl", "1G")
}
GOALS: dict[str, dict[Key, tuple[Goal, ...]]] = {
    "cpu": {
        **{(o, "fp32", c): (Goal(FUSED, 0.97),) for o in ("AdamW", "SGD", "Adagrad") for c in ("64M", "gpt2-small")},
        **{("AdamW", "bf16", c): (Goal(FUSED, 2.0), Goal(STREAM, 0.93)) for c in ("64M", "gpt2-small")},
        **{("AdamW", "stochastic", c): (Goal("to nearest", 0.97),) for c in ("64M", "gpt2-small")},
        **{("AdamW", "remainder", c): (Goal(STREAM, 0.95),) for c in ("64M", "gpt2-small")},
        **{("RMSprop", "fp32", c): (Goal(FOREACH, 5.0),) for c in ("64M", "gpt2-small")},
        # Rules that are functions, compiled when they are first used.
        **{(o, "fp32", c): (Goal(FOREACH, 4.0), Goal(STREAM, 0.9)) for o in OWN for c in ("64M", "gpt2-small")},
        ("AdamW", "fp32", "2000x64"): (Goal(FUSED, 15.0),),
        ("SGD", "fp32", "2000x64"): (Goal(FUSED, 7.0),),
        ("AdamW", "fp32", "2000x1024"): (Goal(FUSED, 6.0),),
        ("AdamW", "fp32", "465-groups"): (Goal(FUSED, 25.0),),
        ("NormAdaptive", "fp32", "gpt2-small"): (Goal("eager reference", 4.0),),
        # 32 bytes per element instead of 40.
        ("AdamW+clip", "fp32", "gpt2-small"): (Goal(FUSED, 1.2),),
    },
    # The most telling ones first, and those of 16 bits, of which least is known, soon: a run may be cut off.
    "cuda": {
        **_LARGE["AdamW", "gpt2-xl"],
        **_NARROW["gpt2-xl"],
        **_LARGE["SGD", "gpt2-xl"],
        ("AdamW+clip", "fp32", "gpt2-xl"): (Goal(FUSED, 1.2),),
        # 12 bytes per element are what the share counts. Of 1 G elements the gradient is read twice: 0.75 at most.
        ("NormAdaptive", "fp32", "1G"): (Goal(COPY, 0.7),),
        ("NormAdaptive", "fp32", "gpt2-small"): (Goal(COPY, 0.8),),
        ("AdamW", "fp32", "gpt2-small"): (Goal(FUSED, 1.1),),
        ("AdamW", "fp32", "300x1024"): (Goal(HOST, 0.06),),
        ("AdamW", "fp32", "2000x1024"): (Goal(FUSED, 8.0),),
        ("AdamW", "fp32", "465-groups"): (Goal(FUSED, 8.0),),
        **_LARGE["RMSprop", "gpt2-xl"],
        **_LARGE["Adagrad", "gpt2-xl"],
        **_NARROW["1G"],
        **_LARGE["AdamW", "1G"],
        **_LARGE["SGD", "1G"],
        **_LARGE["RMSprop", "1G"],
        **_LARGE["Adagrad", "1G"],
        # As with dense gradients.
        **{("AdamW", d, "embedding-95"): (Goal(COPY, 0.93 if d == "fp32" else 0.9),) for d in ("fp32", "bf16")},
    },
}

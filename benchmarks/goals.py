"""What fusedoptim is to reach, as the ratio to a peer's time. For the tables alone."""

from __future__ import annotations

#: device: (optimizer, dtype, case): (peer, its time over fusedoptim's)
GOALS: dict[str, dict[tuple[str, str, str], tuple[str, float]]] = {
    "cpu": {
        **{(o, "fp32", c): ("torch fused", 0.97) for o in ("AdamW", "SGD", "Adagrad") for c in ("64M", "gpt2-small")},
        **{("AdamW", "bf16", c): ("torch fused", 2.0) for c in ("64M", "gpt2-small")},
        **{("RMSprop", "fp32", c): ("torch foreach", 5.0) for c in ("64M", "gpt2-small")},
        ("AdamW", "fp32", "2000x64"): ("torch fused", 15.0),
        ("SGD", "fp32", "2000x64"): ("torch fused", 7.0),
        ("AdamW", "fp32", "2000x1024"): ("torch fused", 6.0),
        ("AdamW", "fp32", "465-groups"): ("torch fused", 25.0),
        ("NormAdaptive", "fp32", "gpt2-small"): ("eager reference", 4.0),
    },
    "cuda": {},
}

"""Numbers as people read them: three digits that count, a unit that fits, no power of ten."""

from __future__ import annotations

from decimal import Decimal

#: Seconds in a unit of time, the largest first.
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "ps": 1e-12}
SMALLEST = "ps"


def number(value: float) -> str:
    """Of three digits: 0.0321, 3.21, 321, 32100."""
    return f"{Decimal(f'{value:.3g}'):f}"


def duration(seconds: float) -> str:
    """In the largest unit of which there is at least one: 22.1 us for 2.21e-5."""
    rounded = float(f"{seconds:.3g}")
    unit = next((name for name, size in SECONDS.items() if abs(rounded) >= size), SMALLEST)
    return f"{number(rounded / SECONDS[unit])} {unit}"

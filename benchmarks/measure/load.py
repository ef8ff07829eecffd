"""How busy other processes are while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: Cores that others may use before a row counts as disturbed.
DISTURBING = 0.15


class Others:
    """The cores that other processes use from now on. None where the system does not tell."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        now = self._now()
        if self._start is None or now is None or now[0] <= self._start[0]:
            return None
        seconds, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - own) / seconds

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds on the clock, of work by all processes, and by this one and its children."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, interrupt, soft, *stolen = map(int, fields)
        busy = (user + nice + system + interrupt + soft + sum(stolen[:1])) / os.sysconf("SC_CLK_TCK")
        t = os.times()
        return time.monotonic(), busy, t.user + t.system + t.children_user + t.children_system

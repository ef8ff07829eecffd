"""Which commit this is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """What FUSEDOPTIM_COMMIT says, for checkouts without their history; else the commit of this one."""
    said = os.environ.get("FUSEDOPTIM_COMMIT")
    if said:
        number, plus, changes = said.partition("+")
        return number[:12] + plus + changes
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

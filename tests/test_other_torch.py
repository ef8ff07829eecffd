"""DTensors under other versions of torch than the one that is installed: its private slots, and whole steps.

``FUSEDOPTIM_OTHER_PYTHONS`` names interpreters that have another torch and pytest, separated by colons, as
``/venvs/torch-2.10/bin/python:/venvs/newest/bin/python``. They take the library that is built here where they are of
the same Python.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHONS = [p for p in os.environ.get("FUSEDOPTIM_OTHER_PYTHONS", "").split(":") if p]
FILES = [
    "test_dtensor_slots.py", "test_dtensors.py", "test_dtensor_states.py", "test_loading_shards.py",
    "test_shard_maps.py", "test_low_sharded.py", "test_low_sharded_checkpoints.py",
]  # fmt: skip


@pytest.mark.skipif(not PYTHONS, reason="FUSEDOPTIM_OTHER_PYTHONS names no interpreter with another torch")
@pytest.mark.parametrize("python", PYTHONS)
def test_sharded_steps(python: str) -> None:
    folder = Path(__file__).parent
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(folder / name) for name in FILES)]
    found = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]

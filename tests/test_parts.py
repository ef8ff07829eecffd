"""A step in its parts, on the CPU's kernels and in the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from parts_tests import *  # noqa: F403


@pytest.fixture(params=["cpu", "reference"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    return SimpleNamespace(backend=request.param, slow=False)

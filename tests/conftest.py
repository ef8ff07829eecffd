from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedoptim import _backends, _native

#: What is compiled of rules stays here from one process and one run to the next.
os.environ.setdefault("FUSEDOPTIM_CACHE", str(Path(__file__).parent.parent / "build" / "rules"))


@pytest.fixture(autouse=True)
def _restore_global_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    capability = _native._C.cpu_capability() if _native._C else None
    yield
    torch.set_num_threads(threads)
    _backends._warned.clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or what one test compiled would count for the next one's limit
    if accelerate := sys.modules.get("accelerate.state"):  # Accelerators and Trainers share settings until this
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    if capability:
        _native._C.set_cpu_capability(capability)


def pytest_collection_finish() -> None:
    # The thousands of tests and all that they have imported are there to stay: without this the garbage collector looks
    # at them over and over, for a sixth of the time.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes long comes first, so that no process is left with it at the end while others have nothing to do.
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

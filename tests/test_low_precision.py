"""Steps in fewer bits on the CPU: in every instruction set the reference's bits, for any number of threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import CAPABILITIES, LOW, Case, assert_same_optimizers, gradient, parameters
from low_precision_tests import *  # noqa: F403

from fusedoptim import _native


@pytest.fixture(params=CAPABILITIES)
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    case = request.node.callspec.params.get("case")
    if case is not None and case.own and request.param != CAPABILITIES[0]:
        pytest.skip("compiled anew for each instruction set, with the loops of the other rules: see test_parity.py")
    assert _native._C.set_cpu_capability(request.param)
    return SimpleNamespace(backend="cpu", slow=False)


@pytest.mark.parametrize("case", LOW, ids=str)
def test_thread_count_changes_no_stored_bit(case: Case) -> None:
    """Wherever tensors and rows are cut for them."""
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        params = parameters([(300, 1001), (9, 8191), (64, 64), (70_001,), *[(5,)] * 50], torch.bfloat16)
        results.append(case.make(params, backend="cpu"))
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            results[-1].step()
    for other in results[1:]:
        assert_same_optimizers(results[0], other)

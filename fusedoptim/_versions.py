"""Autograd's version counters, which steps raise for what they write to: csrc/python/version_counter.h."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _native

#: Takes a list of tensors, 36 ns for each. The C function where torch has it: within a Python function a signal handler
#: could raise, halfway.
by_torch = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


@functools.cache
def found() -> bool:
    """Looks for the counters, on the first call. False if they have to be left to torch's own function."""
    assert _native._C is not None
    # Whatever surrounds the first step, the probes are ordinary tensors.
    with torch.inference_mode(False), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        own = [torch.zeros(1, device="cpu") for _ in range(3)]
        tensors = [t for x in own for t in (x, x.detach(), x.data)]
        probe = _native._C.VersionProbe()
        torch.ops.fusedoptim._hand_over(tensors, probe.number)
        for more in (101, 211):  # no other number in a counter is like these
            for i, x in enumerate(own):
                by_torch([x] * (more + 31 * i))
            if not probe.find([x._version for x in own]):
                return False
        for i in range(len(tensors)):
            before = _versions(tensors)
            probe.raise_(i)
            same = (0, 1) if i % 3 < 2 else (2,)  # share a counter
            raised = [i - i % 3 + k for k in same]
            if _versions(tensors) != [v + (k in raised) for k, v in enumerate(before)]:
                return False
    probe.adopt()
    return True


def _versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]

"""Autograd's version counters, which steps raise for what they write to: csrc/python/version_counter.h."""

from __future__ import annotations

import functools
import threading

import torch

from . import _native

#: Takes a list of tensors, 36 ns for each. The C function where torch has it: within a Python function a signal handler
#: could raise, halfway.
by_torch = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


@functools.cache
def find_counters() -> bool:
    """Looks for the counters, on the first call. False if they have to be left to torch's own function."""
    answer: list[bool] = []
    # In a thread of its own, because whatever may surround the first step (inference mode, an operator, whose kernels
    # run below autograd, modes, default devices) is its thread's alone.
    thread = threading.Thread(target=lambda: answer.append(_look()))
    try:
        thread.start()
    except RuntimeError:  # the process is about to end
        return False
    thread.join()
    return answer == [True]


def _look() -> bool:
    assert _native._C is not None
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
        before = [t._version for t in tensors]
        probe.raise_(i)
        raised = (i,) if i % 3 == 2 else (i - i % 3, i - i % 3 + 1)  # the first two of three share a counter
        if [t._version for t in tensors] != [v + (k in raised) for k, v in enumerate(before)]:
            return False
    probe.adopt()
    return True

"""Memory on a device for the tables of steps, from torch's allocator."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceMemory:
    """What csrc/python/python_memory.h calls, for one device."""

    #: Whether the kernels of _C_cuda run on it.
    compiled = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index or 0

    def allocate(self, size: int) -> Tensor:
        """``size`` bytes, which belong to torch's current stream."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def used_on(self, memory: Tensor, stream: int) -> None:
        """Tells the allocator of another stream, by address, that works with the memory: nobody else is to have it
        before that is through. Neither the host nor a stream waits, and it may be told while a graph is captured."""
        if self.device.type == "cuda":
            # The default stream's address is 0, for which ExternalStream would be a new stream.
            other: torch.cuda.Stream = torch.cuda.default_stream(self.device)
            if stream != 0:
                other = torch.cuda.ExternalStream(stream, device=self.device)  # type: ignore[no-untyped-call]
            memory.record_stream(other)

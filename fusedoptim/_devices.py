"""Kernels, streams and guards of devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from ._device_memory import DeviceMemory


def make_launcher(backend: str, device: torch.device) -> Any:
    """What launches a backend's kernels that clip, on a device: see csrc/python/make_executor.h."""
    if backend == "cpu":
        return None
    if backend == "triton":
        from .triton_kernels.device import CLIP, TritonDevice

        return TritonDevice(device, CLIP)
    return DeviceMemory(device)


def stream_of(device: torch.device) -> Callable[[], int]:
    """Gives the address of torch's current stream, 0 where kernels are not launched by address."""
    if device.type == "cuda":
        return partial(torch._C._cuda_getCurrentRawStream, device.index)
    return int


def current_index_of(device: torch.device) -> Callable[[], int]:
    """Gives the index of the current device of that type. torch.cuda.current_device also asks whether CUDA was started,
    which tensors on a GPU answer."""
    if device.type == "cuda":
        return torch._C._cuda_getDevice
    current: Callable[[], int] = torch.get_device_module(device).current_device
    return current


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # also kernels that run on the host, for tests
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard

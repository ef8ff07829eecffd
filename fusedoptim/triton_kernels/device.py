"""What csrc/python/triton_device.h calls: memory, copies and launches through torch and Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .._device_memory import DeviceMemory
from . import clip
from .codec import INTERPRETED
from .kernels import measure_kernel, norm_step_kernel, reduce_kernel, step_kernel
from .layout import BITS, DIGEST, packed

WARPS = 4
#: Contraction would change results.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
#: Of the size that addresses have.
ANY_ADDRESS = 1 << 40
#: Captured launches that may follow each other without an ordinary step in between: a step has one, in parts three.
SPARE = 12


def block(threads_per_warp: int) -> int:
    """Elements that a program has under way: 8 per thread, which make 16 bytes in every dtype."""
    return 8 * threads_per_warp * WARPS


class RuleFunctions(NamedTuple):
    """The functions of a rule, as kernels take them.

    ``prepare(row, inputs, T, VARIANT)`` returns its scalars as a tuple, from a group's hyper-parameters and ``inputs``,
    a tuple: the number of this step, whether the states are to be taken as absent, two sums of squares over the whole
    tensor and the tensor's three numbers, of which the rule's own come first, and the whole tensor's elements. All but
    the second are fp64, and 0 where there is none. T is the dtype in which elements are computed.

    ``update(p, g, s, c, VARIANT)`` returns the new parameter and the tuple of the new states, from registers to
    registers; ``s`` are three states, of which the rule's own come first, and ``c`` the scalars. States that the
    variant or the rule does not have are to be returned as they are.

    ``next_numbers(row, inputs, VARIANT)`` returns the tuple of the new numbers; None for a rule that has none.

    ``measured(p, g, s, c, VARIANT)`` returns the two whose squares are summed, of the values before the step; ``c`` was
    made of sums that are NaN. None for a rule that has no sums, or that of its gradient alone.
    """

    prepare: Any
    update: Any
    next_numbers: Any = None
    measured: Any = None


CLIP = RuleFunctions(clip.prepare, clip.update)


class TritonDevice(DeviceMemory):
    """For one optimizer's parameters on one device, which has to be the current one. All is done on torch's current
    stream."""

    compiled = False

    def __init__(self, device: torch.device, functions: RuleFunctions) -> None:
        super().__init__(device)
        self.functions = functions
        self._block = block(32 if torch.version.hip is None else 64)
        #: What captured copies read from at every replay.
        self._captured: list[Tensor] = []
        #: Pinned memory for captured steps, during which none can be had.
        self._spare: list[Tensor] = []

    def upload(self, to: Tensor, offset: int, data: memoryview) -> None:
        size = len(data)
        # From torch's cache of pinned memory, which takes it back once the copy is through.
        self._copy(to[offset : offset + size], self._pinned(size), data)
        if self.device.type == "cuda" and (len(self._spare) < SPARE or len(self._spare[0]) < size):
            self._spare = [self._pinned(size) for _ in range(SPARE)]

    def write(self, to: Tensor, data: memoryview) -> None:
        size = len(data)
        spare = self._spare.pop() if self._spare and len(self._spare[-1]) >= size else self._pinned(size)
        self._captured.append(self._copy(to[:size], spare[:size], data))

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.device.type != "cpu")

    def _copy(self, to: Tensor, pinned: Tensor, data: memoryview) -> Tensor:
        to.copy_(pinned.copy_(torch.frombuffer(data, dtype=torch.uint8)), non_blocking=True)
        return pinned

    def capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def l2_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return 32 << 20

    def multiprocessors(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).multi_processor_count)
        return 64

    def prepare(self, purpose: str, rule: Any, kinds: tuple[Any, ...]) -> Callable[[int, int], None]:
        """Compiles what a step will launch, so that no launch of it fails after another one has run.

        Args:
            purpose: "measure", "reduce" or "update".
            rule: a RuleHandle.
            kinds: of each kind of entries the storages of all operands, the dtype of the step, the variant, and a bit
                for each state that is used.

        Returns:
            What launches it, with the address of its header and the number of blocks.
        """
        kernel, constants = kernel_for(purpose, rule, kinds, self._block, self.functions)
        if self.device.type != "cpu":
            kernel.warmup(ANY_ADDRESS, *constants, grid=(1,), **OPTIONS)

        def launch(header: int, blocks: int) -> None:
            kernel[(blocks,)](header, *constants, **OPTIONS)

        return launch


def _constant(kind: int) -> Any:
    """Triton's interpreter takes numbers as they are, and its constants then do no arithmetic with them."""
    return tl.constexpr(kind) if INTERPRETED.value else kind


def kernel_for(
    purpose: str, rule: Any, kinds: tuple[Any, ...], block: int, functions: RuleFunctions
) -> tuple[Any, tuple[Any, ...]]:
    """A kernel, and its constants behind the header."""
    if purpose == "reduce":
        return reduce_kernel, (DIGEST,)
    prepare, update, next_numbers, measured = functions
    if purpose == "measure" and measured is None:
        # looks at parameters and gradients alone: one kernel serves every rule
        plain = tuple(_constant(storages[0] | storages[1] << BITS) for storages, *_ in kinds)
        return measure_kernel, (None, 0, 1, None, plain, DIGEST)
    of_kernel = tuple(_constant(packed(kind, rule.halves)) for kind in kinds)
    if not rule.sums:
        return step_kernel, (prepare, update, next_numbers, rule.numbers, 0, of_kernel, block, DIGEST)
    summed = tuple(_constant(packed(kind, rule.halves, rule.summed[kind[2]])) for kind in kinds)
    if purpose == "measure":
        return measure_kernel, (prepare, rule.numbers, rule.sums, measured, summed, DIGEST)
    of_rule = (prepare, update, next_numbers, rule.numbers, rule.sums, measured)
    return norm_step_kernel, (*of_rule, summed, of_kernel, block, DIGEST)

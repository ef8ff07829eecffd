"""Steps within the backward pass of DistributedDataParallel: a communication hook averages a bucket of gradients as
DDP would, and steps its parameters as soon as the averages are there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ._release_part import Owner, Part


def check(ddp: object) -> DistributedDataParallel:
    """Raises for what cannot have the hook."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp= must be a DistributedDataParallel, but is a {type(ddp).__name__}: pass what the model was wrapped "
            "in, and nothing for other models"
        )
    if ddp not in _known and getattr(ddp, "_comm_hooks", None):
        raise ValueError(f"this DistributedDataParallel has a communication hook or mixed_precision already: {_ALONE}")
    if getattr(ddp, "_use_python_reducer", False) or getattr(ddp, "_delay_all_reduce_params", None):
        ways = "delay_all_reduce_named_params or torch.compile's python_reducer"
        raise ValueError(f"this DistributedDataParallel has {ways}: {_ALONE}")
    return ddp


def averaged_by(ddp: DistributedDataParallel) -> set[Tensor]:
    """The parameters that DDP averages, if none was frozen or thawed since it was made."""
    named = ddp.module.named_parameters(remove_duplicate=False)
    return {p for name, p in named if p.requires_grad and name not in ddp.parameters_to_ignore}


def buckets_of(ddp: DistributedDataParallel) -> Buckets:
    """DDP's buckets with the hook, which it can be given once and never loses."""
    found = _known.get(ddp)
    if found is None:
        found = Buckets(ddp)
        try:
            # DDP asks for a function, and looks at its annotations, which must not be strings.
            ddp.register_comm_hook(found, lambda state, bucket: state.average(bucket))
        except RuntimeError as error:  # one of torch's built-in hooks, which leave no trace
            raise ValueError(f"this DistributedDataParallel has a communication hook already: {_ALONE}") from error
        found.kept_back = _keep_back(ddp)
        _known[ddp] = found
    return found


def _keep_back(ddp: DistributedDataParallel) -> bool:
    """Tells DDP not to copy averages back to the gradients at the end of a pass; private, and for good."""
    tell = getattr(ddp.reducer, "_set_optimizer_in_backward", None)
    if tell is None:
        return False
    tell()
    return True


class Buckets:
    """The communication hook of one DDP. Its reducer holds it where Python's garbage collector does not look, so that
    it must hold nothing that leads back to the model."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = weakref.ref(ddp)
        self.owners: list[weakref.ref[Owner]] = []
        #: Whether gradients get the averages from here, and not from DDP's end of a pass.
        self.kept_back = False
        self._errors: list[Exception] = []
        self._stepped: list[Tensor] = []  # of those that DDP gives gradients again
        self._stepping = threading.Lock()  # a thread per bucket, with gloo

    def add(self, owner: Owner) -> None:
        self.owners = [o for o in self.owners if o() is not None] + [weakref.ref(owner)]

    def average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DDP calls when all gradients of a bucket (dist.GradBucket) are there: in every process in the order of
        the buckets."""
        ddp = self.ddp()
        assert ddp is not None
        if bucket.index() == 0:  # the first of a pass: what one left that raised half-way is nobody's
            self._errors.clear()
            self._stepped.clear()
        at_end(lambda: at_end(self._finish))  # DDP's own end is queued when the last bucket is full
        group, params = ddp.process_group, bucket.parameters()
        buffer: Tensor = bucket.buffer()
        used = _Used(ddp, params, buffer.device)
        # As DDP does without a hook, which gives other bits than a division where the world is no power of two.
        if getattr(ddp, "batched_grad_copy", False):
            buffer.div_(group.size())
        else:
            buffer.mul_(1.0 / group.size())
        work = dist.all_reduce(buffer, group=group, async_op=True)
        for p in params:
            if self._part(p) is not None:
                p.grad = None  # its numbers are in the bucket
        joining = bool(getattr(getattr(ddp, "_join_config", None), "enable", False))

        def then(done: torch.futures.Future[Any]) -> Tensor:
            done.value()  # raises what the communication raised
            with self._stepping, torch.no_grad():
                if joining:
                    self._errors.append(_cannot_join())
                in_views = ddp.gradient_as_bucket_view
                for p, grad, is_used in zip(params, bucket.gradients(), used.by_any(), strict=True):
                    if is_used and (joining or not self._step(p, grad)):
                        self._give(p, grad, in_views)
            return buffer

        # On a GPU the callback runs at once, on a stream that waits for the all-reduce, and DDP's end waits for that.
        return work.get_future().then(then)

    def _part(self, p: Tensor) -> Part | None:
        for reference in self.owners:
            owner = reference()
            part = owner.parts.get(p) if owner is not None else None
            if part is not None:
                return part
        return None

    def _step(self, p: Tensor, grad: Tensor) -> bool:
        """Whether it was stepped. An error waits for the pass's end, so that the other processes, which wait for this
        one's buckets, come to theirs."""
        part = self._part(p)
        if part is None:
            return False
        part.averaged = True
        p.grad = grad
        try:
            stepped = part.step()
        except Exception as error:
            self._errors.append(error)
            stepped = False
        if stepped and not self.kept_back:
            self._stepped.append(p)
        if not stepped:
            p.grad = None
        return stepped

    def _give(self, p: Tensor, grad: Tensor, in_views: bool) -> None:
        """What DDP does for gradients that nobody steps."""
        if not self.kept_back:
            return
        if p.grad is None:
            p.grad = grad if in_views else grad.clone()
        elif not in_views:
            p.grad.copy_(grad)

    def _finish(self) -> None:
        """Behind DDP's own end of a pass, so that it is ready for another whatever is raised here."""
        for p in self._stepped:
            p.grad = None
        self._stepped.clear()
        errors, self._errors = self._errors, []
        if errors:
            raise errors[0]
        for reference in self.owners:
            owner = reference()
            for part in owner.parts.values() if owner is not None else ():
                if not part.averaged and part.param.grad is not None:
                    raise RuntimeError(
                        f"{part.name()} was frozen when its model was wrapped in DistributedDataParallel, which does "
                        "not average it, hence was not stepped: wrap the model after thawing it"
                    )


class _Used:
    """Which parameters of a bucket have a gradient in any process. DDP leaves the others alone."""

    def __init__(self, ddp: DistributedDataParallel, params: Iterable[Tensor], device: torch.device) -> None:
        self.here = [p.grad is not None for p in params]
        self.flags: Tensor | None = None
        if ddp.find_unused_parameters or ddp.static_graph:  # otherwise DDP takes all for used
            self.flags = torch.tensor(self.here, dtype=torch.int32, device=device)
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=ddp.process_group, async_op=True)

    def by_any(self) -> list[bool]:
        """Waits for the other processes only if a gradient is missing here."""
        if self.flags is None or all(self.here):
            return [True] * len(self.here)
        self.work.wait()
        return [bool(x) for x in self.flags.tolist()]


def _cannot_join() -> RuntimeError:
    return RuntimeError(
        "ddp.join() cannot be combined with steps in the backward pass, whose means it changes: nothing was stepped; "
        "give all processes the same number of batches"
    )


def at_end(callback: Callable[[], None]) -> None:
    """Queues it for the end of the backward pass that is running, behind what is queued so far."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


#: The remedy is to leave out one of both.
_ALONE = "one that averages gradients in another way cannot be combined with steps in the backward pass"
_known: weakref.WeakKeyDictionary[DistributedDataParallel, Buckets] = weakref.WeakKeyDictionary()

"""What torch puts around every optimizer's step: hooks, and a range for profilers.

torch's own wrapper opens that range whether or not anybody records it, which costs more than a small step.
It is kept for steps that have hooks or a profiler, so that these find what they find around torch's optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.optim import Optimizer, optimizer

Step = TypeVar("Step", bound=Callable[..., Any])


def profiling() -> bool:
    """Whether a profiler of torch's runs. The first are those that Python started, in any thread; the second also one
    that C++ or the legacy interface started in this thread. An ExecutionTraceObserver on its own, without a profiler,
    is not seen, so that its trace has a step's operators, but no range around them."""
    return profiler._is_profiler_enabled or _profiler_enabled()


def with_hooks(step: Step) -> Step:
    """A step that hooks and profilers surround where there are any, once: not again where it calls another such step of
    the same optimizer, as a subclass's own does. torch does not wrap it once more."""
    through_torch = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def hooked(self: Optimizer, /, *args: Any, **kwargs: Any) -> Any:
        if not (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or (not is_compiling() and profiling())
        ):
            return step(self, *args, **kwargs)
        if is_compiling():
            # No mark can be left on the optimizer there: a step of the class's own is taken to be around this one.
            return (through_torch if type(self).step is hooked else step)(self, *args, **kwargs)
        if "_surrounded" in self.__dict__:
            return step(self, *args, **kwargs)
        self._surrounded = True  # type: ignore[attr-defined]
        try:
            return through_torch(self, *args, **kwargs)
        finally:
            del self._surrounded  # type: ignore[attr-defined]

    hooked.hooked = True  # type: ignore[attr-defined]
    return cast(Step, hooked)

"""Sharded models (``fully_shard``, FullyShardedDataParallel) whose parameters are written between two forwards.

After a forward some of their modules keep the whole parameters that they gathered, and use these in the next one: the
root, and others that do not reshard after a forward. A backward pass reshards them, an evaluation does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._distributed import sharded_by_fsdp1
from ._dtensor import is_dtensor


class Resharding:
    """Of all modules in a model, from the beginning on.

    A sharded parameter does not lead to its module, so that the model has to be given. None will do where nothing was
    wrapped: plain tensor parallelism computes with the very parameters that are written.

    Args:
        call: which call takes the model, for messages.

    Raises:
        TypeError: for what is no module.
        RuntimeError: if parameters may be those of a module that was not given.
    """

    def __init__(self, model: nn.Module | None, params: Iterable[Tensor], call: str = "ema_weights") -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
        self._model, self._call = model, call
        modules = list(model.modules()) if model is not None else []
        self._fsdp1, self._fsdp2 = (
            [m for m in modules if isinstance(m, _class(name))] for name in ("FullyShardedDataParallel", "FSDPModule")
        )
        fsdp2_is_used = _fsdp2_is_used()
        self._sharded = {p for p in params if (fsdp2_is_used and is_dtensor(p)) or sharded_by_fsdp1([p])}
        self._reshard()
        if missing := self._missing():
            raise RuntimeError(
                f"{missing} sharded parameters may belong to modules of FSDP that keep whole ones from the last "
                f"forward, and would go on using these: pass the model, {call}(model), or several in a ModuleList"
            )

    def again(self) -> None:
        """Reshards also what an exception interrupted in its forward, where ``reshard()`` does nothing."""
        self._reshard()
        if not self._missing():
            return
        for module in self._fsdp2:
            with contextlib.suppress(AttributeError, RuntimeError):  # of older torch, and of all but the root
                module.reset_iter_state()
        if self._missing():
            raise RuntimeError(
                f"the forward of an FSDP2 model was interrupted within {self._call}(), and this torch cannot reshard "
                "it: it would go on using the averages; build the model anew, from a checkpoint"
            )

    def _reshard(self) -> None:
        for module in self._fsdp2:
            module.reshard()
        for module in self._fsdp1:
            _reshard_fsdp1(module)

    def _missing(self) -> int:
        """How many parameters the model does not have now."""
        return len(self._sharded.difference(self._model.parameters() if self._model is not None else ()))


def _reshard_fsdp1(module: Any) -> None:
    """Has no public way."""
    from torch.distributed.fsdp import _runtime_utils

    handle = module._handle
    if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
        _runtime_utils._reshard(module, handle, True)


def _class(name: str) -> Any:
    """For ``isinstance``: () for as long as nobody has imported it, so that there is no module of it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def _fsdp2_is_used() -> bool:
    """Whether there is any module of FSDP2; True if that cannot be told."""
    cls = _class("FSDPModule")
    if not cls:
        return False
    # Private: what fully_shard has been applied to, among others.
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    return known is None or any(isinstance(m, cls) for m in list(known))

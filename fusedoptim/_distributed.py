"""What sharded parameters ask of a step that needs the norm of whole tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def sharded_by_fsdp1(params: Iterable[Tensor]) -> bool:
    """Whether a parameter is one of ``FullyShardedDataParallel``, flat or original, in one of several processes: a part
    of a tensor that does not look like one."""
    # The name of the mark that FSDP leaves on both kinds (torch/distributed/fsdp/_common_utils.py).
    if "torch.distributed.fsdp" not in sys.modules or not any(getattr(p, "_fsdp_flattened", False) for p in params):
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def refuse_norm_of_shards(what: str, for_clipping: bool = True) -> None:
    remedy = (
        "pass norm_group=, the process group over which the model is sharded (torch.distributed.group.WORLD, unless "
        "you gave FSDP another), or call model.clip_grad_norm_(max_norm), FSDP's own, before the step"
        if for_clipping
        else "train with FSDP2 (fully_shard), with DistributedDataParallel, or with another optimizer"
    )
    raise ValueError(
        f"{what} needs the norm of whole gradients, of which FullyShardedDataParallel leaves a part in each process, "
        f"so that every process would use a norm of its own: {remedy}"
    )

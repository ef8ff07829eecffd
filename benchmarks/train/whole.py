"""States of whole tensors. A checkpoint of them says nothing of how many processes wrote it, and how they shared the
model: any number of processes goes on with it, shared in any way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedoptim._dtensor import is_dtensor

from . import parallel


def gathered(tree: Any) -> Any:
    """Dicts with whole tensors in place of DTensors. All processes take part, and all get them."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    return tree.full_tensor() if is_dtensor(tree) else tree


def placed(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor as ``like`` is placed. Every process has the whole one, so none is sent."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Of a model and its optimizer, by part. All processes take part; what the first gets is complete."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        of_optimizer = optimizer.state_dict() if parallel.is_first() else {}
    else:
        of_optimizer = gathered(optimizer.state_dict())
    return {"model": gathered(model.state_dict()), "optimizer": of_optimizer}


def load(states: dict[str, Any], model: nn.Module, optimizer: Any) -> None:
    """fusedoptim's optimizers cut whole states as their parameters are cut; a model does not."""
    weights = states["model"]
    model.load_state_dict({name: placed(weights[name], of) for name, of in model.state_dict().items()})
    optimizer.load_state_dict(states["optimizer"])

"""What the random bits of a parameter's elements follow from, beside the seed and the step: which parameter it is, and
where its elements belong in the whole tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ._dtensor import is_dtensor
from ._shard_maps import index_map

#: What wrappers put before a parameter's name, or into it: DistributedDataParallel, torch.compile,
#: FullyShardedDataParallel and checkpoint_wrapper.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Place(NamedTuple):
    #: Of the parameter.
    id: int
    #: The flat index, in the whole tensor, of the first element here.
    first: int
    #: By which an element's index there grows along each dimension; None where the elements follow each other.
    strides: tuple[int, ...] | None


NOWHERE = Place(0, 0, None)


class HasIds(Protocol):
    param_groups: list[dict[str, Any]]
    _ids: dict[Tensor, int]


def fnv1a(text: str) -> int:
    """The 64-bit hash of Fowler, Noll and Vo of the text in UTF-8 (draft-eastlake-fnv)."""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = (found ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return found


def ids_of(optimizer: HasIds) -> dict[Tensor, int]:
    """By parameter, what it is: the hash of its name, or its number in the state_dict where it has none. One that is
    another optimizer's as well is what it is there."""
    found: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):  # of more than a wrapper has left here
            names = None
        for i, p in enumerate(group["params"]):
            number = len(found)
            found[p] = number if names is None else fnv1a(_WRAPPERS.sub("", names[i]))
    return {p: _given(optimizer._ids, p, i) for p, i in found.items()}


def _given(ids: Mapping[Tensor, int], p: Tensor, otherwise: int) -> int:
    return ids.get(p, otherwise)


def place_of(p: Tensor, its_id: int) -> Place:
    if not is_dtensor(p):
        return Place(its_id, 0, None)
    return Place(its_id, *index_map(p))

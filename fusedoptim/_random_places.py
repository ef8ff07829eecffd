"""What the random bits of a parameter's elements follow from, beside the seed and the step: which parameter it is, and
where its elements belong in the whole tensor."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ._dtensor import is_dtensor
from ._shard_maps import index_map

#: What wrappers put before a parameter's name, or into it: DistributedDataParallel, torch.compile,
#: FullyShardedDataParallel and checkpoint_wrapper.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Place(NamedTuple):
    #: The parameter's number, or its name's hash.
    id: int
    #: The flat index, in the whole tensor, of the first element here.
    first: int
    #: By which an element's index there grows along each dimension; None where the elements follow each other.
    strides: tuple[int, ...] | None


NOWHERE = Place(0, 0, None)


#: What tells a parameter from the others: its name, or its number in the state_dict where it has none.
Id = int | str


class HasIds(Protocol):
    param_groups: list[dict[str, Any]]
    _ids: dict[Tensor, Id]


def fnv1a(text: str) -> int:
    """The 64-bit hash of Fowler, Noll and Vo of the text in UTF-8 (draft-eastlake-fnv)."""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = (found ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return found


def ids_of(optimizer: HasIds) -> dict[Tensor, Id]:
    """By parameter. One that is another optimizer's as well is what it is there; the second of one name is "name#2"."""
    found: dict[Tensor, Id] = {}
    uses: Counter[str] = Counter()
    for group in optimizer.param_groups:
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):  # of more than a wrapper has left here
            names = None
        for i, p in enumerate(group["params"]):
            found[p] = len(found)
            if names is not None:
                name = _WRAPPERS.sub("", names[i])
                uses[name] += 1
                found[p] = name if uses[name] == 1 else f"{name}#{uses[name]}"
    return {p: optimizer._ids.get(p, its_id) for p, its_id in found.items()}


def place_of(p: Tensor, its_id: Id) -> Place:
    """For what is rounded stochastically: the hash of a name takes microseconds."""
    number = fnv1a(its_id) if isinstance(its_id, str) else its_id
    return Place(number, *index_map(p)) if is_dtensor(p) else Place(number, 0, None)

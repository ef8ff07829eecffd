"""States as bitsandbytes' optimizers save them (bitsandbytes/optim/optimizer.py there)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._rule import Rule

#: Under which newer versions keep all of these, out of FSDP1's sight.
WRAPPED = "__bnb_optimizer_quant_state__"
#: Elements of a block: now, and in older versions.
BLOCKS = (256, 2048)
#: The states of all of its optimizers that have two.
TWO = ["exp_avg", "exp_avg_sq"]


def group_of_bitsandbytes(group: dict[str, Any], states: Mapping[Any, Any], rule: Rule) -> dict[str, Any]:
    """The group under this rule's names: there ``betas`` is a pair for every optimizer, whose first number is SGD's and
    LARS' ``momentum``, and RMSprop's ``alpha``; SGD and LARS have an ``eps`` there that means nothing. Any other group
    is returned as it is, and that of a checkpoint without states, of which nothing says whose it is."""
    keys = [hyper.key for hyper in rule.hyper]
    name = next((key for key in ("alpha", "momentum") if key in keys), None)
    if name is None or name in group or "betas" in keys or not isinstance(group.get("betas"), tuple | list):
        return group
    if not any("state1" in _own(values) for values in states.values() if isinstance(values, dict)):
        return group
    unknown = {"betas", "eps"} if name == "momentum" else {"betas"}
    return {**{k: v for k, v in group.items() if k not in unknown}, name: group["betas"][0]}


def of_bitsandbytes(values: dict[str, Any], rule: Rule, who: str) -> dict[str, Any]:
    """The states under this rule's names: ``state1`` and ``state2`` are an optimizer's first and second one, in fp32 or
    in codes of 8 bits, then each with the 256 numbers that these stand for, ``qmap1``, and the maximum of every block
    of the flat tensor, ``absmax1``. All else is returned as it is.

    Raises:
        ValueError: for codes that cannot be read, and states that are those of another optimizer.
    """
    own = _own(values)
    if not isinstance(own.get("state1"), Tensor):
        return values
    count = 2 if "state2" in own else 1
    needed = [slot.name for slot in rule.states if slot.needed is None]
    names = (needed or [slot.name for slot in rule.states])[:count]
    if len(names) < count or len(needed) > count or (count == 2 and names != TWO):
        raise ValueError(
            f"the state of {who} is of an optimizer of bitsandbytes that has {count} states per parameter, not of one "
            f"with {sorted(rule.signature())}. Nothing was loaded"
        )
    found = {k: v for k, v in own.items() if k.rstrip("12") not in ("state", "qmap", "absmax", "max", "new_max")}
    for k, name in enumerate(names, 1):
        found[name] = _decoded(own[f"state{k}"], own.get(f"qmap{k}"), own.get(f"absmax{k}"), f"state{k}", who)
    return found


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """A state, with what is wrapped."""
    return {**{k: v for k, v in values.items() if k != WRAPPED}, **values.get(WRAPPED, {})}


def _decoded(state: Tensor, numbers: Tensor | None, maxima: Tensor | None, name: str, who: str) -> Tensor:
    if state.is_floating_point():
        return state
    size = next((n for n in BLOCKS if maxima is not None and -(-state.numel() // n) == maxima.numel()), None)
    if state.dtype != torch.uint8 or numbers is None or maxima is None or numbers.numel() != 256 or size is None:
        raise ValueError(
            f"state {name!r} of {who} has codes of bitsandbytes ({state.dtype}) without a table of 256 numbers and a "
            f"maximum for every {' or '.join(map(str, BLOCKS))} elements to read them by: load the checkpoint there, "
            "with optim_bits=32, and save it again. Nothing was loaded"
        )
    found = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    for out, codes, largest in zip(
        *(
            torch.split(t, n)
            for t, n in ((found.view(-1), size << 12), (state.reshape(-1), size << 12), (maxima, 1 << 12))
        ),
        strict=True,
    ):
        out.copy_(numbers.float()[codes.long()] * largest.float().repeat_interleave(size)[: len(codes)])
    return found

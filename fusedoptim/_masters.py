"""The fp32 numbers that 16-bit parameters stand for, and the states that keep what these lack of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import _versions, reference
from ._blocks import PART
from ._dtensor import alike, is_dtensor, local, same_layout
from ._placing import part_of
from ._rule import Group
from ._storage import DTYPES_OF_MASTERS, MASTER, MASTERS, PORTABLE_MASTER, REMAINDER8, Stored, needs, stored_param
from ._warnings import warn


def new_master(name: str, p: Tensor) -> Tensor:
    """The state under this name of a parameter that is its number exactly."""
    own = _like(local(p), DTYPES_OF_MASTERS[name]).copy_(
        local(p).detach() if name == MASTER else torch.zeros((), device=p.device)
    )
    return alike(p, own) if is_dtensor(p) else own


def _like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels find what is kept beside an element where they find that, also in a parameter with gaps."""
    return torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=p.device)


def wanted(group: Group, p: Tensor) -> str | None:
    """The state of the master that a group asks for, if this parameter has one."""
    master = group.get("master")
    return MASTERS[master] if master is not None and needs(MASTERS[master], p) else None


def by_own_name(group: Group, p: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """States that are loaded, with the number that others call ``master`` as the state that it is here. Where the group
    asks for none, it is then dropped as any other: see :func:`converted`."""
    number = values.get(PORTABLE_MASTER)
    if MASTER in values or is_lazy(p) or not isinstance(number, Tensor) or number.shape != p.shape:
        return values
    if number.dtype != torch.float32 and not (number.is_floating_point() and wanted(group, p)):
        return values
    return {MASTER if name == PORTABLE_MASTER else name: value for name, value in values.items()}


def loses_number(p: Tensor, values: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether states that are dropped said more of a parameter's number than what is left."""
    gone = [name for name in MASTERS.values() if new.get(name, name) is None]
    if not gone or any({**values, **new}.get(name) is not None for name in MASTERS.values()):
        return False
    return not all(_is_rest_of(name, *both) for name in gone for both in _pieces(p, values[name]))


def _is_rest_of(name: str, x: Tensor, rest: Tensor) -> bool:
    """Whether a parameter says by itself what it stands for with this state."""
    x = x.to(torch.float32)
    if name == MASTER:
        return bool(((x == rest) | (x.isnan() & rest.isnan())).all())
    own = reference.encode(f"bf16_{name.removeprefix('param_')}", x, None)[1]
    bits = torch.int8 if name == REMAINDER8 else torch.int16
    assert own is not None
    return torch.equal(own.view(bits), rest.view(bits))


def warn_of_loss(count: int) -> None:
    if count > 0:
        warn(
            f"what was kept of the fp32 numbers of {count} parameters was dropped: they no longer have 16 bits, or "
            "their group has no master=, so that nobody would read it. They went on as they were. To keep it, take "
            "portable_state_dict() before such a change, and load it with master=, or copy each 'master' in it to the "
            "fp32 parameter"
        )


def stored_as(p: Tensor, values: Mapping[str, Any]) -> Stored | None:
    """How a parameter is stored that has one of these states."""
    for master, name in MASTERS.items():
        if _is_there(name, p, values) and needs(name, p):
            return stored_param({"master": master}, p)
    return None


def _is_there(name: str, p: Tensor, values: Mapping[str, Any]) -> bool:
    value = values.get(name)
    if not isinstance(value, Tensor) or value.shape != p.shape or value.dtype != DTYPES_OF_MASTERS[name]:
        return False
    return is_dtensor(value) == is_dtensor(p) and (not is_dtensor(p) or same_layout(value, p))


def number_of(p: Tensor, values: Mapping[str, Any], how: Stored) -> Tensor:
    """The fp32 number, as the parameter lies."""
    return _placed(p, torch.cat([reference.decode(how.storage, *both) for both in _parts(p, values, how)]))


def converted(group: Group, p: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The state of the master that a group asks for, where there is one of another kind, or in another memory order
    than the parameter's; and None for each that it does not ask for, which would say nothing of the parameter once that
    is stepped without it."""
    name = wanted(group, p)
    found: dict[str, Tensor | None] = {n: None for n in MASTERS.values() if n != name and _is_there(n, p, values)}
    if name is None:
        return found
    there, before = values.get(name), stored_as(p, values)
    if isinstance(there, Tensor):
        if _is_there(name, p, values) and local(there).stride() != local(p).stride():
            found[name] = _placed(p, local(there).contiguous())
    elif before is not None:
        how = stored_param(group, p)
        assert how is not None
        parts = _parts(p, values, before)
        rest = [split(how.storage, x, reference.decode(before.storage, x, extra)) for x, extra in parts]
        found[name] = _placed(p, torch.cat(rest))
    return found


def loaded(group: Group, p: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The state that a group asks for, of a ``master`` that was loaded and is what the parameter was rounded from; and
    None for that, if it is another."""
    name, how = wanted(group, p), stored_param(group, p)
    if name is None or how is None or not _is_there(MASTER, p, values):
        return {}
    rest = [split(how.storage, x, number) for x, number in _parts(p, values, how._replace(extra=MASTER))]
    found: dict[str, Tensor | None] = {name: _placed(p, torch.cat(rest))}
    if name != MASTER:
        return {**found, MASTER: None}
    return {} if torch.equal(local(values[MASTER]), local(found[name])) else found  # type: ignore[arg-type]


def split(storage: str, x: Tensor, number: Tensor) -> Tensor:
    """What is kept beside a parameter that stays as it is, for it to stand for these numbers.

    A parameter is that number rounded to nearest: of two that are as near it is the even one with ``master``, and with
    a remainder the one farther from zero. Where it is the other one, the number that is kept is off by one unit in the
    last place, so that it is not taken for one of before somebody wrote to the parameter. Where it is neither, nothing
    is kept.

    Args:
        storage: how the parameter is stored, by its name in csrc/core/storage.h.
        x: of the parameter.
        number: fp32.
    """
    bits, of_x = (t.contiguous().view(torch.int32).long() for t in (number, x.float()))
    if storage.endswith("_master"):
        beyond = (bits + 1).to(torch.int32).view(torch.float32)
        return torch.where((number.to(x.dtype) != x) & (beyond.to(x.dtype) == x), beyond, number)
    dtype, unit = torch.int16, 0
    if storage == "bf16_remainder8":
        dtype, unit = torch.int8, 8
        bits = bits + 0x7F + (bits >> 8 & 1) >> 8 << 8
    ends = torch.iinfo(dtype)
    rest = bits - of_x >> unit
    other = (bits ^ of_x < 0) | (rest < ends.min) | (rest > ends.max + 1) | number.isnan() | x.isnan()
    rest = torch.where(other, 0, rest.clamp(max=ends.max)).to(dtype)
    return rest.view(torch.bfloat16) if unit == 0 else rest


def check_loaded(masters: Iterable[tuple[Tensor, Tensor, str]]) -> None:
    """Whether parameters are as these numbers, rounded: to nearest, and of two that are as near to either.

    Args:
        masters: parameters, their numbers, and what the parameters are called. Numbers that lie on the ranks otherwise
            than their parameter are redistributed, for which all ranks take part.

    Raises:
        ValueError: if one is not, so that the parameters and the states are of different steps.
    """
    wrong = [words for one in masters if (words := _misfit(*one))]
    if wrong:
        raise ValueError(
            f"{wrong[0]}: the model and this checkpoint are of different steps. Load the model first, of the same "
            "step; if it was changed on purpose, leave 'master' out of the states, or call optimizer.reset_master() "
            "before they are saved. Nothing was loaded"
        )


def _misfit(p: Tensor, master: Tensor, who: str) -> str | None:
    off = 0
    for x, number in _pieces(p, part_of(p, master).to(p.device, torch.float32)):
        fits = (number.to(x.dtype) == x) | (number.isnan() & x.isnan())
        if x.dtype == torch.bfloat16:
            fits |= reference.encode("bf16_remainder", number, None)[0] == x
        off += x.numel() - int(fits.sum())
    of = f"in {off} of {local(p).numel()} elements"
    return f"state 'master' of {who} is not what that was rounded from, {of}" if off else None


@torch.no_grad()
def reset(p: Tensor, values: Mapping[str, Any]) -> None:
    """Makes the parameter as it is its own number."""
    for name in MASTERS.values():
        if _is_there(name, p, values):
            state = values[name]
            own = local(state).detach()
            if name == MASTER:
                own.copy_(local(p))
            else:
                own.zero_()
            if is_dtensor(state):  # which has a version counter of its own
                _versions.by_torch([state])


def _parts(p: Tensor, values: Mapping[str, Any], how: Stored) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a parameter and what it keeps beside."""
    return _pieces(p, values[how.extra or ""])


def _pieces(p: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of tensors of one shape: the elements in logical order, some at a time."""
    return zip(*(torch.split(local(t).detach().reshape(-1), PART) for t in (p, beside)), strict=True)


def _placed(p: Tensor, value: Tensor) -> Tensor:
    """As the parameter lies: elements in logical order."""
    own = _like(local(p), value.dtype).copy_(value.view(local(p).shape))
    return alike(p, own) if is_dtensor(p) else own

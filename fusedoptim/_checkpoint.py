"""Carries states through torch's load_state_dict, which would cast them to their parameter's dtype and share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from . import _masters
from ._bitsandbytes import group_of_bitsandbytes, of_bitsandbytes
from ._blocks import CODES, can_be_in_blocks, format_in_blocks, names_in_blocks, slot_of
from ._check_tensors import check_states, describe, is_materialised
from ._dtensor import is_dtensor, local, whole
from ._dtypes import DTYPES, compute_dtype
from ._exchange import agreement
from ._fakes import is_fake
from ._group_keys import completed
from ._lending import Lent, can_be_lent, held_alone, is_large
from ._placing import check_place, fits_in_place, placed
from ._portable import without_marks
from ._prepare import make_early_states
from ._recoding import Recoded, recoded
from ._rule import EMA, Group, Rule
from ._states import HasStates, scalars
from ._storage import (
    DTYPES_OF_MASTERS,
    MASTER,
    asked_dtype,
    check_storage,
    check_stored_param,
    state_dtype,
    state_names,
)
from ._warnings import warn

#: By optimizer, the states by which one knows whose a checkpoint is (Rule.signature).
SIGNATURES: dict[str, set[str]] = {}


def note_signature(optimizer: str, rule: Rule) -> None:
    if rule.signature():
        SIGNATURES[optimizer] = rule.signature()


#: At the end of a message.
NOTHING = "Nothing was loaded"


class Kept:
    """A value that torch's load_state_dict does not recognise, hence leaves as it is."""

    def __init__(self, value: Any, entry: dict[str, Any] | None) -> None:
        self.value = value
        #: Where the state_dict has it, if nothing else holds it.
        self.entry = entry


class Loader:
    """Prepares a state_dict for torch's load_state_dict, and gives its states back as they were saved.

    Args:
        groups: the optimizer's own.
        defaults: their values where they say nothing.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: Mapping[str, Any],
        rule: Rule,
        name: str,
    ) -> None:
        self.groups, self.defaults, self.rule, self.name = groups, defaults, rule, name
        self.slots = {slot.name for slot in rule.states}
        #: Those that lie where their parameter lies.
        blocks = {part for name in self.slots for part in names_in_blocks(name)}
        self.placed = self.slots | {EMA, *DTYPES_OF_MASTERS} | blocks
        self.widened: list[str] = []
        #: The numbers that parameters are to be compared with, once all ranks have found the rest in order.
        self.masters: list[tuple[Tensor, Tensor, str]] = []
        #: The number of parameters that stand for more than they say, which is not loaded.
        self.losses = 0

    def prepare(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict with its states wrapped and its groups completed.

        Raises:
            ValueError: if the states do not belong to these groups.
        """
        members = [(group, index, i) for index, group in enumerate(self.groups) for i in range(len(group["params"]))]
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(a["params"]) != len(b["params"]) for a, b in zip(saved_groups, self.groups, strict=True)):
            raise ValueError(  # in torch's words, which say so once its hooks are through
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        filled = self._filled(saved_groups, state_dict["state"])
        ids = [k for group in saved_groups for k in group["params"]]
        owners = dict(zip(ids, members, strict=True))
        kept, states = {}, state_dict["state"]
        for k in states:
            alone = held_alone(states, k)  # the very dict that an optimizer works with has another owner
            values = states[k]
            if k not in owners:
                kept[k] = values
                continue
            if not isinstance(values, dict):
                raise ValueError(f"this checkpoint is corrupt: the state of parameter {k!r} is {values!r}, not a dict")
            group, index, i = owners[k]
            p, who = group["params"][i], describe(group, index, i)
            lent = {name for name in values if alone and is_large(values[name]) and held_alone(values, name)}
            known = without_marks(of_bitsandbytes(values, self.rule, who), self.rule)
            known |= scalars({**known, **_whole_scalars(known, self.rule)}, self.rule)
            to_be, is_stepped = filled[index], _is_stepped(p, known, self.rule)
            if is_stepped:
                self._check(known, who)
            known = _masters.by_own_name(to_be, p, known)
            if is_stepped:
                for name in filter(self.placed.__contains__, known):
                    check_place(p, known[name], name, who)
                check_states(p, known, self.rule, who, devices=False)
                self._check_storage(to_be, p, known, who)
            kept[k] = {name: Kept(value, values if name in lent else None) for name, value in known.items()}
        if not any(kept.values()):
            self._check_groups(saved_groups)
        return {**state_dict, "state": kept, "param_groups": filled}

    def _filled(self, saved_groups: list[dict[str, Any]], states: Mapping[Any, Any]) -> list[dict[str, Any]]:
        found = []
        for index, (saved, group) in enumerate(zip(saved_groups, self.groups, strict=True)):
            found.append(completed(group_of_bitsandbytes(saved, states, self.rule), group, self.defaults, self.rule))
            try:
                check_storage(found[-1], self.rule)
            except ValueError as error:
                raise ValueError(f"parameter group {index}, as this checkpoint has it: {error}. {NOTHING}") from None
        return found

    def _check_storage(self, group: Group, p: Tensor, values: Mapping[str, Any], who: str) -> None:
        try:
            check_stored_param(group, p, who)
        except ValueError as error:
            raise ValueError(f"{error}. {NOTHING}") from None
        master = values.get(MASTER)
        if isinstance(master, Tensor) and _masters.wanted(group, p) and not is_fake(p) and not is_fake(master):
            self.masters.append((p, master, who))

    def _check(self, values: Mapping[str, Any], who: str) -> None:
        """Refuses states that are provably another optimizer's, or a part of this one's. Names that nobody knows are
        those of a wrapper, which keeps its own beside the optimizer's."""
        names = {slot_of(name) for name, value in values.items() if value is not None}
        known, required = set(map(slot_of, state_names(self.rule))), self.rule.required_states()
        others = {o: states for o, states in SIGNATURES.items() if states <= names and not states <= known}
        another = max(others, key=lambda o: len(others[o]), default=None)
        if another is not None or ((known - {EMA}) & names and not required <= names):
            whose = f"it looks like one of {another}" if another else f"{sorted(required - names)} are missing"
            raise ValueError(
                f"this checkpoint is not one of {self.name}: its states of {who} are {sorted(names)}, {self.name} has "
                f"{sorted(known - {EMA})}, so that {whose}. Nothing was loaded"
            )

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        """Groups without any states may be those of an optimizer that has none, as SGD without momentum."""
        for saved in saved_groups:
            lacks = (
                {h.key for h in self.rule.hyper} - saved.keys() - self.rule.absent.keys() - self.rule.extensions.keys()
            )
            strange = saved.keys() - self.defaults.keys() - {"params", "param_names", "initial_lr"}
            if lacks and strange:
                warn(
                    f"this state_dict has no states, and its groups are not those of {self.name}: they have "
                    f"{sorted(strange)}, and lack {sorted(lacks)}, which stay as they were. It is probably another "
                    f"optimizer's; lr is now {saved.get('lr')}"
                )
                return

    def restore(self, groups: list[dict[str, Any]], state: dict[Any, Any], lent: dict[Tensor, Lent]) -> None:
        """Unwraps the states that torch loaded, and notes which of them are the state_dict's own tensors."""
        lent.clear()
        for index, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p in state:
                    kept = {name: value for name, value in state[p].items() if isinstance(value, Kept)}
                    found = self._restore_one(kept, p, group, lent)
                    new: Recoded = {}
                    if _can_be_stepped(p):
                        new = {} if is_fake(p) else _masters.loaded(group, p, found)
                        new |= recoded(group, self.rule, p, {**found, **new})
                        self.losses += not is_fake(p) and _masters.loses_number(p, found, new)
                    found = {**state[p], **found, **new}
                    state[p] = {name: value for name, value in found.items() if name not in new or value is not None}
                    self._note_wider(state[p], kept, group, index, i)

    def _restore_one(
        self, values: dict[str, Kept], p: Tensor, group: Group, lent: dict[Tensor, Lent]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, kept in values.items():
            value = kept.value
            if not isinstance(value, Tensor):
                found[name] = _carried(value, p)
                continue
            dtype = self._dtype(name, value, p, group)
            if name == "step":
                found[name] = value.detach().to("cpu", copy=True)
            elif kept.entry is not None and dtype == value.dtype and can_be_lent(value, p):
                found[name] = value
                lent.setdefault(p, Lent([kept.entry], set())).names.add(name)
            else:
                found[name] = _copy(value.detach(), dtype, p, self._shape(name, p))
        return found

    def _note_wider(self, found: dict[str, Any], kept: dict[str, Kept], group: Group, index: int, i: int) -> None:
        for name in self.slots & found.keys():
            before, now = kept.get(name, kept.get(name + CODES)), found[name]
            if before is not None and isinstance(now, Tensor) and before.value.dtype.itemsize < now.dtype.itemsize:
                who = describe(group, index, i)
                self.widened.append(f"{name!r} of {who}, from {before.value.dtype} to {now.dtype}")

    def _dtype(self, name: str, value: Tensor, p: Tensor, group: Group) -> torch.dtype:
        """Of a state that is loaded. None becomes narrower, and none stays narrower than a new one would be."""
        saved = value.dtype
        if not _can_be_stepped(p) or value.shape != p.shape or not saved.is_floating_point:
            return saved
        if name == EMA:  # which torch.optim keeps in the parameter's dtype
            return compute_dtype(p)
        if name not in self.slots:
            return saved
        asked, new = asked_dtype(group, name), state_dtype(group, name, p)
        if asked == "int8" and can_be_in_blocks(p):  # to be encoded, from what it is now
            return saved
        return new if asked is not None or saved.itemsize < new.itemsize else saved

    def _shape(self, name: str, p: Tensor) -> torch.Size | None:
        """Of a state that a step reads, if that lies as its parameter does."""
        if not is_materialised(p):
            return None
        of_blocks = format_in_blocks(name, p, self.rule)
        return of_blocks.shape if of_blocks is not None else p.shape if name in self.placed else None

    def warn(self) -> None:
        _masters.warn_of_loss(self.losses)
        if self.widened:
            more = f", and {len(self.widened) - 1} more" if len(self.widened) > 1 else ""
            warn(
                f"states of this checkpoint were narrower than new ones would be, and have been widened: "
                f"{self.widened[0]}{more}. What their numbers had lost is not back; state_dtype= chooses a dtype"
            )


class Loading(HasStates, Protocol):
    """What an optimizer has that loads a state_dict."""

    #: While it loads one: its __setstate__, which torch calls then, has the states restored.
    _loader: Loader | None

    def register_load_state_dict_pre_hook(
        self, hook: Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None]
    ) -> RemovableHandle: ...


def load(optimizer: Loading, by_torch: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """Loads a state_dict: see FusedOptimizer.load_state_dict.

    Args:
        by_torch: torch's own load_state_dict of the optimizer.
    """
    is_one = isinstance(state_dict, dict) and {"state", "param_groups"} <= state_dict.keys()
    # Whether a master fits is seen by each rank alone. Without any, ranks load without a word between them.
    groups = [*optimizer.param_groups, *(state_dict["param_groups"] if is_one else ())]
    has_masters = any(group.get("master") is not None for group in groups)
    params = [p for group in optimizer.param_groups for p in group["params"] if has_masters]
    name = type(optimizer).__name__
    loader = Loader(optimizer.param_groups, optimizer.defaults, optimizer.rule, name)
    with ExitStack() as until_checked:
        until_checked.enter_context(agreement(params))

        def prepare(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            prepared = loader.prepare(final)
            until_checked.close()
            with agreement(params):
                _masters.check_loaded(loader.masters)
            return prepared

        if not is_one:
            raise ValueError("this is not an optimizer's state_dict: it needs the keys 'state' and 'param_groups'")
        # Registered last, so that it sees what the user's own hooks made of the state_dict.
        handle = optimizer.register_load_state_dict_pre_hook(prepare)
        before = (optimizer.state, optimizer.param_groups)
        optimizer._loader = loader
        try:
            by_torch(state_dict)
        except BaseException:
            optimizer.state, optimizer.param_groups = before
            raise
        finally:
            handle.remove()
            optimizer._loader = None
    loader.warn()


def renew_early_states(optimizer: HasStates) -> None:
    """A library that shards a model, as accelerate does, replaces the parameters of an optimizer that has states from
    its construction on: nobody will ask for these again, and the new parameters lack theirs."""
    if not optimizer.rule.states_at_construction:
        return
    params = {p for group in optimizer.param_groups for p in group["params"]}
    replaced = [p for p in optimizer.state if isinstance(p, Tensor) and p not in params and _is_new(optimizer.state[p])]
    for p in replaced:
        del optimizer.state[p]
    if replaced:
        make_early_states(optimizer)


def _is_new(states: Mapping[str, Any]) -> bool:
    """Whether no step has been taken, as far as one knows without waiting for a GPU."""
    step = states.get("step")
    return isinstance(step, Tensor) and step.device.type == "cpu" and step.item() == 0


def _can_be_stepped(p: Tensor) -> bool:
    if not is_materialised(p) or p.layout != torch.strided or is_traceable_wrapper_subclass(local(p)):
        return False
    return p.dtype in DTYPES


def _is_stepped(p: Tensor, values: Mapping[str, Any], rule: Rule) -> bool:
    """Whether these states are to fit the parameter. Those of one that is frozen, not materialised, or empty while its
    states are not (a placeholder of what lies elsewhere) are nobody's business: they are carried along."""
    if not p.requires_grad or not _can_be_stepped(p):
        return False
    return p.numel() > 0 or not any(
        isinstance(value := values.get(slot.name), Tensor) and value.numel() > 0 for slot in rule.states
    )


def _whole_scalars(values: Mapping[str, Any], rule: Rule) -> dict[str, Tensor]:
    """Those states of one number that somebody distributed: the ranks have one number each."""
    names = [name for name in ("step", *rule.number_names) if is_dtensor(values.get(name))]
    return {name: whole(values[name]) for name in names}


def _copy(saved: Tensor, dtype: torch.dtype, p: Tensor, of_step: torch.Size | None = None) -> Tensor:
    """With memory of its own, on its parameter's device and, where it has its shape, in its memory order; one that a
    step reads, in this shape, is placed as the parameter is."""
    if not is_materialised(p):
        return saved.clone()
    plain = not (is_dtensor(saved) or is_dtensor(p))
    can_be_placed = of_step is not None or (plain and saved.is_floating_point())
    if can_be_placed and _can_be_stepped(p) and fits_in_place(p, saved, of_step or p.shape):
        return placed(p, saved, dtype)
    return saved.to(p.device, dtype, copy=True)


def _carried(value: Any, p: Tensor) -> Any:
    """Somebody else's value, as torch carries it along: tensors in it are copied to the parameter's device."""
    if isinstance(value, Tensor):
        return _copy(value.detach(), value.dtype, p)
    if isinstance(value, dict):
        return {key: _carried(item, p) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_carried(item, p) for item in value)
    return value

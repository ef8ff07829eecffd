"""Adds up, over processes, the sums of squares of tensors of which each process has a part.

Every process gets every other's numbers and adds them itself, in one order. An all-reduce would need fewer bytes, but
does not promise the same bits on every rank, and replicas would diverge. Beside the numbers travels one that says
whether a process has to refuse the step, so that all refuse it and none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtensor import aligned, is_dtensor


def tree_sum(rows: Tensor) -> Tensor:
    """The sum of rows, by halving, as within a tile (:func:`fusedoptim.reference.sum_of_squares`): with n rows, and h
    the power of two below n, row i and row i+h, then again with h rows. Elementwise, hence with the same bits on every
    device, in as many operations as n has binary digits. Overwrites the rows."""
    n = rows.shape[0]
    while n > 1:
        half = 1 << (n - 1).bit_length() - 1
        rows[: n - half] += rows[half:n]
        n = half
    return rows[0]


class RankError(RuntimeError):
    """What all ranks do together did not come about. All of them know."""


class RefusedElsewhere(RankError):
    """Another rank refused what all do together."""

    def __init__(self) -> None:
        super().__init__(
            "another rank refused this, for a reason that its own error gives: nothing was changed here, nor on the "
            "ranks that this one shares DTensors or a norm with"
        )


class Round(NamedTuple):
    """What one all-gather adds up."""

    group: Any  # a ProcessGroup
    ranks: int
    #: The types of the devices that its backends take tensors from.
    devices: tuple[str, ...]
    #: The places of the numbers that it adds up, and that after the last, where the refusals are; None for all.
    places: Tensor | None = None
    #: Of those that should be equal on all its ranks, which all take from the first: should one of these have lost a
    #: gradient, or have other bits, they have the same norm all the same.
    equal: Tensor | None = None

    def total(self, numbers: Tensor) -> Tensor:
        mine = numbers.to(self.device_for(numbers)).contiguous()
        rows = mine.new_zeros((self.ranks, *mine.shape))  # for a group that only simulates others, and fills in nothing
        try:
            all_gather(rows.view(-1), mine, self.group)
        except RuntimeError as error:
            raise RankError(
                f"the {self.ranks} ranks of a process group could not tell each other their parts of the gradients' "
                "norm, or whether all of them can go on; nothing was changed here. Each of them has to make the same "
                f"calls: one may have ended, or not have called step(), or what else this one called ({error})"
            ) from error
        if self.places is None:
            return tree_sum(rows).to(numbers.device)
        result = mine.clone()
        if self.equal is not None:
            result.index_copy_(0, self.equal, rows[0].index_select(0, self.equal))
        result.index_copy_(0, self.places, tree_sum(rows.index_select(1, self.places)))
        return result.to(numbers.device)

    def on(self, device: torch.device) -> Round:
        """The same with its places there."""
        if self.places is None or self.places.device == device:
            return self
        equal = None if self.equal is None else self.equal.to(device)
        return self._replace(places=self.places.to(device), equal=equal)

    def device_for(self, numbers: Tensor) -> torch.device:
        """Where they travel from: where they are, if a backend takes them there. Parameters may be on the CPU while
        their mesh is one of GPUs."""
        if numbers.device.type in self.devices:
            return numbers.device
        kind = self.devices[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())


def all_gather(rows: Tensor, mine: Tensor, group: Any) -> None:
    """On the current stream: the host does not wait for it, unless tensors are on the CPU."""
    import torch.distributed as dist

    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
    gather(rows, mine, group=group)


class Exchange:
    """Of a list of parameters, some of which are parts of tensors.

    Args:
        params: all that a norm is of, in the same order on all ranks.
        norm_groups: process groups over which the sum of all is added, for what tensors do not show.
    """

    def __init__(self, params: Sequence[Tensor], norm_groups: Sequence[Any]) -> None:
        self.size = len(params)
        #: Where numbers are added up, on all ranks alike.
        self.home = next((p.device for p in params if p.device.type != "cpu"), torch.device("cpu"))
        #: What norm_groups add up to: for a rank without parameters, which has no place for it.
        self.sum: Tensor | None = None
        dimensions: dict[str, _Dimension] = {}
        plain: list[int] = []
        last: tuple[Any, Any, Any] = (None, None, None)
        for i, p in enumerate(params):
            if not is_dtensor(p):
                plain.append(i)
                continue
            mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
            if mesh is not last[0] or placements != last[1]:  # as those of neighbours seldom are
                last = (mesh, placements, _dimensions_of(mesh, placements, dimensions))
            for members in last[2]:
                members.append(i)
        #: One for each mesh dimension that shards.
        self.rounds: list[Round] = []
        #: For those over which all is replicated.
        self.replicas: list[Round] = []
        for one in dimensions.values():
            if not one.sharded:
                self.replicas.append(one.round)
                continue
            equal = one.replicated + plain  # which is everybody's
            places = [*one.sharded, self.size] if len(one.sharded) < self.size else []
            self.rounds.append(one.round._replace(places=_indices(places), equal=_indices(equal)))
        #: The places of plain tensors.
        self.plain = _indices(plain)
        self.norm_groups = [_round(group) for group in norm_groups]

    @property
    def adds(self) -> bool:
        """Whether there is anything to add to what is measured here."""
        return bool(self.rounds or self.norm_groups)

    def add(self, numbers: Tensor, of_tensors: bool) -> None:
        """Makes each of them, but for the last, that of the whole tensor, and the last that of all ranks.

        Args:
            numbers: one for each parameter, and the refusals; fp64.
            of_tensors: for the norm of each tensor; else for that of all, as their sum is meant to have it.
        """
        own = None
        if of_tensors and self.plain is not None:
            self.plain = self.plain.to(numbers.device)
            own = numbers.index_select(0, self.plain)
        for k, one in enumerate(self.rounds):
            self.rounds[k] = one = one.on(one.device_for(numbers))  # copied once
            numbers.copy_(one.total(numbers))
        if own is not None and self.plain is not None:  # a plain tensor's own norm is its process's alone
            numbers.index_copy_(0, self.plain, own)
        if of_tensors or not self.norm_groups:
            return
        both = torch.stack([tree_sum(numbers[:-1].clone()), numbers[-1]]) if self.size else numbers.new_zeros(2)
        for one in self.norm_groups:
            both = one.total(both)
        numbers.zero_()
        numbers[-1] = both[1]
        self.sum = both[0]
        if self.size:
            numbers[0] = self.sum

    def refuse(self, params: Sequence[Tensor], of_tensors: Sequence[bool]) -> None:
        """Takes part in what the other ranks do with these parameters, so that they learn of it and none waits.

        Args:
            of_tensors: that argument of each add() of theirs; none if they only place gradients as parameters are.
        """
        for p in params:
            if is_dtensor(p) and p.grad is not None and (grad := aligned(p, p.grad)) is not None:
                p.grad = grad
        for one in of_tensors:
            numbers = torch.zeros(self.size + 1, dtype=torch.float64, device=self.home)
            numbers[-1] = 1
            self.add(numbers, one)
            if self.home.type == "cpu":  # where they see it at once
                return

    def agree(self, refused: bool) -> bool:
        """Whether any rank refuses. Waits for all."""
        answer = torch.tensor([float(refused)], dtype=torch.float64, device="cpu")
        for one in (*self.rounds, *self.replicas, *self.norm_groups):
            answer = one._replace(places=None, equal=None).total(answer)
        return bool(answer.item() != 0)


@contextmanager
def agreement(params: Sequence[Tensor]) -> Iterator[None]:
    """What raises within it on one rank that shares DTensors among these raises on all of them: none goes on and waits
    for another."""
    exchange = Exchange(params, ())
    try:
        yield
    except Exception as error:
        if not isinstance(error, RankError):  # which all know of
            exchange.agree(True)
        raise
    if exchange.agree(False):
        raise RefusedElsewhere


class _Dimension(NamedTuple):
    """Of a mesh: the places of the parameters that it shards, and of those that it replicates."""

    round: Round
    sharded: list[int]
    replicated: list[int]


def _dimensions_of(mesh: Any, placements: Iterable[Any], known: dict[str, _Dimension]) -> list[list[int]]:
    """The lists that a parameter with these placements belongs to. Dimensions of different meshes are one where they
    have one process group."""
    found: list[list[int]] = []
    if mesh.get_coordinate() is None:  # this rank is not in the mesh, and has no part of its tensors
        return found
    for d, placement in enumerate(placements):
        if mesh.size(d) == 1:
            continue
        group = mesh.get_group(d)
        one = known.setdefault(group.group_name, _Dimension(_round(group, mesh.device_type), [], []))
        found.append(one.replicated if placement.is_replicate() else one.sharded)
    return found


def _indices(places: list[int]) -> Tensor | None:
    return torch.tensor(places, device="cpu") if places else None


def _round(group: Any, device: str = "cpu") -> Round:
    """device: the type of one that its backends surely take tensors from."""
    kinds = [found.type for found in getattr(group, "_device_types", ())]  # private
    return Round(group, group.size(), tuple(sorted(kinds, key=lambda kind: kind != device)) or (device,))

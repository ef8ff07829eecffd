"""The process groups over which a norm's sum is added, for what tensors do not show."""

from __future__ import annotations

from typing import Any


class NormGroups(tuple[Any, ...]):
    """ProcessGroups. A copy has the same ones, and so has a pickle where it is loaded, by their names."""

    def __repr__(self) -> str:
        return ", ".join(f"<process group {group.group_name}>" for group in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> NormGroups:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, tuple(group.group_name for group in self)


def _by_name(*names: str) -> NormGroups:
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return NormGroups(map(resolve, names))


def norm_groups(value: Any) -> NormGroups:
    """Of what was passed as ``norm_group``: a ProcessGroup, several, or None.

    Raises:
        ValueError: for anything else, also for a group that this process is not in.
    """
    if value is None:
        return NormGroups()
    groups = NormGroups(value) if isinstance(value, (tuple, list)) else NormGroups((value,))
    for group in groups:
        if not hasattr(group, "group_name"):  # torch.distributed gives a number to a process that is not in a new group
            raise ValueError(
                f"Invalid norm_group: {group!r}; it must be a ProcessGroup of torch.distributed that this process is "
                "in, or a sequence of them"
            )
    return groups

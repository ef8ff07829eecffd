"""A progress bar on stderr, with tqdm where that is installed; else lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], says: Callable[[Item], str]) -> Iterator[Item]:
    """The items, each of which is named when its turn comes."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for number, item in enumerate(items, 1):
            print(f"[{number}/{len(items)}] {says(item)}", file=sys.stderr, flush=True)
            yield item
        return
    with tqdm(total=len(items), file=sys.stderr, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_description_str(says(item))
            yield item
            bar.update()

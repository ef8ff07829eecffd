"""Warnings point at the user's line."""

from __future__ import annotations

import ast
import copy
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedoptim
from fusedoptim._warnings import warn

ROOT = Path(__file__).parent.parent


def plain(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    o.step()
    return sys._getframe().f_lineno - 1


def under_a_schedule_that_wraps_step(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    torch.optim.lr_scheduler.StepLR(o, 1)
    o.step()
    return sys._getframe().f_lineno - 1


def under_a_profiler(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        o.step()
        return sys._getframe().f_lineno - 1


def compiled(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    step = torch.compile(o.step, fullgraph=True, backend="eager")
    step()
    return sys._getframe().f_lineno - 1


def by_clipping(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    fusedoptim.clip_grad_norm_([p], 1.0)
    return sys._getframe().f_lineno - 1


def in_the_backward_pass(o: fusedoptim.AdamW, p: torch.nn.Parameter) -> int:
    p.grad = None
    with fusedoptim.step_in_backward(o):
        p.square().sum().backward()
        return sys._getframe().f_lineno - 1


WAYS = [plain, under_a_schedule_that_wraps_step, under_a_profiler, compiled, by_clipping, in_the_backward_pass]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_warning_points_at_the_users_line(
    way: Callable[[fusedoptim.AdamW, torch.nn.Parameter], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedoptim._native, "problem", "they were not built: no C++ compiler")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedoptim.AdamW([p])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        line = way(optimizer, p)
    ours = [w for w in seen if "no C++ compiler" in str(w.message)]
    assert [(w.filename, w.lineno) for w in ours] == [(__file__, line)]


#: Of the package, as far as its module's name says.
WARNING_CODE = """
from contextlib import contextmanager
from fusedoptim._warnings import warn

@contextmanager
def context():
    warn("on entering")
    yield
    warn("on leaving")

class Copied:
    def __deepcopy__(self, memo):
        warn("on copying")
        return self
"""


def test_what_with_and_deepcopy_go_through_is_no_line_of_the_users() -> None:
    package: dict[str, Any] = {"__name__": "fusedoptim.example"}
    exec(WARNING_CODE, package)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first = sys._getframe().f_lineno
        with package["context"]():
            copy.deepcopy([package["Copied"]()])
    assert [(str(w.message), w.filename, w.lineno - first) for w in seen] == [
        ("on entering", __file__, 1),
        ("on copying", __file__, 2),
        ("on leaving", __file__, 1),
    ]


@pytest.mark.filterwarnings("error")
def test_filters_and_repetitions_are_those_of_the_users_module() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=__name__)
        for _ in range(3):
            warn("once per line")
        warn("of a category", FutureWarning)
    assert [(str(w.message), w.category) for w in seen] == [
        ("once per line", UserWarning),
        ("of a category", FutureWarning),
    ]
    with pytest.raises(UserWarning, match="as an error"):
        warn("as an error")


def test_a_thread_without_a_line_of_the_users_warns_all_the_same() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thread = threading.Thread(target=warn, args=("from a thread",))
        thread.start()
        thread.join()
    assert [str(w.message) for w in seen] == ["from a thread"]


def test_nothing_in_the_package_warns_in_another_way() -> None:
    """Where warnings.warn is called, the line that it names is a matter of luck."""
    users = set()
    for path in (ROOT / "fusedoptim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            if "warnings" in imported:
                users.add(path.name)
    assert users == {"_warnings.py"}

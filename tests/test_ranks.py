"""The harness of tests over several processes: what it makes of a rank that raises, hangs or dies."""

from __future__ import annotations

import os
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankFailure, run, run_apart

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def gathered(x: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x + dist.get_rank())
    return os.getpid(), found


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("a bad gradient")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def die_on(rank: int) -> str:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()
    return "done"


def test_every_rank_gives_a_result_and_processes_are_kept() -> None:
    first, second = (run(2, gathered, torch.arange(3.0)) for _ in range(2))
    assert first[0][0] != first[1][0] and [pid for pid, _ in first] == [pid for pid, _ in second]
    for _, found in first + second:
        assert torch.equal(torch.stack(found), torch.stack([torch.arange(3.0), torch.arange(3.0) + 1]))


def test_an_exception_on_one_rank_ends_all_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised Traceback.*in raise_on.*ValueError: a bad gradient") as e:
        run(2, raise_on, 1)
    assert "rank 0 did not answer" in str(e.value) and "barrier" in str(e.value)
    assert len(run(2, gathered, torch.zeros(1))) == 2  # on processes that were started anew


def test_an_exception_everywhere() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 0 raised.*TypeError.*rank 1 raised.*TypeError"):
        run(2, gathered, None)


def test_a_rank_that_hangs() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 0 returned.*rank 1 did not answer.*in hang_on"):
        run(2, hang_on, 1, timeout=1)


def test_a_rank_that_dies() -> None:
    with pytest.raises(RankFailure, match="rank 1 ended with exit code 7"):
        run(2, die_on, 1)


def test_processes_of_their_own_tell_what_became_of_each() -> None:
    one, two = run_apart(2, die_on, 1)
    assert one.error is not None and one.error.startswith("RuntimeError: ") and one.exit_code is None
    assert two.exit_code == 7 and two.error is None
    one, two = run_apart(2, raise_on, 1, group_timeout=1)
    assert one.error is not None and two.error == "ValueError: a bad gradient"
    assert [o.result for o in run_apart(2, die_on, -1)] == ["done", "done"]
    with pytest.raises(RankFailure, match="in hang_on"):
        run_apart(2, hang_on, 0, timeout=1)

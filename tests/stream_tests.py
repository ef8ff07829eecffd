"""Streams, CUDA graphs and memory in flight; for a test module of a GPU, which imports this one's names."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import (
    BY_NAME,
    FULL,
    Case,
    assert_same_optimizers,
    parameters,
    set_gradients,
)
from gpu import on_gpu, pair, set_both, steady

import fusedoptim


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("case", FULL, ids=str)
def test_nothing_synchronises_or_allocates(backend: str, case: Case) -> None:
    mine, theirs, a, _ = pair(backend, case, [(1000,)] * 50, torch.float32)
    set_both(mine, theirs, 0)
    steady(a)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(5):
            a.param_groups[0]["lr"] = 1e-3 / (step + 1)
            a.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


@pytest.mark.parametrize(
    ("case", "count"),
    # one elementwise rule stands for all where there are many tensors
    [(c, n) for c in FULL for n in (30, 5000) if n == 30 or c.optimizer in ("AdamW", "NormAdaptive")],
    ids=str,
)
def test_capture_and_replay_with_a_changing_lr(backend: str, case: Case, count: int) -> None:
    """The learning rate is a tensor on the device; 5000 tensors' addresses do not fit the arguments."""
    shapes = [(1 + i % 70,) for i in range(count)]
    mine, theirs, a, b = pair(backend, case, shapes, torch.float32, lr=0.01)
    lr = torch.tensor(0.01, device="cuda")
    a.param_groups[0]["lr"] = lr
    b.param_groups[0]["lr"] = torch.tensor(0.01)
    grads = [torch.zeros_like(p) for p in mine]

    def feed(step: int) -> None:
        set_gradients(theirs, step)
        for p, g, q in zip(mine, grads, theirs, strict=True):
            g.copy_(q.grad)
            p.grad = g

    def change(step: int) -> None:
        lr.fill_(0.01 / (1 + step))
        b.param_groups[0]["lr"].fill_(0.01 / (1 + step))

    for step in range(2):  # before the capture
        feed(step)
        change(step)
        a.step()
        b.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for step in range(2, 22 if count < 5000 else 6):  # of 5000 tensors, each takes a second
        feed(step)
        change(step)
        graph.replay()
        b.step()
    # an ordinary step in between, with other gradients, must not disturb the graph
    extra = [torch.ones_like(p) for p in mine]
    for p, q, g in zip(mine, theirs, extra, strict=True):
        p.grad, q.grad = g, torch.ones_like(q)
    a.step()
    b.step()
    feed(22)
    change(22)
    graph.replay()
    b.step()
    torch.cuda.synchronize()
    assert_same_optimizers(a, b)


def test_memory_used_on_another_stream_is_not_given_away_too_soon(backend: str) -> None:
    """Tables made on one stream, used on another, and let go of while that one is still at work."""
    side = torch.cuda.Stream()
    mine, theirs, a, b = pair(backend, BY_NAME["adamw"], [(300_000,)] * 8, torch.float32)
    with torch.cuda.stream(side):
        set_both(mine, theirs, 0)
        a.step()
    torch.cuda.synchronize()
    b.step()
    set_both(mine, theirs, 1)
    torch.cuda._sleep(400_000_000)
    a.step()
    a._drop_runners()
    rubbish, reserved = [], torch.cuda.memory_reserved()
    with torch.cuda.stream(side):
        while torch.cuda.memory_reserved() == reserved:  # all that was left of what the stream has had
            rubbish.append(torch.full((64,), -1, dtype=torch.int64, device="cuda"))
    b.step()
    torch.cuda.synchronize()
    assert_same_optimizers(a, b)
    del rubbish


def test_an_optimizer_may_go_during_a_capture(backend: str) -> None:
    """Its tables were used on two streams; letting go of them must wait for nothing, which would end the capture."""
    mine, theirs, a, b = pair(backend, BY_NAME["adamw"], [(1000,)] * 3, torch.float32)
    *_, other, _ = pair(backend, BY_NAME["norm_adaptive"], [(1000,)] * 3, torch.float32)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    set_both(mine, theirs, 0)
    a.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
        other._drop_runners()
        del other
        gc.collect()
    graph.replay()
    b.step()
    b.step()
    torch.cuda.synchronize()
    assert_same_optimizers(a, b)


def test_a_clipped_step_whose_launches_overlap(backend: str) -> None:
    """The launch that updates may begin while the one that sums for the norm still runs, and waits for it."""
    shapes = [(n,) for n in range(1, 400, 7)] + [(3_000_001,)]
    mine, theirs, a, b = pair(backend, BY_NAME["adamw"], shapes, torch.float32, max_grad_norm=0.1)
    for step in range(10):
        set_both(mine, theirs, step)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_first_step_cannot_be_captured(backend: str) -> None:
    params = on_gpu(parameters([(5,)]))
    params[0].grad = torch.ones_like(params[0])
    optimizer = fusedoptim.AdamW(params, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert not optimizer.state
    optimizer.step()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_current_stream_is_used(backend: str, case: Case) -> None:
    """Gradients come late on each of two streams; a step on the wrong one would not wait for them."""
    mine, theirs, a, b = pair(backend, case, [(100_000,)] * 4, torch.float32)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(6):
        set_gradients(theirs, step)
        late = [q.grad.cuda() for q in theirs]
        for p in mine:
            p.grad = torch.full_like(p, 7.0)
        stream = streams[step % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            for p, g in zip(mine, late, strict=True):
                p.grad.copy_(g)
            a.step()
        torch.cuda.current_stream().wait_stream(stream)
        b.step()
    assert_same_optimizers(a, b)

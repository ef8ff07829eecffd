"""Steps in fewer bits on a GPU: the bits of the CPU's kernels, also in a graph, and for elements that lie otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import ALL, LOW, LOW_SHAPES, Case, assert_same_optimizers, parameters
from gpu import Params, backend, set_both
from layouts import LAYOUTS
from torch import Tensor

__all__ = ["backend"]
pytestmark = pytest.mark.gpu
#: Blocks in rows of whole blocks and others, of one tile and of many, across chunks.
LARGE = [(300, 1024), (70, 1000), (513, 384), (1 << 17,), (64, 32, 3, 3), (1000, 70)]
DTYPES = [torch.bfloat16, torch.float32]


def both(
    backend: str, case: Case, params: Params, lies: Callable[[Tensor], Tensor] = lambda t: t, **options: object
) -> tuple:
    mine = [torch.nn.Parameter(lies(p.detach().cuda())) for p in params]
    return mine, case.make(mine, backend=backend, **options), params, case.make(params, backend="cpu", **options)


def step(pair: tuple, steps: int) -> None:
    mine, a, theirs, b = pair
    for k in range(steps):
        set_both(mine, theirs, k)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOW, ids=str)
def test_every_way_to_store(backend: str, case: Case, dtype: torch.dtype) -> None:
    step(both(backend, case, parameters([*LOW_SHAPES, *LARGE], dtype)), 3)


@pytest.mark.parametrize("case", LOW, ids=str)
def test_with_all_options(backend: str, case: Case) -> None:
    step(both(backend, case, parameters([*LOW_SHAPES, *LARGE], torch.bfloat16), **ALL), 3)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "misaligned"])
@pytest.mark.parametrize("case", LOW, ids=str)
def test_memory_orders(backend: str, case: Case, layout: str) -> None:
    def lies(t: Tensor) -> Tensor:
        return t if layout == "channels_last" and t.dim() != 4 else LAYOUTS[layout](t)

    params = [torch.nn.Parameter(lies(p.detach())) for p in parameters(LARGE, torch.bfloat16)]
    step(both(backend, case, params, lies), 2)


@pytest.mark.parametrize("case", LOW, ids=str)
def test_replayed_graphs_draw_new_bits(backend: str, case: Case) -> None:
    pair = both(backend, case, parameters(LARGE, torch.bfloat16))
    _, a, _, b = pair
    step(pair, 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        a.step()
    for _ in range(3):
        graph.replay()
        b.step()
    assert_same_optimizers(a, b)

"""Parameters and states that share memory are refused; those that only interleave are stepped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import FULL, Case, assert_same_bits
from counted import calls
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedoptim
from fusedoptim._overlap import overlaps_itself, sharing

REGISTERED = [torch.float32, torch.bfloat16, torch.float64]


def bytes_of(t: torch.Tensor) -> list[int]:
    """Where each element lies, in bytes of its storage, by the definition of strides."""
    places = [t.storage_offset() * t.element_size()]
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = [p + i * stride * t.element_size() for p in places for i in range(size)]
    return [p + b for p in places for b in range(t.element_size())]


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    base = torch.zeros(64).view(torch.uint8)
    typed = base.view(draw(st.sampled_from(REGISTERED)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 9)) for _ in shape]
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0)
    offset = draw(st.integers(0, max(typed.numel() - 1 - max(reach, 0), 0)))
    if reach + offset >= typed.numel():
        return typed[:1]
    return typed.as_strided(shape, strides, offset)


@settings(max_examples=300, deadline=None)
@given(views())
def test_overlaps_itself(t: torch.Tensor) -> None:
    places = bytes_of(t) if t.numel() else []
    assert overlaps_itself(t) == (len(set(places)) != len(places))


@settings(max_examples=300, deadline=None)
@given(st.lists(views(), min_size=2, max_size=4))
def test_sharing(candidates: list[torch.Tensor]) -> None:
    base = torch.zeros(64).view(torch.uint8)
    tensors = []
    for t in candidates:
        if not overlaps_itself(t):
            typed = base.view(t.dtype)
            tensors.append(typed.as_strided(t.shape, t.stride(), t.storage_offset()))
    sets = [set(bytes_of(t)) if t.numel() else set() for t in tensors]
    truth = {(i, j) for i in range(len(sets)) for j in range(i + 1, len(sets)) if sets[i] & sets[j]}
    found = sharing(tensors)
    if found is None:
        assert not truth
    else:
        assert tuple(sorted(found)) in truth


@pytest.mark.parametrize("case", FULL, ids=str)
def test_overlapping_parameters_are_refused(case: Case) -> None:
    flat = torch.arange(10.0)
    a, b = torch.nn.Parameter(flat[:6]), torch.nn.Parameter(flat[4:])
    optimizer = case.make([a, b])
    for p in (a, b):
        p.grad = torch.ones_like(p)
    before = flat.clone()
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* shares memory with parameter 0 of group 0"):
        optimizer.step()
    assert_same_bits(flat, before)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_interleaved_parameters_are_stepped(case: Case) -> None:
    flat, alone = torch.arange(12.0).reshape(6, 2), torch.arange(12.0).reshape(6, 2)
    columns = [torch.nn.Parameter(flat[:, i]) for i in range(2)]
    separate = [torch.nn.Parameter(alone[:, i].clone()) for i in range(2)]
    for params in (columns, separate):
        optimizer = case.make(params)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 1.0 + i + step)
            optimizer.step()
    for p, q in zip(columns, separate, strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("case", FULL, ids=str)
def test_two_tensors_of_numpy_over_one_array_are_refused(case: Case) -> None:
    """Each has a storage of its own, which begins elsewhere."""
    array = np.arange(10, dtype=np.float32)
    a, b = (torch.nn.Parameter(torch.from_numpy(part)) for part in (array[:6], array[4:]))
    optimizer = case.make([a, b])
    for p in (a, b):
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* shares memory with parameter 0 of group 0"):
        optimizer.step()
    assert (array == np.arange(10)).all()
    neighbours = [torch.nn.Parameter(torch.from_numpy(part)) for part in (array[:5], array[5:])]
    optimizer = case.make(neighbours)
    for p in neighbours:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_memory_at_odd_addresses() -> None:
    """Views of bytes may begin anywhere: the map of memory has the unit that all are multiples of."""
    raw = np.zeros(64, dtype=np.uint8)
    at = [torch.frombuffer(memoryview(raw)[i : i + 16], dtype=torch.uint8) for i in (0, 6, 23)]
    assert sharing(at) == (0, 1)
    assert sharing([at[0], at[2]]) is None


def test_shared_states_are_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = fusedoptim.AdamW(params)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    own = optimizer.state[params[1]]["step"]
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    with pytest.raises(ValueError, match=r"state 'step' of parameter 1 .* shares memory with state 'step' of"):
        optimizer.step()
    optimizer.state[params[1]]["step"] = own
    optimizer.state[params[1]]["exp_avg"] = params[0].detach()
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert own.item() == 1


def test_a_parameter_whose_elements_overlap_is_refused() -> None:
    p = torch.nn.Parameter(torch.arange(10.0).as_strided((4, 4), (2, 1)))
    p.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="share memory"):
        fusedoptim.SGD([p])


def test_many_tensors_are_looked_through_quickly() -> None:
    """Without a look at every pair of them."""

    def work(n: int) -> int:
        tensors = [*torch.zeros(4 * n).split(4), *(torch.zeros(3) for _ in range(n))]
        assert sharing(tensors) is None
        return calls(lambda: sharing(tensors))

    assert work(2000) == pytest.approx(2 * work(1000), rel=0.02)

"""What is stepped: the sizes of models, the bytes that a step moves, parameters and gradients."""

from __future__ import annotations

import pytest
import torch
from benchmark_runs import TINY

from benchmarks.measure import limits
from benchmarks.measure.cases import CASES, Case, shard
from benchmarks.measure.data import Data
from benchmarks.measure.devices import device_named
from benchmarks.measure.optimizers import DTYPES, SETTINGS, Work


@pytest.mark.parametrize(
    "name,elements,tensors,groups",
    [
        ("gpt2-small", 124_439_808, 148, 1),
        ("gpt2-xl", 1_557_611_200, 580, 1),
        ("llama3-8b", 8_030_261_248, 291, 1),
        ("vit-l16", 304_326_632, 296, 1),
        ("resnet50", 25_557_032, 161, 1),
        ("olmoe", 6_919_161_856, 3219, 1),
        ("64M", 1 << 26, 1, 1),
        ("1G", 1 << 30, 1, 1),
        ("300x1024", 300 * 1024, 300, 1),
        ("2000x64", 128_000, 2000, 1),
        ("2000x1024", 2_048_000, 2000, 1),
        ("465-groups", 465 * 64, 465, 465),
    ],
)
def test_cases_are_the_published_models(name: str, elements: int, tensors: int, groups: int) -> None:
    case = CASES[name]
    assert (case.name, case.elements, len(case.shapes), case.groups) == (name, elements, tensors, groups)


@pytest.mark.parametrize("name", ["llama3-8b", "olmoe"])
def test_a_shard_is_the_first_of_eight(name: str) -> None:
    whole, part = CASES[name], CASES[f"{name}-shard"]
    assert len(part.shapes) == len(whole.shapes)
    for a, b in zip(whole.shapes, part.shapes, strict=True):
        assert b[1:] == a[1:] and 8 * (b[0] - 1) < a[0] <= 8 * b[0]
    assert list(shard(iter([(9, 4), (8,), (1, 3)]), 8)) == [(2, 4), (1,), (1, 3)]


def test_odd_sizes_are_odd_and_always_the_same() -> None:
    sizes = [shape[0] for shape in CASES["5000-odd"].shapes]
    assert len(sizes) == 5000 and all(n % 2 for n in sizes)
    assert min(sizes) == 1 and max(sizes) > 15_000 and len(set(sizes)) > 1000
    assert sum(sizes) == CASES["5000-odd"].elements == sum(s[0] for s in CASES["5000-odd"].shapes)


@pytest.mark.parametrize(
    "optimizer,dtype,moved",
    [
        ("AdamW", "fp32", 28),
        ("AdamW", "bf16", 14),
        ("AdamW", "bf16+fp32", 22),
        ("AdamW", "stochastic", 14),
        ("AdamW", "remainder", 18),
        ("AdamW", "remainder+int8", 2 + 2 * (2 + 2 + 2 * (1 + 4 / 128))),
        ("SGD", "fp32", 20),
        ("RMSprop", "fp32", 20),
        ("Adagrad", "fp32", 20),
        ("NormAdaptive", "fp32", 12),
    ],
)
def test_bytes_by_definition(optimizer: str, dtype: str, moved: int) -> None:
    assert Work(SETTINGS[optimizer], DTYPES[dtype]).bytes_per_element == moved


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_pass_goes_through_all_that_a_step_writes(
    optimizer: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer == "SGD" and DTYPES[dtype].options:
        pytest.skip("they are measured with AdamW")
    work, arrays = Work(SETTINGS[optimizer], DTYPES[dtype]), []
    make = limits._array
    monkeypatch.setattr(limits, "_array", lambda *how: arrays.append(make(*how)) or arrays[-1])
    limit = limits.stream(device_named("cpu"), work, 64)
    limit.call()
    gradient, *written = arrays
    assert [a.dtype for a in written] == work.written
    assert limit.bytes == gradient.nbytes + 2 * sum(a.nbytes for a in written)
    assert (gradient == 1).all() and all((a.view(-1, 4) != 1).any(1).all() for a in written)


def test_groups_share_the_tensors_and_have_their_own_learning_rates() -> None:
    data = Data(CASES["465-groups"], torch.float32, torch.device("cpu"), 1)
    params = data.parameters()
    groups = data.groups(params, 0.1)
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in params]
    assert len({g["lr"] for g in groups}) == 465 and all(0.1 <= g["lr"] < 0.2 for g in groups)


def test_an_embeddings_rows_without_gradients_have_no_states() -> None:
    case = Case("embedding", ((41, 3),), live=20)
    data = Data(case, torch.float32, torch.device("cpu"), 2)
    params = data.parameters()
    optimizer = SETTINGS["AdamW"].make(params)
    for number in range(2):
        data.give_gradients(params, number)
        assert params[0].grad is not None and params[0].grad.any(1).nonzero().flatten().tolist() == [0, 20, 40]
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_sq"].any(1).sum() == 3
    assert CASES["embedding-95"].live == 20 and CASES["gpt2-xl"].live == 1


def test_gradients_created_anew_are_at_other_addresses() -> None:
    data = Data(TINY, torch.float32, torch.device("cpu"), 2)
    params = data.parameters()
    seen = []
    for step in range(3):
        data.renew_gradients(params, step)
        seen.append([p.grad for p in params])
    addresses = [{g.data_ptr() for g in gradients} for gradients in seen]
    assert not addresses[0] & addresses[1] and len({id(g) for gradients in seen for g in gradients}) == 9
    data.give_gradients(params, 0)
    kept = [p.grad for p in params]
    data.give_gradients(params, 2)
    assert all(p.grad is g for p, g in zip(params, kept, strict=True))

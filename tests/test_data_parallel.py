"""DistributedDataParallel: two processes have the same bits, those of one process that forms the same means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import FULL, Case, assert_same_bits
from ranks import run
from stacks import batch, make_model, two_groups
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD, STEPS, ROWS = 2, 5, 8
#: For which nothing has to be compiled.
BUILT_IN = [case for case in FULL if not case.own]


class Product(nn.Module):
    """Its gradients are the rows' mean, whatever its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 33))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight).mean()


def rows_of(step: int, exact: bool) -> Tensor:
    """Small integers, whose sums are exact in any order, or numbers whose sums round."""
    generator = torch.Generator().manual_seed(step)
    if exact:
        return torch.randint(-64, 64, (ROWS, 33), generator=generator).float()
    return torch.randn(ROWS, 33, generator=generator)


def part(x: Tensor, rank: int) -> Tensor:
    return x.chunk(WORLD)[rank]


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step, ROWS)
        nn.functional.mse_loss(model(part(x, rank)), part(y, rank)).backward()
        optimizer.step()


def train_product(model: nn.Module, case: Case, rows: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    optimizer = case.make(model.parameters())
    gradients = []
    for x in rows:
        optimizer.zero_grad()
        model(x).backward()
        gradients.append(next(model.parameters()).grad.clone())
        optimizer.step()
    return optimizer, gradients


def work() -> dict:
    """What each of the processes does: trains with every optimizer, and tells what came of it."""
    rank = dist.get_rank()
    results = {}
    for case in FULL:
        for views in (False, True):  # True makes every gradient a piece of a bucket, aligned to nothing
            model = make_model(seed=rank)  # rank 0's parameters are sent to all
            ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
            optimizer = case.make(two_groups(model, case))
            train_model(ddp, optimizer, rank)
            results[case.name, views] = model.state_dict(), optimizer.state_dict()
        for exact in (False, True):
            product = Product()
            ddp = DistributedDataParallel(product)
            rows = [part(rows_of(step, exact), rank) for step in range(STEPS)]
            optimizer, gradients = train_product(ddp, case, rows)
            results[case.name, "exact" if exact else "rounded"] = (
                product.state_dict(),
                optimizer.state_dict(),
                gradients,
            )
    return results


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run(WORLD, work)


def assert_same(left: object, right: object, what: str) -> None:
    """Nested containers, bit for bit."""
    assert type(left) is type(right), what
    if isinstance(left, Tensor):
        assert_same_bits(left, right, what)
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), what
        for key in left:
            assert_same(left[key], right[key], f"{what}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), what
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{what}.{i}")
    else:
        assert left == right, what


@pytest.mark.parametrize("case", FULL, ids=str)
def test_replicas_have_the_same_bits(case: Case, results: list[dict]) -> None:
    for key in (False, True, "exact", "rounded"):
        assert_same(results[0][case.name, key], results[1][case.name, key], f"{case} {key}")


@pytest.mark.parametrize("views", [False, True], ids=["gradients apart", "gradients in buckets"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_one_process_that_forms_the_same_means_has_the_same_bits(case: Case, views: bool, results: list[dict]) -> None:
    """The mean of two gradients is half of one and half of the other, added: one rounding, in either order."""
    torch.set_num_threads(1)
    model = make_model()
    optimizer = case.make(two_groups(model, case))
    for step in range(STEPS):
        x, y = batch(step, ROWS)
        gradients = []
        for rank in range(WORLD):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(part(x, rank)), part(y, rank)).backward()
            gradients.append([p.grad for p in model.parameters()])
        for p, one, two in zip(model.parameters(), *gradients, strict=True):
            p.grad = one / WORLD + two / WORLD
        optimizer.step()
    weights, states = results[0][case.name, views]
    assert_same(model.state_dict(), weights, str(case))
    assert_same(optimizer.state_dict()["state"], states["state"], str(case))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_where_no_sum_rounds_the_whole_batch_gives_the_same_bits(case: Case, results: list[dict]) -> None:
    model = Product()
    optimizer, _ = train_product(model, case, [rows_of(step, exact=True) for step in range(STEPS)])
    weights, states, _ = results[0][case.name, "exact"]
    assert_same(model.state_dict(), weights, str(case))
    assert_same(optimizer.state_dict()["state"], states["state"], str(case))


def test_otherwise_the_whole_batchs_gradients_differ_by_the_rounding_of_a_sum(results: list[dict]) -> None:
    """A sum of n terms in any order is off by at most (n - 1) half units in the last place of the sum of their
    magnitudes; both are. Dividing by a power of two is exact."""
    for step, theirs in enumerate(results[0][FULL[0].name, "rounded"][2]):
        rows = rows_of(step, exact=False)
        model = Product()
        model(rows).backward()
        bound = 2 * (ROWS - 1) * 2.0**-24 / (1 - ROWS * 2.0**-24) * rows.double().abs().sum(0) / ROWS
        difference = (model.weight.grad.double() - theirs.double()).abs()
        assert (difference <= bound).all()
        assert (theirs.double() - rows.double().mean(0)).abs().max() < 1e-6  # a mean it is


def train_by_hand(case: Case, parts: list[int], averages: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """With the mean loss of each part of a batch, in fp64."""
    model = make_model().double()
    optimizer = case.make(two_groups(model, case))
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (t.double() for t in batch(step, ROWS))
        for rank in parts:
            (nn.functional.mse_loss(model(part(x, rank)), part(y, rank)) / WORLD).backward()
        for p in model.parameters():
            p.grad = averages(p.grad)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def all_reduced(gradient: Tensor) -> Tensor:
    dist.all_reduce(gradient)
    return gradient


def work_by_hand() -> dict[str, list[Tensor]]:
    return {case.name: train_by_hand(case, [dist.get_rank()], all_reduced) for case in BUILT_IN}


def test_gradients_averaged_by_hand_are_those_of_one_process() -> None:
    """Each halves its loss and all_reduce() adds. Where one process adds the same two halves, the bits are the same."""
    torch.set_num_threads(1)
    for of_rank in run(WORLD, work_by_hand):
        for case in BUILT_IN:
            assert_same(of_rank[case.name], train_by_hand(case, [0, 1], lambda gradient: gradient), str(case))


TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4", "--eval-every", "5"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_that_the_processes_cannot_share_is_refused(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all, and said by the first."""
    from benchmarks.train.__main__ import main

    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([*TINY, "--batch", "3", "--out", str(tmp_path)]) == 2
    error = "error: a batch of 3 must be a multiple of the number of processes, 2\n"
    assert capsys.readouterr().err == (error if rank == 0 else "")

"""The benchmarks of sharded parameters: host time, what a norm sends, what a large world costs a rank."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist

from benchmarks import large_worlds, norm_traffic, report, sharded_host
from benchmarks.common.arguments import UsageError
from benchmarks.norm_traffic import Cost, cost
from benchmarks.sharded.collectives import GATHER, REDUCE, SCATTER, Collective, collectives
from benchmarks.sharded.simulated import LAYOUTS, parameters, simulated
from benchmarks.sharded_host import CLIPPED, FUSED, OURS, STEP, Row

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
COMMANDS = {
    "sharded_host": ["--seconds", "0"],
    "norm_traffic": ["--world", "16", "--tensors", "3", "--latency", "10", "--bandwidth", "1"],
    "large_worlds": ["--tensors", "3", "--seconds", "0.01"],
}


def work(out: str) -> dict[str, object]:
    """What the commands print, and collectives, in a process of its own: the default process group is global."""
    dist.destroy_process_group()
    found: dict[str, object] = {}
    with mock.patch.object(sharded_host, "COUNT", 3), mock.patch.object(large_worlds, "WORLDS", (16, 32)):
        for module, options in (
            (sharded_host, [*COMMANDS["sharded_host"], "--out", out]),
            (norm_traffic, COMMANDS["norm_traffic"]),
            (large_worlds, COMMANDS["large_worlds"]),
        ):
            with redirect_stdout(io.StringIO()) as text:
                code = module.main(options)
            found[module.__name__.rpartition(".")[2]] = code, text.getvalue()
    method = dist.ProcessGroup.allreduce
    with simulated(8):
        mesh = LAYOUTS["hsdp"].mesh(8)
        params = parameters(mesh, LAYOUTS["hsdp"], 2, (4, 4))
        x, group = torch.ones(6), mesh.get_group("shard")
        with collectives(of_dtensors=True) as asked:
            dist.all_reduce(x)
            dist.all_gather_into_tensor(torch.empty(48), x, group=group)
            dist.reduce_scatter_tensor(torch.empty(3), torch.ones(24), group=group)
            params[0].full_tensor()
        dist.all_reduce(x)
        found["asked"] = asked
    found["left as it was"] = dist.ProcessGroup.allreduce is method and not dist.is_initialized()
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded") / "sharded.json"


@pytest.fixture(scope="module")
def found(out: Path) -> dict:
    [outcome] = ranks.run_apart(1, work, str(out))
    assert not outcome.bad, outcome.trace
    return outcome.result


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def test_collectives_are_noted(found: dict) -> None:
    expected = [(REDUCE, 8, 24), (GATHER, 8, 24), (SCATTER, 8, 96), (GATHER, 8, 64)]
    assert found["asked"] == [Collective(*of) for of in expected]
    assert found["left as it was"]


def test_host_time_over_shards(found: dict, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = found["sharded_host"]
    table = rows(text)
    assert code == 0 and [(r[0], r[1]) for r in table] == list(sharded_host.CONTENDERS)
    for row in table:
        assert all(float(cell) > 0 for cell in row[2:7])
    assert [r[7].startswith(("<= 1.3", ">= 40")) for r in table] == [True, True] + [False] * 7
    assert report.main([str(out)]) == 0
    assert rows(capsys.readouterr().out) == table


def test_goals_of_host_time() -> None:
    us = {(STEP, OURS): (10.0, 12.0), (STEP, FUSED): (100.0, 500.0), (CLIPPED, OURS): (20.0, 40.0)}
    made = [Row(*key, {"plain": [plain, 99.0], "sharded": [999.0, sharded]}) for key, (plain, sharded) in us.items()]
    one, two, three = sharded_host.results_of(made)
    assert (one["sharded / plain"], one["goal"], one["sharded, us"], one["steps"]) == (1.2, "<= 1.3", 12.0, 2)
    assert two["sharded / fusedoptim's"] == 500 / 12 and two["goal"] == ">= 40"
    assert three["sharded / fusedoptim's"] == 1.0 and three["goal"] == ""
    made[0].us["sharded"] = [14.0]
    assert [r["goal"] for r in sharded_host.results_of(made)] == ["<= 1.3 (missed)", ">= 40 (missed)", ""]


def test_what_a_norm_sends(found: dict) -> None:
    """The first layout's sum of three numbers over 16 ranks: up and down a tree of 4, or twice round a ring."""
    code, text = found["norm_traffic"]
    table = rows(text)
    assert code == 0 and [r[0] for r in table[::2]] == ["FSDP2 over 16", "HSDP 2 x 8", "TP 8 x FSDP2 2"]
    assert table[0][2] == "all-gather of 32 B over 16" and table[0][4:] == ["4", "40.5 us", "15", "150 us"]
    assert table[1][2] == "all-reduce of 12 B over 16" and table[1][4:] == ["8", "80 us", "30", "300 us"]
    assert "3 tensors; times are estimates for 10 us per message and 1 GB/s per rank" in text


def test_costs_of_collectives() -> None:
    assert cost(Collective(GATHER, 1024, 100)) == Cost(doubling=10, ring=1023, bytes=102_300)
    assert cost(Collective(GATHER, 5, 100)) == Cost(doubling=3, ring=4, bytes=400)
    assert cost(Collective(REDUCE, 8, 100)) == Cost(doubling=6, ring=14, bytes=175)
    assert Cost(3, 4, 400).seconds(3, 1e-6, 1e9) == pytest.approx(3.4e-6)
    with pytest.raises(UsageError, match="no estimate for a collective of the kind broadcast"):
        cost(Collective("broadcast", 2, 1))
    for options in (["--world", "12"], ["--tensors", "0"], ["--bandwidth", "0"]):
        with pytest.raises(UsageError):
            norm_traffic.main(options)


def test_what_a_world_costs_a_rank(found: dict) -> None:
    code, text = found["large_worlds"]
    table = rows(text)
    assert code == 0 and len(table) == 12
    assert table[0][:2] == ["FSDP2 over 16", "step"] and table[1][0] == "FSDP2 over 32"
    assert table[0][2:6] == table[1][2:6] and table[0][5] == "none"
    assert table[2][5] == "all-gather of 32 B over 16" and table[3][5] == "all-gather of 32 B over 32"
    for row in table:
        assert all(float(cell.replace(",", "")) > 0 for cell in (*row[2:5], row[6]))

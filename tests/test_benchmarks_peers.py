"""Who takes part in a row: what fits the memory, what a peer lacks, and what it did not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import ARGUMENTS, TINY, Options, _quick_collections, _small, add_peer, measured, row_of, torch_adamw  # noqa: F401

from benchmarks.measure import contest, limits, rows
from benchmarks.measure.cases import Case
from benchmarks.measure.data import Data
from benchmarks.measure.devices import Cpu
from benchmarks.measure.optimizers import DTYPES, SETTINGS, Work
from benchmarks.measure.peers import PEERS, Peer
from benchmarks.measure.results import OURS


def test_peers_are_dealt_to_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1_000_000
    row = row_of(Case("one", ((n,),)))
    peers = [Peer(name, torch_adamw, {}, temporary=t) for name, t in (("a", 0), ("b", 0), ("hungry", 100), ("c", 0))]
    resident, gradients = 12 * n, 4 * n

    def free(share_for_peers: float) -> None:
        fixed = resident + gradients + limits.memory(Cpu(), row.work)
        total = (fixed + share_for_peers * resident) / rows.MEMORY_SHARE
        monkeypatch.setattr(Cpu, "memory_free", lambda self: int(total) + 1)

    free(3.5)
    batches, too_large = rows._batches(row, Cpu(), peers)
    assert [[p.name for p in b] for b in batches] == [["a", "b", "c"]] and too_large == ["hungry"]
    free(2.5)
    batches, _ = rows._batches(row, Cpu(), peers)
    assert [[p.name for p in b] for b in batches] == [["a", "b"], ["c"]]
    free(1.0)
    batches, _ = rows._batches(row, Cpu(), peers)
    assert [[p.name for p in b] for b in batches] == [["a"], ["b"], ["c"]]
    free(-0.1)
    with pytest.raises(rows.NoRoom, match=r"needs \S+ GiB of memory; \S+ GiB are free"):
        rows._batches(row, Cpu(), peers)
    # a second set of gradients takes up more
    free(0.0)
    with pytest.raises(rows.NoRoom):
        rows._batches(row_of(row.case, "recreated"), Cpu(), peers)


def test_a_case_that_does_not_fit_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, measured: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Cpu, "memory_free", lambda self: 1 << 30)
    code, content = measured("--case", "llama3-8b", "--case", "tiny", *ARGUMENTS[2:], "--peer", "none")
    large, tiny = content["rows"]
    assert code == 0 and large["case"] == "llama3-8b" and "contenders" not in large
    assert large["skipped"].startswith("needs 119.7 GiB of memory; 0.8 GiB are free"), large["skipped"]
    assert "ms" in tiny["contenders"][OURS]
    assert "not measured: needs 119.7 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["device", "host"])
def test_running_out_of_memory_skips_the_case(
    monkeypatch: pytest.MonkeyPatch, measured: Options, error: BaseException
) -> None:
    original = Data.parameters

    def parameters(self: Data) -> Any:
        if len(self.case.shapes) == 300:
            raise error
        return original(self)

    monkeypatch.setattr(Data, "parameters", parameters)
    code, content = measured("--case", "300x1024", "--case", "tiny", *ARGUMENTS[2:], "--peer", "none")
    assert code == 0 and content["finished"] is True
    assert content["rows"][0]["skipped"].startswith(type(error).__name__)
    assert "ms" in content["rows"][1]["contenders"][OURS]


def test_a_case_too_large_for_the_caches_has_no_warm_row(measured: Options) -> None:
    _, content = measured(
        "--case", "300x1024", *ARGUMENTS, "--condition", "warm", "--condition", "recreated", "--peer", "none"
    )
    found = {(r["case"], r["condition"]): r for r in content["rows"]}
    assert found["300x1024", "warm"]["skipped"] == "does not fit half the caches of 1 MiB"
    assert "ms" in found["tiny", "warm"]["contenders"][OURS]
    assert "ms" in found["tiny", "recreated"]["contenders"][OURS]


class Broken(torch.optim.AdamW):
    """Fails from a certain step on."""

    after = 0
    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps > self.after:
            raise RuntimeError("this peer is broken\nsecond line")
        super().step()


class Idle(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        pass


class Lazy(torch.optim.AdamW):
    """Forgets the last tensor."""

    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["params"][-1].grad = None
        super().step()


class Wrong(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.data.add_(1e-4)


class Diverging(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        super().step()
        self.param_groups[0]["params"][0].data[0] = float("nan")


class Narrow(torch.optim.AdamW):
    """Keeps 16-bit states, and so moves less than it is given credit for."""

    def step(self, closure: Any = None) -> None:
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].float()
        super().step()
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()


@pytest.mark.parametrize(
    "cls,says",
    [
        (Broken, "RuntimeError: this peer is broken"),
        (Idle, "3 of 3 tensors did not move in the warm-up"),
        (Lazy, "1 of 3 tensors did not move in the warm-up"),
        (Wrong, "differs from fusedoptim by "),
        (Diverging, "parameters are not finite after the warm-up"),
        (Narrow, "keeps states in bfloat16 instead of float32"),
    ],
)
def test_a_peer_that_does_not_do_the_work_is_reported_in_its_row(
    monkeypatch: pytest.MonkeyPatch, measured: Options, capsys: pytest.CaptureFixture[str], cls: type, says: str
) -> None:
    add_peer(monkeypatch, "fake", lambda work, groups: cls(groups, **work.setting.options))
    code, content = measured(*ARGUMENTS, "--peer", "fake", "--peer", "torch foreach")
    [row] = content["rows"]
    assert row["contenders"]["fake"].keys() == {"failed"} and row["contenders"]["fake"]["failed"].startswith(says)
    assert "\n" not in row["contenders"]["fake"]["failed"]
    assert row["contenders"]["torch foreach"]["ratio"]["n"] >= 5 and "ms" in row["contenders"][OURS]
    assert code == 0 and content["finished"] is True
    assert f"- fake FAILED: {says}" in capsys.readouterr().out


def test_a_peer_that_fails_in_the_middle_is_reported(monkeypatch: pytest.MonkeyPatch, measured: Options) -> None:
    monkeypatch.setattr(Broken, "after", contest.WARM_UP + 2)
    add_peer(monkeypatch, "fake", lambda work, groups: Broken(groups, **work.setting.options))
    _, content = measured(*ARGUMENTS, "--peer", "fake")
    contenders = content["rows"][0]["contenders"]
    assert contenders["fake"]["failed"] == "RuntimeError: this peer is broken" and "ms" not in contenders["fake"]
    assert contenders[OURS]["ms"]["n"] >= 5


def test_peers_that_are_missing_or_lack_something_say_so(monkeypatch: pytest.MonkeyPatch, measured: Options) -> None:
    add_peer(monkeypatch, "not there", torch_adamw, module="no_such_module_anywhere", package="the-package")
    add_peer(monkeypatch, "for a GPU", torch_adamw, devices=("cuda",))
    add_peer(monkeypatch, "for few", torch_adamw, most_tensors=2)
    add_peer(monkeypatch, "for one shape", torch_adamw, most_shapes=2)
    monkeypatch.setitem(PEERS, "for SGD", Peer("for SGD", torch_adamw, {"SGD": ("fp32",)}))
    monkeypatch.setitem(PEERS, "for bf16", Peer("for bf16", torch_adamw, {"AdamW": ("bf16",)}))
    says = {
        "not there": "the-package is not installed",
        "for a GPU": "is not for cpu",
        "for few": "compiles for minutes beyond 2 tensors",
        "for one shape": "compiles for minutes beyond 2 different shapes",
        "for SGD": "has no AdamW",
        "for bf16": "has no AdamW in fp32",
    }
    _, content = measured(*ARGUMENTS, *(word for name in says for word in ("--peer", name)))
    found = {n: c["skipped"] for n, c in content["rows"][0]["contenders"].items() if "skipped" in c}
    assert found == says


def test_a_broken_installation_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcuda.so.1: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    peer = Peer("broken", torch_adamw, {"AdamW": ("fp32",)}, module="broken_peer", package="broken")
    says = peer.problem(Work(SETTINGS["AdamW"], DTYPES["fp32"]), TINY, "cpu")
    assert says == "broken cannot be imported: OSError: libcuda.so.1: no such file"


def test_torchs_fused_adagrad_is_for_the_cpu() -> None:
    work = Work(SETTINGS["Adagrad"], DTYPES["fp32"])
    assert PEERS["torch fused"].problem(work, TINY, "cpu") is None
    assert PEERS["torch fused"].problem(work, TINY, "cuda") == "has no Adagrad for cuda"


def test_a_wrong_fusedoptim_is_a_failure(monkeypatch: pytest.MonkeyPatch, measured: Options) -> None:
    monkeypatch.setattr(contest, "ours", lambda work, groups: Idle(groups, **work.setting.options))
    code, content = measured(*ARGUMENTS, "--peer", "none")
    assert code == 1
    assert content["rows"][0]["failed"] == "RuntimeError: fusedoptim: 3 of 3 tensors did not move in the warm-up"

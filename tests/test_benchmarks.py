"""The benchmarks' measurements: cases, method, what a row says when something goes wrong, the command line."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import signal
import statistics
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import fusedoptim
from benchmarks import compiled, run, tables
from benchmarks.common import arguments
from benchmarks.common.arguments import UsageError
from benchmarks.measure import devices, limits, rough, rows, scaling
from benchmarks.measure.cases import CASES, Case, evenly, shard
from benchmarks.measure.data import Data
from benchmarks.measure.devices import Cpu, Cuda, Sample, device_events
from benchmarks.measure.optimizers import DTYPES, SETTINGS, Work
from benchmarks.measure.peers import PEERS, Peer
from benchmarks.measure.results import COPY, OURS, STREAM, Results
from benchmarks.measure.timing import Budget, Contender, Times, interleaved, quantiles, ratios

MIB = 1 << 20
TINY = Case("tiny", ((64,), (3, 5), (1,)))
#: All arguments of a run that takes a moment.
ARGUMENTS = ["--case", "tiny", "--optimizer", "AdamW", "--dtype", "fp32"]
Options = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Garbage is collected before every row; what torch and pytest hold need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, small caches and limits, a moment per row."""
    torch.set_num_threads(1)
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setattr(Cpu, "cache_bytes", lambda self: MIB)
    monkeypatch.setattr(devices, "openmp_runtimes", lambda: 1)  # spares the pauses that several of them need
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", MIB)
    monkeypatch.setitem(limits.STREAM_ELEMENTS, "cpu", 1 << 12)
    for module, name in ((run, "FULL"), (run, "QUICK"), (rough, "BUDGET")):
        monkeypatch.setattr(module, name, Budget(0.01, at_most=7))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def measured(tmp_path: Path) -> Options:
    """Runs the program; gives its exit code and its results file."""

    def start(*options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        code = run.main(["--device", "cpu", *options, "--out", str(out)])
        return code, json.loads(out.read_text())

    return start


def add_peer(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[..., Any], **more: Any) -> None:
    monkeypatch.setitem(PEERS, name, Peer(name, make, {"AdamW": tuple(DTYPES)}, **more))


def torch_adamw(work: Work, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **work.setting.options)


# ---- cases ----


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
        ("SGD", "fp32", 20),
        ("RMSprop", "fp32", 20),
        ("Adagrad", "fp32", 20),
        ("NormAdaptive", "fp32", 12),
    ],
)
def test_bytes_by_definition(optimizer: str, dtype: str, moved: int) -> None:
    assert Work(SETTINGS[optimizer], DTYPES[dtype]).bytes_per_element == moved


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


def test_variants_take_turns_and_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from benchmarks import ab

    tunables = {"window": 1}

    def tune(name: str, value: int) -> int:
        before, tunables[name] = tunables[name], value
        return before

    class Clock(Cpu):
        def timed(self, call: Callable[[], object]) -> Sample:
            call()
            return Sample(1.5 if tunables["window"] == 8 else 1.0, 0.0)

    key = ("AdamW", "fp32", "tiny", "kept")
    switches = (ab.Switch("typo", (key,), {"widnow": 8}), ab.Switch("window", (key,), {"window": 8}))
    monkeypatch.setattr(ab, "SWITCHES", switches)
    monkeypatch.setattr(ab, "BUDGET", Budget(0.01, at_least=6, at_most=6))
    monkeypatch.setattr(ab._native, "tune", tune)
    monkeypatch.setitem(devices.DEVICES, "cpu", Clock)
    out = tmp_path / "ab.json"
    assert ab.main(["--device", "cpu", "--switch", "window", "--out", str(out)]) == 0 and tunables == {"window": 1}
    [found] = json.loads(out.read_text())
    assert found["ratio"]["median"] == 1.5 and found["ratio"]["n"] == 6 and found["same_bits"]

    def differs(work: Work, groups: list[dict[str, Any]]) -> Any:
        return torch_adamw(work, [{**g, "lr": g["lr"] * tunables["window"]} for g in groups])

    monkeypatch.setattr(ab, "ours", differs)
    capsys.readouterr()
    assert ab.main(["--device", "cpu"]) == 1
    typo, window = capsys.readouterr().out.splitlines()
    assert "FAILED: KeyError" in typo and "1.500 (1.500 to 1.500, 6 rounds), OTHER BITS" in window


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


# ---- method ----


class Clock:
    """A device whose calls take the seconds that they return."""

    name = "cpu"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def evict(self) -> None:
        self.calls.append("evict")

    def timed(self, call: Callable[[], Any]) -> Sample:
        name, seconds = call()
        self.calls.append(name)
        return Sample(seconds, seconds / 2)


def test_calls_are_interleaved_with_an_eviction_before_each() -> None:
    clock, prepared = Clock(), []
    contenders = {
        name: Contender(lambda n=name: (n, 1.0), lambda number, n=name: prepared.append((n, number)), throughout=True)
        for name in "abc"
    }
    times = interleaved(contenders, clock, Budget(60.0, at_most=40), first_number=3)
    assert clock.calls[::2] == ["evict"] * 120
    rounds = [tuple(clock.calls[i + 1 : i + 6 : 2]) for i in range(0, 240, 6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3, "the order never changes"
    assert {n for _, n in prepared} == set(range(3, 43))
    assert all(len(t.seconds) == 40 for t in times.values())
    clock.calls.clear()
    interleaved(contenders, clock, Budget(60.0, at_most=5), evict=False)
    assert "evict" not in clock.calls


def test_at_least_five_rounds_and_no_more_than_the_budget() -> None:
    contenders = {"a": Contender(lambda: ("a", 1.0), throughout=True)}
    assert len(interleaved(contenders, Clock(), Budget(0.0))["a"].seconds) == 5
    assert len(interleaved(contenders, Clock(), Budget(60.0, at_most=9))["a"].seconds) == 9


def test_one_that_raises_leaves_and_the_others_go_on() -> None:
    raised = []

    def bad() -> tuple[str, float]:
        if len(clock.calls) > 6:
            raised.append(1)
            raise ValueError("enough\nof this")
        return "bad", 1.0

    clock = Clock()
    contenders = {"good": Contender(lambda: ("good", 1.0), throughout=True), "bad": Contender(bad, throughout=True)}
    times = interleaved(contenders, clock, Budget(60.0, at_most=20))
    assert times["bad"].error == "ValueError: enough" and len(times["bad"].seconds) < 5
    assert times["good"].error is None and len(times["good"].seconds) == 20 and len(raised) == 1
    assert gc.isenabled()


def test_quantiles_and_ratios() -> None:
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q20": 2.0, "q80": 5.0, "n": 5}
    assert quantiles([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0, "n": 1}
    a, b = Times(), Times()
    for number, (x, y) in enumerate([(2.0, 1.0), (30.0, 10.0), (8.0, 2.0)]):
        a.rounds[number], b.rounds[number] = Sample(x, x), Sample(y, y)
    b.rounds[3] = Sample(9.0, 9.0)  # the other one was not there
    assert sorted(ratios(a, b)) == [2.0, 3.0, 4.0]
    # of medians it would be 4
    assert statistics.median(ratios(a, b)) == 3.0 != quantiles(a.seconds)["median"] / 2.0


def test_slope_of_a_curve() -> None:
    assert scaling.slope([(1, 2.0), (2, 2.5), (4, 3.5)]) == pytest.approx(0.5)
    assert scaling.slope([(1, 2.0), (2, 2.5)]) is None
    rows_ = [
        {
            "curve": "tensors",
            "over": "tensors",
            "tensors": n,
            "contenders": {OURS: {"ms": {"median": 1 + 3e-6 * n}}, COPY: {"ms": {"median": 1.0}}},
        }
        for n in (1, 100, 10_000)
    ]
    [(curve, name, what, seconds)] = scaling.slopes(rows_)
    assert (curve, name, what) == ("tensors", OURS, "tensor") and seconds == pytest.approx(3e-9)


def test_curves_vary_one_thing() -> None:
    tensors, elements = scaling.curves("cpu")
    assert len({c.elements for c in tensors.cases}) == 1 and len({len(c.shapes) for c in tensors.cases}) > 4
    assert len({len(c.shapes) for c in elements.cases}) == 1 and len({c.elements for c in elements.cases}) > 4


def test_a_profilers_events_are_counted() -> None:
    cuda, cpu = torch._C._autograd.DeviceType.CUDA, torch._C._autograd.DeviceType.CPU

    def event(name: str, where: object = cuda, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=where, is_user_annotation=note)

    events = [
        event("step_kernel"),
        event("step_kernel"),
        event("norm_step_kernel"),
        event("Memcpy HtoD (Pinned -> Device)"),
        event("Memset (Device)"),
        event("cudaLaunchKernel", cpu),
        event("Optimizer.step#AdamW.step", note=True),
    ]
    assert device_events(events) == {"launches": 3, "copies": 2}


def test_memory_of_cycles_is_given_back_between_rows() -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    gone = weakref.ref(node)
    gc.disable()
    try:
        del node
        Cpu().release()
        assert gone() is None
    finally:
        gc.enable()


# ---- memory ----


def _row(case: Case, condition: str = "kept") -> rows.Row:
    return rows.Row(Work(SETTINGS["AdamW"], DTYPES["fp32"]), case, rows.CONDITIONS[condition])


def test_peers_are_dealt_to_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1_000_000
    row = _row(Case("one", ((n,),)))
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
        rows._batches(_row(row.case, "recreated"), Cpu(), peers)


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


# ---- peers ----


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
    monkeypatch.setattr(Broken, "after", rows.WARM_UP + 2)
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
    monkeypatch.setattr(rows, "ours", lambda work, groups: Idle(groups, **work.setting.options))
    code, content = measured(*ARGUMENTS, "--peer", "none")
    assert code == 1
    assert content["rows"][0]["failed"] == "RuntimeError: fusedoptim: 3 of 3 tensors did not move in the warm-up"


# ---- what a row says ----


def test_a_row_and_its_environment(measured: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/run.py", "--peer", "torch fused"])
    runtimes = itertools.count(1)
    monkeypatch.setattr(devices, "openmp_runtimes", lambda: next(runtimes))
    code, content = measured(*ARGUMENTS, "--peer", "torch fused")
    assert code == 0 and content["finished"] is True and content["planned"] == 1
    [row] = content["rows"]
    assert (row["optimizer"], row["dtype"], row["case"], row["condition"]) == ("AdamW", "fp32", "tiny", "kept")
    assert (row["tensors"], row["groups"], row["elements"], row["bytes"]) == (3, 1, 80, 80 * 28)
    contenders = row["contenders"]
    assert list(contenders) == [OURS, "torch fused", COPY, STREAM]
    mine, theirs = contenders[OURS], contenders["torch fused"]
    for c in contenders.values():
        assert c["ms"]["n"] >= 5 and c["ms"]["q20"] <= c["ms"]["median"] <= c["ms"]["q80"]
    assert mine["gb_s"] == pytest.approx(80 * 28 / mine["ms"]["median"] * 1e-6, rel=1e-3)
    assert 0 < mine["share_of_copy"] and 0 < mine["share_of_stream"] and 0 < mine["first_step_s"]
    assert "ratio" not in mine and 0 < theirs["ratio"]["median"] and 0 <= theirs["difference"] < 0.01
    environment = content["environment"]
    assert environment.keys() >= {
        *("device", "fusedoptim", "commit", "date", "command", "python", "torch", "cpu", "cores", "threads"),
        *("capability", "system", "cache_bytes", "load", "packages", "backend", "openmp_runtimes"),
    }
    assert environment["command"] == "python -m benchmarks.run --peer 'torch fused'"
    assert environment["openmp_runtimes"] > 1, "before the limits had loaded theirs"
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1
    assert environment["backend"] == ("cpu" if fusedoptim._native._C else "reference")


class FakeGpu(Cpu):
    """Takes the ways through the program that a GPU does, with the CPU's tensors."""

    name = "cuda"

    def timed(self, call: Callable[[], object]) -> Sample:
        return dataclasses.replace(super().timed(call), host=2e-5)

    def details(self, call: Callable[[], object]) -> dict[str, int | str]:
        call()
        return {"launches": 1, "copies": 0, "peak_extra_bytes": 3 * MIB}

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        if len(FakeGpu.captured) == 1:
            FakeGpu.captured.append(call)
            raise RuntimeError("operation not permitted when stream is capturing")
        FakeGpu.captured.append(call)
        return call

    captured: ClassVar[list[object]] = []


def test_what_only_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "captured", [])
    monkeypatch.setitem(limits.COPY_BYTES, "cuda", MIB)
    monkeypatch.setitem(limits.STREAM_ELEMENTS, "cuda", 1 << 12)
    monkeypatch.setitem(limits._PASSES, "cuda", limits._in_c)
    peers = [PEERS[name] for name in ("torch foreach", "torch fused")]
    result = rows.measure(_row(TINY), FakeGpu(), peers, Budget(0.01, at_most=5))
    contenders = result["contenders"]
    for name in (OURS, "torch foreach", "torch fused"):
        assert contenders[name]["host_ms"] == pytest.approx(0.02)
        assert contenders[name]["launches"] == 1 and contenders[name]["peak_extra_bytes"] == 3 * MIB
    assert 0 < contenders[OURS]["graph_ms"]
    assert contenders["torch fused"]["graph_problem"].startswith("RuntimeError: operation not permitted")
    assert not {"graph_ms", "graph_problem"} & contenders["torch foreach"].keys(), "its capture might leave one behind"
    assert len(FakeGpu.captured) == 2
    results = Results({"device": "cuda"}, 1)
    results.rows.append(result)
    table = tables.device_details(results.rows)
    assert table.count("\n") == 4 and "| AdamW fp32 | tiny | torch foreach | 1 | 0 | 0.02 |  | 3 |" in table


def test_the_commit_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.common.commit import commit

    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("FUSEDOPTIM_COMMIT", "0123456789abcdef")
    assert commit() == "0123456789ab"
    monkeypatch.setenv("FUSEDOPTIM_COMMIT", "0123456789abcdef+changes")
    assert commit() == "0123456789ab+changes"
    monkeypatch.delenv("FUSEDOPTIM_COMMIT")
    assert commit() == "unknown"


# ---- interrupts and bad input ----


@pytest.mark.parametrize("how", ["keyboard", "terminated"])
def test_an_interrupted_run_keeps_its_finished_rows(
    monkeypatch: pytest.MonkeyPatch, measured: Options, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    made = []

    def interrupt(work: Work, groups: Any) -> Any:
        made.append(work)
        if len(made) == 2:
            if how == "keyboard":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return torch_adamw(work, groups)

    add_peer(monkeypatch, "fake", interrupt)
    code, content = measured(
        "--case", "tiny", "--optimizer", "AdamW", "--dtype", "fp32", "--dtype", "bf16+fp32", "--peer", "fake"
    )
    assert code == 130 and content["finished"] is False and content["planned"] == 2
    assert [r["dtype"] for r in content["rows"]] == ["fp32"] and "ms" in content["rows"][0]["contenders"][OURS]
    shown = capsys.readouterr()
    assert "interrupted: 1 of 2 rows are finished" in shown.out and "the finished rows are in" in shown.err


@pytest.mark.parametrize(
    "option,name,known",
    [
        ("--device", "tpu", "'cpu', 'cuda'"),
        ("--optimizer", "Adamw2", "'AdamW', 'Adam', 'SGD', 'RMSprop', 'Adagrad', 'NormAdaptive'"),
        ("--case", "gpt5", "'64M', '1G', 'gpt2-small'"),
        ("--dtype", "fp8", "'fp32', 'bf16', 'bf16+fp32'"),
        ("--peer", "torch", "'torch for-loop', 'torch foreach', 'torch fused'"),
        ("--condition", "cold", "'kept', 'recreated', 'warm'"),
    ],
)
def test_unknown_names_list_the_known_ones(
    option: str, name: str, known: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", option, name])
    with pytest.raises(SystemExit) as status:
        arguments.run(run.main)
    shown = capsys.readouterr()
    assert status.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"{option} '{name}' is unknown: choose from ") and known in shown.err


def test_names_in_any_case() -> None:
    assert arguments.known("--optimizer", ["adamw", "SGD"], SETTINGS) == ["AdamW", "SGD"]
    assert arguments.known("--optimizer", None, SETTINGS) == list(SETTINGS)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda cannot be measured: torch finds no CUDA device"):
        run.main(["--device", "cuda", "--case", "2000x64"])
    assert Cuda().problem() is not None


@pytest.mark.parametrize(
    "options,says",
    [
        (["--quik"], "unrecognized arguments: --quik; --help lists the options"),
        (["--goals", "--condition", "warm"], "--goals are for gradients that are kept"),
    ],
)
def test_options_that_make_no_sense(options: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run.main(options)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.json"
    precious.write_text('{"chapters": 7}')
    with pytest.raises(UsageError, match="is not a results file"):
        run.main([*ARGUMENTS, "--peer", "none", "--out", str(precious)])
    assert precious.read_text() == '{"chapters": 7}'
    with pytest.raises(UsageError, match="cannot be written"):
        run.main([*ARGUMENTS, "--peer", "none", "--out", str(tmp_path / "no" / "folder.json")])


def test_rows_of_goals_and_selections() -> None:
    from benchmarks.measure.goals import GOALS

    for device in GOALS:
        chosen = run.selected_rows(run.parse(["--device", device, "--goals"]))
        assert [r.key[:3] for r in chosen] == list(GOALS[device])
        assert not run.selected_curves(run.parse(["--device", device, "--goals"]))
        backwards = run.selected_rows(run.parse(["--device", device, "--goals", "--reverse"]))
        assert [r.key for r in backwards] == [r.key for r in reversed(chosen)]
    some = run.parse(
        ["--device", "cuda", "--goals", "--case", "gpt2-xl", "--optimizer", "SGD", "--optimizer", "RMSprop"]
    )
    sgd, rmsprop = run.selected_rows(some)
    assert [r.work.setting.name for r in (sgd, rmsprop)] == ["SGD", "RMSprop"]
    both = [PEERS["torch fused"], PEERS["torch foreach"]]
    assert run.beside(sgd, both, some) == both[:1] and run.beside(rmsprop, both, some) == both
    assert run.beside(sgd, both, run.parse([])) == both
    assert run.selected_curves(run.parse([])) and not run.selected_curves(run.parse(["--case", "64M"]))
    full = run.selected_rows(run.parse([]))
    assert {r.work.setting.name for r in full} == set(SETTINGS) and {r.work.dtypes.name for r in full} == set(DTYPES)
    assert {r.case.name for r in full} == set(CASES)
    # without states of a parameter's shape there is nothing for the dtypes to differ in
    assert not run.selected_rows(run.parse(["--optimizer", "NormAdaptive", "--dtype", "bf16+fp32", "--case", "64M"]))


def test_a_curve_is_measured_and_saved(monkeypatch: pytest.MonkeyPatch, measured: Options) -> None:
    sizes = {"tensors": [(1, 64), (2, 64), (4, 64)], "elements": [(2, 32), (2, 64), (2, 128)]}
    cases = {name: tuple(evenly(*size) for size in of_curve) for name, of_curve in sizes.items()}
    curves = [dataclasses.replace(c, cases=cases[c.name]) for c in scaling.curves("cpu")]
    monkeypatch.setattr(scaling, "curves", lambda device: curves)
    code, content = measured(*ARGUMENTS, "--scaling", "--peer", "torch fused")
    assert code == 0 and content["planned"] == 7 and len(content["scaling"]) == 6
    assert [r["curve"] for r in content["scaling"]] == ["tensors"] * 3 + ["elements"] * 3
    assert all("ms" in r["contenders"]["torch fused"] for r in content["scaling"])
    assert [r["elements"] for r in content["scaling"]] == [64, 64, 64, 32, 64, 128]
    found = scaling.slopes(content["scaling"])
    assert {(curve, name) for curve, name, _, _ in found} == {(c, n) for c in cases for n in (OURS, "torch fused")}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_steps_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["compiled", "--tensors", "2", "--elements", "3", "--rounds", "2"])
    assert compiled.main() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["| fusedoptim", "| fusedoptim compiled", "| torch foreach compiled"]
    assert all(float(cell.rstrip(" |")) >= 0 for row in rows for cell in row[1:])

"""The CUDA and Triton kernels on a GPU: bits, launches, graphs, streams, sizes. ``pytest -m gpu``."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    FULL,
    SHAPES,
    Case,
    assert_same_bits,
    gradient,
    parameters,
    set_gradients,
)
from test_layout import LAYOUTS

import fusedoptim
from fusedoptim import _native

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Params = list[torch.nn.Parameter]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def on_gpu(params: Params) -> Params:
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def pair(
    backend: str, case: Case, shapes: list, dtype: torch.dtype, **options: object
) -> tuple[Params, Params, object, object]:
    """The same parameters on the GPU and on the CPU, and an optimizer for each."""
    theirs = parameters(shapes, dtype)
    mine = on_gpu(theirs)
    return mine, theirs, case.make(mine, backend=backend, **options), case.make(theirs, backend="cpu", **options)


def set_both(mine: Params, theirs: Params, step: int) -> None:
    set_gradients(theirs, step)
    for p, q in zip(mine, theirs, strict=True):
        p.grad = None if q.grad is None else q.grad.cuda()


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and every state, bit for bit, wherever they are."""
    pairs = [
        (p, q)
        for left, right in zip(a.param_groups, b.param_groups, strict=True)
        for p, q in zip(left["params"], right["params"], strict=True)
    ]
    for i, (p, q) in enumerate(pairs):
        assert_same_bits(p.detach().cpu(), q.detach().cpu(), f"parameter {i}")
        assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
        for name, value in a.state.get(p, {}).items():
            assert_same_bits(value.cpu(), b.state[q][name].cpu(), f"{name} of parameter {i}")


def kernels_of(call: object) -> list[str]:
    """The names of the kernels that a call launches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]


def steady(optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_cpu_kernels_bits(backend: str, case: Case, dtype: torch.dtype) -> None:
    mine, theirs, a, b = pair(backend, case, [*SHAPES, (70_001,)], dtype)
    for step in range(50):
        if dtype != torch.float32 and step == 10:
            break
        set_both(mine, theirs, step)
        a.step()
        b.step()
        if step in (0, 1):
            assert_same(a, b)
    assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_layouts(backend: str, case: Case, dtype: torch.dtype) -> None:
    shapes = [(4, 3, 5, 6), (2, 8, 17, 9), (1, 3, 1, 700)]
    combinations = [(p, g, s) for p in LAYOUTS for g in LAYOUTS for s in shapes]
    values = [gradient(torch.empty(s), 99, i).to(dtype) for i, (_, _, s) in enumerate(combinations)]
    theirs = [torch.nn.Parameter(x.clone()) for x in values]
    mine = []
    for x, (layout, _, _) in zip(values, combinations, strict=True):
        # .cuda() keeps dense layouts only: give it memory of the same shape and strides
        view = LAYOUTS[layout](x)
        storage = torch.zeros(view.untyped_storage().nbytes() // view.element_size(), dtype=dtype, device="cuda")
        mine.append(torch.nn.Parameter(storage.as_strided(view.shape, view.stride(), view.storage_offset())))
        mine[-1].data.copy_(x)
    a, b = case.make(mine, backend=backend), case.make(theirs, backend="cpu")
    for step in range(3):
        set_gradients(theirs, step)
        for p, q, (_, layout, _) in zip(mine, theirs, combinations, strict=True):
            view = LAYOUTS[layout](q.grad)
            storage = torch.zeros(view.untyped_storage().nbytes() // view.element_size(), dtype=dtype, device="cuda")
            p.grad = storage.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(q.grad)
        a.step()
        b.step()
    assert_same(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_large_tensors(backend: str, case: Case) -> None:
    mine, theirs, a, b = pair(backend, case, [(5_000_011,), (16_385,), (1_234_567,)], torch.float32)
    for step in range(3):
        set_both(mine, theirs, step)
        a.step()
        b.step()
    assert_same(a, b)


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "rmsprop_all", "adagrad", "norm_adaptive"])
def test_one_launch(backend: str, name: str) -> None:
    case = BY_NAME[name]
    for shapes, groups, dtypes in (
        ([(300,)] * 300, 1, DTYPES[:1]),
        ([(300,)] * 300, 1, [torch.float32, torch.bfloat16, torch.float16]),
        ([(64,)] * 465, 465, DTYPES[:1]),
        ([(1 + i % 50,) for i in range(5000)], 1, DTYPES[:1]),
        ([(1 + i % 50,) for i in range(10_000)], 3, DTYPES[:1]),
    ):
        params = [p for i, s in enumerate(shapes) for p in parameters([s], dtypes[i % len(dtypes)])]
        params = on_gpu(params)
        set_gradients(params, 0)
        for p in params:
            p.grad = p.grad.cuda()
        optimizer = case.make([{"params": params[i::groups]} for i in range(groups)], backend=backend)
        steady(optimizer)
        assert len(kernels_of(optimizer.step)) == 1, (len(shapes), groups)


def test_fp64_takes_a_second_launch(backend: str) -> None:
    params = on_gpu([*parameters([(30,)] * 3), *parameters([(30,)] * 3, torch.float64)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedoptim.AdamW(params, backend=backend)
    steady(optimizer)
    assert len(kernels_of(optimizer.step)) == 2


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
    for step in range(2, 22):
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
    assert_same(a, b)


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
    torch.cuda._sleep(20_000_000)
    a.step()
    a._drop_runners()
    with torch.cuda.stream(side):
        rubbish = [torch.full((n,), -1, dtype=torch.int64, device="cuda") for n in (64, 256, 1024, 4096)]
    b.step()
    torch.cuda.synchronize()
    assert_same(a, b)
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
    assert_same(a, b)


def test_a_clipped_step_whose_launches_overlap(backend: str) -> None:
    """The launch that updates may begin while the one that sums for the norm still runs, and waits for it."""
    if backend != "cuda":
        pytest.skip("launches one after the other")
    before = _native.tune("overlap", 1)
    try:
        mine, theirs, a, b = pair(
            backend,
            BY_NAME["adamw"],
            [(n,) for n in range(1, 400, 7)] + [(3_000_001,)],
            torch.float32,
            max_grad_norm=0.1,
        )
        for step in range(10):
            set_both(mine, theirs, step)
            a.step()
            b.step()
        assert_same(a, b)
    finally:
        _native.tune("overlap", before)


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
    assert_same(a, b)


@pytest.mark.parametrize("name", ["adamw", "sgd", "norm_adaptive"])
def test_beyond_two_to_the_32_elements(backend: str, name: str) -> None:
    """The ends of one tensor, against a small tensor with the same elements."""
    n, edge = (1 << 32) + 3, 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 5 * 2 * n:
        pytest.skip("needs 43 GB of free memory")
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    small = torch.nn.Parameter(torch.zeros(2 * edge, dtype=torch.bfloat16, device="cuda"))
    values = torch.randn(2, 2 * edge, device="cuda").bfloat16()
    small.data.copy_(values[0])
    small.grad = values[1].clone()
    for target, source in ((p.data, values[0]), (p.grad, values[1])):
        target[:edge] = source[:edge]
        target[-edge:] = source[edge:]
    optimizers = [BY_NAME[name].make([x], backend=backend) for x in (p, small)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(p.data[:edge], small.data[:edge])
    assert_same_bits(p.data[-edge:], small.data[edge:])
    assert not p.data[edge : n - edge].any()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_grad_scaler(backend: str, case: Case) -> None:
    """Overflow on the first step and later; the kernel unscales and skips."""
    mine, theirs, a, b = pair(backend, case, [(50,), (20_000,)], torch.float32, amp_in_step=True)
    b._step_supports_amp_scaling = False  # the scaler itself unscales and skips
    scalers = [torch.amp.GradScaler(d, init_scale=1024.0, growth_interval=3) for d in ("cuda", "cpu")]
    for step in range(10):
        for params, optimizer, scaler in ((mine, a, scalers[0]), (theirs, b, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(torch.zeros((), device=params[0].device))
            for i, p in enumerate(params):
                p.grad = (gradient(torch.empty(p.shape), step, i) * scaler.get_scale()).to(p.device)
                if step in (0, 4):
                    p.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_new_memory_takes_effect_at_once(backend: str, case: Case) -> None:
    mine, theirs, a, b = pair(backend, case, [(500,), (33,)], torch.float32)
    for step in range(6):
        set_both(mine, theirs, step)
        if step == 2:
            mine[0].data = mine[0].data.clone()
        if step == 3:
            for p in mine:
                a.state[p] = {k: v.clone() for k, v in a.state[p].items()}
        if step == 4:
            a.load_state_dict(copy.deepcopy(a.state_dict()))
        a.step()
        b.step()
    assert_same(a, b)


@pytest.mark.parametrize("case", [c for c in FULL if c.optimizer in ("Adam", "AdamW", "SGD", "Adagrad")], ids=str)
def test_a_state_dict_of_torchs_fused_optimizer(backend: str, case: Case) -> None:
    params = on_gpu(parameters([(50,), (7, 3)]))
    for p in params:
        p.grad = torch.ones_like(p)
    theirs = case.make_torch(params, fused=case.optimizer != "Adagrad")
    theirs.step()
    mine = case.make(params, backend=backend)
    mine.load_state_dict(theirs.state_dict())
    mine.step()
    theirs.load_state_dict(mine.state_dict())
    theirs.step()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_default_backend_is_cuda(backend: str) -> None:
    params = on_gpu(parameters([(5,)]))
    params[0].grad = torch.ones_like(params[0])
    optimizer = fusedoptim.AdamW(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert type(optimizer._runners[0]).__name__ == "GpuRunner"
    assert optimizer.state[params[0]]["step"].is_cuda

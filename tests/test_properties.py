"""Properties that hold for any input."""

from __future__ import annotations

from typing import Any

import torch
from cases import CASES, Case, assert_same_bits, assert_same_optimizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedoptim
from fusedoptim._rule import MAXIMUM

WITH_KERNELS = [case for case in CASES if case.runs_on("cpu")]
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def tensors(shapes: list, dtypes: list, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def check_backends(
    case: Case, options: dict[str, Any], shapes: list, dtypes: list, seed: int, steps: int, scale: float
) -> None:
    """Some gradients are missing in some steps."""
    optimizers = []
    for backend in ("cpu", "reference"):
        ps = [torch.nn.Parameter(x) for x in tensors(shapes, dtypes, seed)]
        o = case.make(ps, backend=backend, **options)
        for step in range(steps):
            for i, (p, g) in enumerate(zip(ps, tensors(shapes, dtypes, seed + step + 1), strict=True)):
                p.grad = None if (seed >> i) % 5 == step else (g * scale).to(p.dtype)
            o.step()
        optimizers.append(o)
    assert_same_optimizers(*optimizers)


@SETTINGS
@given(
    case=st.sampled_from(WITH_KERNELS),
    data=st.data(),
    shapes=SHAPES,
    seed=st.integers(0, 9999),
    steps=st.integers(1, 4),
)
def test_kernels_equal_the_reference(case: Case, data: st.DataObject, shapes: list, seed: int, steps: int) -> None:
    dtypes = [data.draw(DTYPES) for _ in shapes]
    state_dtype = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    scale = 10.0 ** data.draw(st.integers(-6, 3))
    options = {"lr": data.draw(st.floats(0, 1)), "state_dtype": state_dtype}
    check_backends(case, options, shapes, dtypes, seed, steps, scale)


def one_or_by_name(values: list, others: dict[str, list]) -> st.SearchStrategy[Any]:
    """A value for all, or one for some of these names."""
    by_name = st.fixed_dictionaries({}, optional={name: st.sampled_from(own) for name, own in others.items()})
    return st.sampled_from(values) | by_name


@st.composite
def ways_to_store(draw: st.DrawFn, case: Case) -> tuple[dict[str, Any], list[torch.dtype]]:
    """Options of low precision, and the dtypes that parameters can have with them."""
    states = {s.name: s.kind for s in getattr(fusedoptim, case.optimizer).rule.states}
    dtypes, roundings = [None, torch.float32, torch.bfloat16], ["auto", "nearest", "stochastic"]
    # Of these errors of a few percent would be too many: a maximum only rises, and of two a difference is taken.
    maximum, centered = (case.options.get(key, False) for key in ("amsgrad", "centered"))
    wide = {name for name, kind in states.items() if kind == MAXIMUM or (centered and name != "momentum_buffer")}
    free = case.optimizer == "AdamWScheduleFree"  # whose z is where the parameters go
    wide |= {"z"} if free else set()
    master = draw(st.sampled_from([None, "remainder", "remainder8", torch.float32]))
    of_states = {name: dtypes + ["int8"] * (name not in wide) for name in states}
    state_dtype = draw(one_or_by_name(dtypes + ["int8"] * (not maximum and not centered and not free), of_states))
    of_all = {name: roundings[: 2 if kind == MAXIMUM else 3] for name, kind in states.items()}
    of_all["param"] = roundings[: 3 if master is None else 2]
    rounding = draw(one_or_by_name(roundings, of_all))
    options = {"master": master, "state_dtype": state_dtype, "rounding": rounding}
    options["rounding_seed"] = draw(st.integers(0, 2**53 - 1))
    of_params = [torch.bfloat16, torch.float32]
    in_blocks = state_dtype == "int8" or (isinstance(state_dtype, dict) and "int8" in state_dtype.values())
    rounded = rounding == "stochastic" or (isinstance(rounding, dict) and rounding.get("param") == "stochastic")
    if not in_blocks:
        of_params.append(torch.float64)
    if master not in ("remainder", "remainder8") and not rounded:
        of_params.append(torch.float16)
    return options, of_params


#: Of parameters that can have states in blocks, and that are just too small for them.
LARGE = st.sampled_from([(16, 256), (33, 130), (2, 2049), (64, 65), (5, 7, 129), (63, 65), (4200,), (4096, 1)])


@SETTINGS
@given(
    case=st.sampled_from(WITH_KERNELS),
    data=st.data(),
    shapes=SHAPES,
    seed=st.integers(0, 9999),
    steps=st.integers(1, 3),
)
def test_kernels_equal_the_reference_in_fewer_bits(
    case: Case, data: st.DataObject, shapes: list, seed: int, steps: int
) -> None:
    options, possible = data.draw(ways_to_store(case))
    shapes = [*shapes[:2], data.draw(LARGE)]
    dtypes = [data.draw(st.sampled_from(possible)) for _ in shapes]
    options["ema_decay"] = data.draw(st.sampled_from([None, 0.5]))
    scale = 10.0 ** data.draw(st.integers(-6, 3))
    check_backends(case, options, shapes, dtypes, seed, steps, scale)


@SETTINGS
@given(case=st.sampled_from(CASES), n=st.integers(2, 400), cut=st.integers(1, 399), seed=st.integers(0, 9999))
def test_elements_do_not_know_their_neighbours(case: Case, n: int, cut: int, seed: int) -> None:
    """One tensor gives what its two halves give (but for norms, which are of the tensor)."""
    cut = min(cut, n - 1)
    if case.cls.rule.sums:
        return
    x, g = tensors([(n,), (n,)], [torch.float32] * 2, seed)
    whole = torch.nn.Parameter(x.clone())
    halves = [torch.nn.Parameter(x[:cut].clone()), torch.nn.Parameter(x[cut:].clone())]
    a, b = case.make([whole]), case.make(halves)
    for _ in range(2):
        whole.grad = g
        halves[0].grad, halves[1].grad = g[:cut], g[cut:]
        a.step()
        b.step()
    assert_same_bits(whole.detach(), torch.cat([h.detach() for h in halves]))


@SETTINGS
@given(case=st.sampled_from(CASES), seed=st.integers(0, 9999), order=st.permutations(range(5)))
def test_the_order_of_parameters_does_not_matter(case: Case, seed: int, order: list) -> None:
    shapes = [(3,), (40,), (2, 2), (17,), ()]
    xs, gs = tensors(shapes, [torch.float32] * 5, seed), tensors(shapes, [torch.float32] * 5, seed + 1)
    results = []
    for indices in (range(5), order):
        ps = [torch.nn.Parameter(x.clone()) for x in xs]
        o = case.make([ps[i] for i in indices])
        for _ in range(2):
            for p, g in zip(ps, gs, strict=True):
                p.grad = g
            o.step()
        results.append(ps)
    for p, q in zip(*results, strict=True):
        assert_same_bits(p.detach(), q.detach())

"""What steps within the backward pass cost: memory for one gradient, and work in proportion to the parameters."""

from __future__ import annotations

import pytest
import torch
from counted import calls
from released import stack

import fusedoptim
from fusedoptim import step_in_backward
from fusedoptim._native_runner import NativeRunner
from fusedoptim._reference_runner import ReferenceRunner


def bytes_of_gradients(model: torch.nn.Module) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("release", [True, False])
def test_gradients_never_exist_all_at_once(release: bool) -> None:
    model = stack(20, 32)
    peak = 0

    def watch(_: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, bytes_of_gradients(model))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)  # before the one that steps, so that it sees the gradient
    o = fusedoptim.AdamW(model.parameters())
    if release:
        step_in_backward(o)
    model(torch.ones(2, 32)).sum().backward()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert peak == (max(sizes) if release else sum(sizes))
    assert bytes_of_gradients(model) == (0 if release else sum(sizes))


@pytest.mark.parametrize(("backend", "runner"), [("cpu", NativeRunner), ("reference", ReferenceRunner)])
def test_tables_are_built_once_per_parameter(
    monkeypatch: pytest.MonkeyPatch, backend: str, runner: type[NativeRunner]
) -> None:
    built = []
    build = runner.build
    monkeypatch.setattr(runner, "build", lambda self, *rest: (built.append(self), build(self, *rest))[1])
    model = stack(10)
    o = fusedoptim.AdamW(model.parameters(), backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(o, 0.9)
    step_in_backward(o)
    counts = []
    for _ in range(4):
        built.clear()
        model(torch.ones(2, 8)).sum().backward()
        schedule.step()
        counts.append(len(built))
    # The reference keeps no tables.
    assert counts == ([20, 0, 0, 0] if backend == "cpu" else [20] * 4)


def test_costs_grow_with_the_number_of_parameters_and_no_faster() -> None:
    """Attaching, the first pass, one that finds everything in place, and the first after a checkpoint was loaded."""

    def costs(layers: int) -> list[int]:
        model = stack(layers)
        o = fusedoptim.AdamW([{"params": [p]} for p in model.parameters()])

        def backward() -> None:
            model(torch.ones(2, 8)).sum().backward()

        step_in_backward(o).remove()
        seen = [calls(lambda: step_in_backward(o)), calls(backward), calls(backward)]
        o.load_state_dict(o.state_dict())
        return [*seen, calls(backward)]

    costs(2)  # what happens once in a process
    few, many, more = costs(20), costs(40), costs(80)
    for a, b, c in zip(few, many, more, strict=True):
        assert c - b == pytest.approx(2 * (b - a), rel=0.02)

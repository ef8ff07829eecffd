"""The memory of a loaded checkpoint: copied once at most, and never shared by two optimizers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from checkpoints import WITH_SLOTS, slots, stepped
from torch import Tensor

import fusedoptim
from benchmarks.witness import ieee_sqrt


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of small tensors."""
    monkeypatch.setattr(fusedoptim._lending, "WORTH_LENDING", 0)


def content_of(optimizer: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def addresses(values: dict[str, Any], names: set[str]) -> list[int]:
    return [values[name].data_ptr() for name in sorted(names)]


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_a_state_dict_that_is_let_go_of_is_not_copied(case: Case) -> None:
    source, _ = stepped(case)
    target, params = stepped(case, steps=0)
    content = content_of(source)
    theirs = addresses(content["state"][1], slots(source))
    target.load_state_dict(content)
    del content
    target.step()
    assert addresses(target.state[params[1]], slots(source)) == theirs


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_state_dict_that_is_kept_stays_as_it_is(case: Case) -> None:
    source, _ = stepped(case)
    content = content_of(source)
    before = copy.deepcopy(content)
    targets = [stepped(case, steps=0) for _ in range(2)]
    for target, _ in targets:
        target.load_state_dict(content)
    for step in range(2):
        for target, params in targets:
            set_gradients(params, step)
            target.step()
    assert_same_optimizers(targets[0][0], targets[1][0])
    for i, values in content["state"].items():
        for name, value in values.items():
            assert_same_bits(value, before["state"][i][name], name)


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", WITH_SLOTS, ids=str)
def test_states_of_a_living_optimizer_are_copied_at_once(case: Case, backend: str) -> None:
    """Its state_dict holds the very dicts that it works with."""
    source, ps = stepped(case, backend=backend)
    target, qs = stepped(case, steps=0, backend=backend)
    target.load_state_dict(source.state_dict())
    before = {n: v.clone() for n, v in target.state[qs[0]].items()}
    set_gradients(ps, 7)
    source.step()
    for name, value in target.state[qs[0]].items():
        assert_same_bits(value, before[name], name)


@pytest.mark.usefixtures("lending")
def test_views_numpy_memory_and_graphs_are_copied_at_once() -> None:
    source, _ = stepped(FULL[0])
    for change in (
        lambda t: torch.cat([t, t])[: t.numel()],
        lambda t: torch.from_numpy(t.numpy().copy()),
        lambda t: t[::1],
    ):
        content = content_of(source)
        changed = content["state"][0]["exp_avg"] = change(content["state"][0]["exp_avg"])
        address = changed.data_ptr()
        del changed
        target, params = stepped(FULL[0], steps=0)
        target.load_state_dict(content)
        assert target.state[params[0]]["exp_avg"].data_ptr() != address


@pytest.mark.usefixtures("lending")
def test_a_state_taken_after_loading_is_the_state_and_a_graph_notices_the_step() -> None:
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0], steps=0)
    content = content_of(source)
    target.load_state_dict(content)
    del content
    saved: Tensor = target.state[params[0]]["exp_avg"]
    loss = (torch.ones(5, requires_grad=True) * saved).sum()
    set_gradients(params, 3)
    target.step()
    assert target.state[params[0]]["exp_avg"] is saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("lending")
def test_torch_and_fusedoptim_agree_after_a_checkpoint_that_was_lent() -> None:
    theirs, mine = torch.optim.AdamW(p := parameters([(5,)])), fusedoptim.AdamW(q := parameters([(5,)]))
    with ieee_sqrt():
        set_gradients(p, 0)
        theirs.step()
        mine.load_state_dict(content_of(theirs))
        q[0].data.copy_(p[0].data)
        for params, optimizer in ((p, theirs), (q, mine)):
            set_gradients(params, 1)
            optimizer.step()
    assert_same_optimizers(theirs, mine)


@pytest.mark.usefixtures("lending")
def test_steps_in_the_backward_pass_leave_a_kept_state_dict_as_it_is() -> None:
    model = torch.nn.Linear(3, 2)
    source = fusedoptim.AdamW(model.parameters())
    set_gradients(list(model.parameters()), 0)
    source.step()
    source.zero_grad()
    content = content_of(source)
    before = copy.deepcopy(content)
    target = fusedoptim.AdamW(model.parameters())
    with fusedoptim.step_in_backward(target):
        target.load_state_dict(content)
        model(torch.ones(4, 3)).sum().backward()
    assert target.state[model.weight]["step"].item() == 2
    for i, values in content["state"].items():
        for name, value in values.items():
            assert_same_bits(value, before["state"][i][name], name)


@pytest.mark.usefixtures("lending")
def test_a_storage_that_somebody_holds_is_not_lent() -> None:
    source, _ = stepped(FULL[0])
    target, params = stepped(FULL[0], steps=0)
    content = content_of(source)
    storage = content["state"][0]["exp_avg"].untyped_storage()
    before = storage.tolist()
    target.load_state_dict(content)
    del content
    set_gradients(params, 3)
    target.step()
    assert storage.tolist() == before


@pytest.mark.usefixtures("lending")
def test_shared_sums_stay_shared_after_loading() -> None:
    source, _ = stepped(FULL[4])
    target, params = stepped(FULL[4], steps=0)
    content = content_of(source)
    target.load_state_dict(content)
    target.share_memory()
    set_gradients(params, 3)
    target.step()
    assert target.state[params[0]]["sum"].is_shared() and not content["state"][0]["sum"].is_shared()

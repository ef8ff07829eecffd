"""What steps within the backward pass refuse, when they are attached and later."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, assert_same_bits, parameters
from released import loss_of, make, released

import fusedoptim
from fusedoptim import step_in_backward


def test_a_value_deleted_from_a_group() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    del o.param_groups[1]["eps"]
    with pytest.raises(ValueError, match="parameter group 1 has no 'eps'"):
        (params[2] * 2).sum().backward()


CANNOT_BE_COMBINED = {
    "max_grad_norm": (
        lambda o: o.param_groups[2].update(max_grad_norm=1.0),
        "max_grad_norm=1.0 cannot.*set it to None",
    ),
    "skip_nonfinite": (lambda o: o._options.update(skip_nonfinite=True), "skip_nonfinite=True cannot.*without it"),
    "zero_grad": (lambda o: o._options.update(zero_grad_in_step=True), "zero_grad_in_step=True cannot.*without it"),
    "scaling": (lambda o: setattr(o, "_step_supports_amp_scaling", True), "amp_in_step=True cannot.*bfloat16"),
    "pre-hook": (lambda o: o.register_step_pre_hook(lambda *a: None), "pre-hooks cannot.*remove them"),
}


@pytest.mark.parametrize("name", CANNOT_BE_COMBINED)
def test_what_cannot_be_combined_is_refused(name: str) -> None:
    change, message = CANNOT_BE_COMBINED[name]
    params, o = make(BY_NAME["adamw"])
    change(o)
    with pytest.raises(ValueError, match=message):
        step_in_backward(o)
    loss_of(params, 0).backward()
    assert params[0].grad is not None and "add_param_group" not in vars(o)


@pytest.mark.parametrize("name", CANNOT_BE_COMBINED)
def test_what_is_set_later_is_refused_by_the_backward_pass(name: str) -> None:
    change, message = CANNOT_BE_COMBINED[name]
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    released(params, 0)
    change(o)
    before = params[4].detach().clone()
    with pytest.raises(ValueError, match=message):
        (params[4] * torch.ones(0)).sum().backward()
    assert_same_bits(params[4].detach(), before)
    assert params[4].grad is not None


def test_absent_options_are_no_reason() -> None:
    params, o = make(BY_NAME["adamw"])
    for group in o.param_groups:
        group["max_grad_norm"] = None
    o._options["skip_nonfinite"] = False
    step_in_backward(o)
    released(params, 0)


def test_attaching_twice() -> None:
    params, o = make(BY_NAME["adamw"])
    step_in_backward(o)
    for second in (o, fusedoptim.SGD(params[:1])):
        with pytest.raises(ValueError, match=r"parameter 0 of group 0.*already.*remove\(\)"):
            step_in_backward(second)
    released(params, 0)
    third = fusedoptim.SGD(parameters([(3,)]))
    step_in_backward(third)
    with pytest.raises(ValueError, match=r"parameter 1 of group 1.*already"):
        third.add_param_group({"params": [*parameters([(4,)]), params[0]]})
    assert len(third.param_groups) == 1 and len(third._all_params) == 1


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    new = parameters([(3,)])
    with pytest.raises(ValueError, match="max_grad_norm"):
        o.add_param_group({"params": new, "max_grad_norm": 1.0})
    released(params, 0)
    (new[0] * 2).sum().backward()
    assert len(o.param_groups) == 3 and new[0].grad is not None


def test_only_for_this_packages_optimizers() -> None:
    with pytest.raises(TypeError, match="needs an optimizer of fusedoptim, but was given a LBFGS"):
        step_in_backward(torch.optim.LBFGS(parameters([(3,)])))


def test_parameters_that_share_memory() -> None:
    p = parameters([(6,)])[0]
    with pytest.raises(ValueError, match="shares memory"):
        step_in_backward(fusedoptim.SGD([p, torch.nn.Parameter(p.detach()[2:])]))


def test_errors_name_the_parameter_as_the_optimizer_has_it() -> None:
    params = parameters([(5,), (6,), (7,)])
    o = fusedoptim.AdamW([{"params": [("a", params[0])]}, {"params": [("b", params[1]), ("c", params[2])]}])
    step_in_backward(o)
    assert all(len(part.group["param_names"]) == 1 for part in o._step_in_backward.parts.values())
    o.state[params[2]]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 'c' of group 1 \(shape \(7,\)"):
        loss_of(params, 0).backward()
    del o.state[params[2]]
    o.zero_grad()
    o.param_groups[1]["lr"] = float("nan")
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match="parameter group 1: 'lr' is NaN"):
        (params[1] * 2).sum().backward()
    assert_same_bits(params[1].detach(), before)


def test_torch_refuses_a_second_pass_over_the_graph() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    loss = (params[0] ** 2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scaler_finds_no_gradients() -> None:
    params, o = make(BY_NAME["sgd"])
    step_in_backward(o)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(params, 0)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(o)

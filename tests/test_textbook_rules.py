"""Update rules as textbooks have them, against NumPy: with given gradients, and on a least-squares problem, where each
side follows its own gradients. All in fp64, after 50 steps, within 1e-13 of the largest parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import gradient, parameters, set_gradients

from fusedoptim import SGD, Adagrad, Adam, AdamW, FusedOptimizer, NormAdaptive, RMSprop, Rule, State
from fusedoptim.rule_functions import correctly_rounded_sqrt

np = pytest.importorskip("numpy")
STEPS, TOLERANCE = 50, 1e-13
#: What a formula keeps for one tensor, zeros at first.
Memory = dict[str, Any]

# ---- an own rule ----


def adabelief(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    """AdaBelief (arXiv:2010.07468), without corrections."""
    beta1, beta2 = h["betas"]
    s["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
    surprise = g - s["exp_avg"]
    s["exp_avg_var"].mul_(beta2).addcmul_(surprise, surprise, value=1 - beta2)
    p.addcdiv_(s["exp_avg"], correctly_rounded_sqrt(s["exp_avg_var"]).add_(h["eps"]), value=-h["lr"])


class AdaBelief(FusedOptimizer):
    rule = Rule("adabelief of a textbook", adabelief, states=(State("exp_avg"), State("exp_avg_var")))

    def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.99), eps: float = 1e-4, **options: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)


# ---- formulas: x is the parameter, t counts from 1, o are all options ----


def average(m: Memory, name: str, value: np.ndarray, beta: float) -> np.ndarray:
    m[name] = beta * m.get(name, 0.0) + (1 - beta) * value
    return m[name]


def numpy_adam(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    (beta1, beta2), decay = o["betas"], o["weight_decay"]
    if o["decoupled_weight_decay"]:
        x = x - o["lr"] * decay * x
    else:
        g = g + decay * x
    first, second = average(m, "m", g, beta1), average(m, "v", g**2, beta2)
    if o.get("bias_correction", True):
        first, second = first / (1 - beta1**t), second / (1 - beta2**t)
    return x - o["lr"] * first / (np.sqrt(second) + o["eps"])


def numpy_sgd(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    """The first gradient enters the buffer undamped."""
    g = g + o["weight_decay"] * x
    m["b"] = g if t == 1 else o["momentum"] * m["b"] + (1 - o["dampening"]) * g
    return x - o["lr"] * (g + o["momentum"] * m["b"] if o["nesterov"] else m["b"])


def numpy_rmsprop(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    return x - o["lr"] * g / (np.sqrt(average(m, "v", g**2, o["alpha"])) + o["eps"])


def numpy_adagrad(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    m["sum"] = m.get("sum", 0.0) + g**2
    return x - o["lr"] / (1 + (t - 1) * o["lr_decay"]) * g / (np.sqrt(m["sum"]) + o["eps"])


def numpy_norm_adaptive(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    """Its three scalars are rounded to fp32, which is part of its definition."""
    norm = float(np.float32(math.sqrt((g**2).sum())))
    m["a"] = float(np.float32(o["beta"] * m.get("a", 0.0) + (1 - o["beta"]) * norm))
    x = x * float(np.float32(1 - o["lr"] * o["weight_decay"])) if o["weight_decay"] else x
    return x - float(np.float32(o["lr"] / (m["a"] + o["eps"]))) * g


def numpy_adabelief(x: np.ndarray, g: np.ndarray, m: Memory, t: int, o: Any) -> np.ndarray:
    first = average(m, "m", g, o["betas"][0])
    return x - o["lr"] * first / (np.sqrt(average(m, "s", (g - first) ** 2, o["betas"][1])) + o["eps"])


RULES = [
    pytest.param(Adam, numpy_adam, {"lr": 0.05}, id="Adam"),
    pytest.param(Adam, numpy_adam, {"lr": 0.02, "bias_correction": False}, id="Adam without correction"),
    pytest.param(AdamW, numpy_adam, {"lr": 0.05, "weight_decay": 0.1}, id="AdamW"),
    pytest.param(SGD, numpy_sgd, {"lr": 0.1, "momentum": 0.9}, id="SGD with momentum"),
    pytest.param(
        SGD, numpy_sgd, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}, id="SGD with dampening"
    ),
    pytest.param(
        SGD, numpy_sgd, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, id="SGD with Nesterov"
    ),
    pytest.param(RMSprop, numpy_rmsprop, {"lr": 0.02}, id="RMSprop"),
    pytest.param(Adagrad, numpy_adagrad, {"lr": 0.3, "lr_decay": 0.01}, id="Adagrad"),
    pytest.param(NormAdaptive, numpy_norm_adaptive, {"lr": 0.05, "weight_decay": 0.01}, id="NormAdaptive"),
    pytest.param(AdaBelief, numpy_adabelief, {"lr": 0.02}, id="an own rule"),
]
EVERY_RULE = pytest.mark.parametrize(("cls", "formula", "options"), RULES)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
@EVERY_RULE
def test_with_given_gradients(cls: Any, formula: Any, options: dict[str, Any], backend: str) -> None:
    """Over many orders of magnitude, with zeros among them."""
    params = parameters([(40, 13), (300,)], torch.float64)
    optimizer = cls(params, backend=backend, **options)
    expected: list[Any] = [p.detach().numpy().copy() for p in params]
    memories: list[Memory] = [{} for _ in params]
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
        for i, (p, memory) in enumerate(zip(params, memories, strict=True)):
            g = gradient(p, step, i).numpy()
            expected[i] = formula(expected[i], g, memory, step + 1, optimizer.param_groups[0])
    for p, x in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=TOLERANCE * np.abs(x).max())


@BACKENDS
@EVERY_RULE
def test_least_squares(cls: Any, formula: Any, options: dict[str, Any], backend: str) -> None:
    """``|A x - b|^2 / (2 n)``, whose gradient NumPy has in closed form and torch from autograd."""
    random = np.random.default_rng(0)
    a, solution = random.standard_normal((40, 5)), random.standard_normal(5)
    b = a @ solution
    x, memory, p = np.zeros(5), {}, torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = cls([p], backend=backend, **options)
    losses = []
    for step in range(STEPS):
        loss = (torch.from_numpy(a) @ p - torch.from_numpy(b)).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        x = formula(x, a.T @ (a @ x - b) / len(b), memory, step + 1, optimizer.param_groups[0])
    np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=TOLERANCE * np.abs(x).max())
    assert losses[-1] < losses[0] / 4

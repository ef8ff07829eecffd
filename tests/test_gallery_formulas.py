"""The optimizers that torch.optim does not have: against their papers' formulas, written once more, and against
published implementations, where these are installed (lion-pytorch, timm, pytorch-optimizer, schedulefree)."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import CASES, Case, gradient, parameters, set_gradients
from torch import Tensor

SHAPES = [(40, 13), (300,)]
#: What a formula keeps for one tensor.
Memory = dict[str, Any]
STEPS = 50

# ---- formulas, as the papers have them: x is the parameter, t counts from 1, o are all options ----


def ema(m: Memory, name: str, value: Tensor, beta: float) -> Tensor:
    m[name] = beta * m.get(name, torch.zeros_like(value)) + (1 - beta) * value
    found: Tensor = m[name]
    return found


def adam_direction(m: Memory, g: Tensor, t: int, o: Any, corrects: bool = True) -> tuple[Tensor, Tensor]:
    """The corrected first moment, and the root of the second one, with epsilon."""
    first, second = ema(m, "m", g, o["betas"][0]), ema(m, "v", g * g, o["betas"][1])
    c1, c2 = (1 - o["betas"][0] ** t, 1 - o["betas"][1] ** t) if corrects else (1.0, 1.0)
    return first / c1, (second / c2).sqrt() + o["eps"]


def lion(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    (beta1, beta2), before = o["betas"], m.get("m", torch.zeros_like(x))
    direction = (beta1 * before + (1 - beta1) * g).sign()
    ema(m, "m", g, beta2)
    return x - o["lr"] * (direction + o["weight_decay"] * x)


def ratio_of_norms(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm()) if a.norm() > 0 and b.norm() > 0 else 1.0


def lamb(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    first, root = adam_direction(m, g, t, o, o["bias_correction"])
    update = first / root + o["weight_decay"] * x
    ratio = ratio_of_norms(x, update) if o["weight_decay"] or o["always_adapt"] else 1.0
    return x - o["lr"] * (min(ratio, 1.0) if o["trust_clip"] else ratio) * update


def lars(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    decay, rate = o["weight_decay"], 1.0
    if decay or o["always_adapt"]:
        if x.norm() > 0 and g.norm() > 0:
            rate = float(o["trust_coeff"] * x.norm() / (g.norm() + decay * x.norm() + o["eps"]))
        if o["trust_clip"]:
            rate = min(rate / o["lr"], 1.0)
    g = rate * (g + decay * x)
    if not o["momentum"]:
        return x - o["lr"] * g
    m["b"] = o["momentum"] * m["b"] + (1 - o["dampening"]) * g if "b" in m else g
    return x - o["lr"] * (g + o["momentum"] * m["b"] if o["nesterov"] else m["b"])


def ademamix(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    beta1, _, beta3 = o["betas"]
    alpha, part = o["alpha"], 1.0
    if o["alpha_warmup"]:
        alpha *= min(t / o["alpha_warmup"], 1.0)
    if o["beta3_warmup"]:
        part = min(t / o["beta3_warmup"], 1.0)
    log1, log3 = math.log(beta1), math.log(beta3)
    first, root = adam_direction(m, g, t, o)
    slow = ema(m, "slow", g, math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)))
    return x - o["lr"] * ((first + alpha * slow) / root + o["weight_decay"] * x)


def adopt(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    if not o["decouple"]:
        g = g + o["weight_decay"] * x
    if t == 1:
        m["v"] = g * g
        return x
    normed = g / m["v"].sqrt().clamp(min=o["eps"])
    if o["clip"]:
        normed = normed.clamp(-((t - 1) ** o["clip_exp"]), (t - 1) ** o["clip_exp"])
    ema(m, "v", g * g, o["betas"][1])
    decay = o["weight_decay"] if o["decouple"] else 0.0
    return x - o["lr"] * (ema(m, "m", normed, o["betas"][0]) + decay * x)


def schedule_free(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    """x is the paper's y here; its x is ``average``."""
    beta1, beta2 = o["betas"]
    z, average = m.get("z", x), m.get("average", x)
    lr = o["lr"] * (min(t / o["warmup_steps"], 1.0) if o["warmup_steps"] else 1.0)
    m["lr_max"] = max(m.get("lr_max", 0.0), lr)
    weight = t ** o["r"] * m["lr_max"] ** o["weight_lr_power"]
    m["sum"] = m.get("sum", 0.0) + weight
    second = ema(m, "v", g * g, beta2) / (1 - beta2**t)
    m["z"] = z - lr * (g / (second.sqrt() + o["eps"]) + o["weight_decay"] * x)
    m["average"] = average + weight / m["sum"] * (m["z"] - average)
    found: Tensor = (1 - beta1) * m["z"] + beta1 * m["average"]
    return found


def cautious(x: Tensor, g: Tensor, m: Memory, t: int, o: Any) -> Tensor:
    x = x - o["lr"] * o["weight_decay"] * x
    first, root = adam_direction(m, g, t, o)
    mask = (first * g > 0).to(x.dtype)
    return x - o["lr"] / max(float(mask.mean()), 1e-3) * mask * first / root


FORMULAS: dict[str, Callable[[Tensor, Tensor, Memory, int, Any], Tensor]] = {
    "Lion": lion,
    "LAMB": lamb,
    "LARS": lars,
    "AdEMAMix": ademamix,
    "ADOPT": adopt,
    "AdamWScheduleFree": schedule_free,
    "CautiousAdamW": cautious,
}
NOT_IN_TORCH = [case for case in CASES if case.own and not case.in_torch]


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_every_optimizer_has_a_formula() -> None:
    assert {case.optimizer for case in NOT_IN_TORCH} == set(FORMULAS)


@pytest.mark.parametrize("case", NOT_IN_TORCH, ids=str)
def test_formulas_of_the_papers(case: Case) -> None:
    """In fp64, up to rounding; the sum of weights has fp32."""
    params = parameters(SHAPES, torch.float64)
    optimizer = case.make(params)
    options = optimizer.param_groups[0]
    expected: list[Tensor] = [p.detach().clone() for p in params]
    memories: list[Memory] = [{} for _ in params]
    for step in range(STEPS):
        set_gradients(params, step)
        for i, (p, memory) in enumerate(zip(params, memories, strict=True)):
            g = gradient(p, step, i) * (-1 if options["maximize"] else 1)
            expected[i] = FORMULAS[case.optimizer](expected[i], g, memory, step + 1, options)
        optimizer.step()
    for p, x in zip(params, expected, strict=True):
        assert far(p.detach(), x) < (1e-7 if case.optimizer == "AdamWScheduleFree" else 1e-12)


# ---- published implementations ----


def of_timm(module: str, name: str) -> Any:
    """Without the rest of timm, which wants torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    for package, path in (("timm", ""), ("timm.optim", "/optim")):
        if package not in sys.modules:
            stub = ModuleType(package)
            stub.__spec__ = spec
            stub.__path__ = [spec.submodule_search_locations[0] + path]
            sys.modules[package] = stub
    return getattr(importlib.import_module(f"timm.optim.{module}"), name)


LOOP = {"foreach": False}
#: Ours and its options; where the other one is, and its options beside the same.
PUBLISHED: list[tuple[str, dict[str, Any], tuple[str, str], dict[str, Any]]] = [
    ("Lion", {"weight_decay": 0.1, "betas": (0.8, 0.95)}, ("lion_pytorch", "Lion"), {}),
    ("LAMB", {}, ("timm:lamb", "Lamb"), {"max_grad_norm": None, **LOOP}),
    ("LAMB", {"max_grad_norm": 1.0, "weight_decay": 0.1}, ("timm:lamb", "Lamb"), LOOP),
    (
        "LAMB",
        {"weight_decay": 0, "always_adapt": True, "bias_correction": False, "trust_clip": True},
        ("timm:lamb", "Lamb"),
        {"max_grad_norm": None, **LOOP},
    ),
    ("LARS", {}, ("timm:lars", "Lars"), LOOP),
    (
        "LARS",
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "trust_coeff": 0.05},
        ("timm:lars", "Lars"),
        LOOP,
    ),
    (
        "LARS",
        {"momentum": 0.9, "nesterov": True, "always_adapt": True, "trust_clip": True},
        ("timm:lars", "Lars"),
        LOOP,
    ),
    ("AdEMAMix", {"alpha": 5.0}, ("pytorch_optimizer", "AdEMAMix"), LOOP),
    (
        "AdEMAMix",
        {"weight_decay": 0.1, "alpha": 8.0, "beta3_warmup": 40, "alpha_warmup": 40},
        ("pytorch_optimizer", "AdEMAMix"),
        {"weight_decouple": True, "t_alpha_beta3": 40, **LOOP},
    ),
    ("ADOPT", {"clip_exp": 0.25}, ("timm:adopt", "Adopt"), LOOP),
    (
        "ADOPT",
        {"weight_decay": 0.1, "decouple": True, "clip_exp": 0.333},
        ("timm:adopt", "Adopt"),
        {"decoupled": True, **LOOP},
    ),
    ("ADOPT", {"weight_decay": 0.1, "clip": False}, ("timm:adopt", "Adopt"), {"clip_exp": None, **LOOP}),
    ("AdamWScheduleFree", {}, ("schedulefree", "AdamWScheduleFree"), LOOP),
    (
        "AdamWScheduleFree",
        {"weight_decay": 0.1, "warmup_steps": 10, "r": 0.5},
        ("schedulefree", "AdamWScheduleFree"),
        LOOP,
    ),
    ("CautiousAdamW", {}, ("timm:adamw", "AdamWLegacy"), {"caution": True, **LOOP}),
]
#: Arguments that the other one has under another name, or not at all.
OURS_ALONE = {"beta3_warmup", "alpha_warmup", "decouple", "clip"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options", "where", "more"), PUBLISHED, ids=[f"{p[0]} {k}" for k, p in enumerate(PUBLISHED)]
)
def test_published_implementations(
    name: str, options: dict[str, Any], where: tuple[str, str], more: dict[str, Any], dtype: torch.dtype
) -> None:
    module, cls = where
    if module.startswith("timm:"):
        other = of_timm(module.removeprefix("timm:"), cls)
    else:
        other = getattr(pytest.importorskip(module), cls)
    mine, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    a = Case("", name, options).make(mine)
    b = other(theirs, **{**{k: v for k, v in options.items() if k not in OURS_ALONE}, **more})
    switches = hasattr(b, "train")
    if switches:
        b.train()
    for step in range(STEPS):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        a.step()
        b.step()

    def compare() -> None:
        limit = 3e-6 if dtype == torch.float32 else 1e-8 if switches else 1e-10
        for p, q in zip(mine, theirs, strict=True):
            assert torch.equal(p, q) if name == "Lion" else far(p.detach(), q.detach()) < limit

    compare()
    for mode in ("eval", "train") if switches else ():
        getattr(a, mode)()
        getattr(b, mode)()
        compare()

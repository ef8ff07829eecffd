"""fusedoptim/guides/coming_from.md: what other packages' optimizers leave behind, and what goes on here. Packages that
are not installed have their checkpoints made here, as their code makes them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits

import fusedoptim

Content = dict[str, Any]
GUIDE = Path(__file__).parent.parent / "fusedoptim" / "guides" / "coming_from.md"
BF16 = torch.bfloat16


def readable(content: Content) -> Content:
    """The guide's function."""
    names: dict[str, Any] = {}
    code = re.search(r"^def readable.*?^$", GUIDE.read_text(), re.M | re.S)
    assert code
    exec(code[0], names)
    result: Content = names["readable"](content)
    return result


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 8)).to(dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(i)).to(next(net.parameters()).dtype)
        net(x).square().mean().backward()
        optimizer.step()


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference of a parameter, over the learning rate of 1e-3: by how many usual updates they differ."""
    both = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in both) / 1e-3


def goes_on(there: Callable[..., Any], here: Callable[..., Any], convert: Callable[[Content], Content]) -> float:
    """Three steps there, three more there and here: the distance between the two. Where the moments did not come
    along, that is above 1."""
    a = model()
    theirs = there(a.parameters())
    train(a, theirs, 0, 3)
    b = copy.deepcopy(a)
    own = here(b.parameters())
    own.load_state_dict(convert(theirs.state_dict()))
    for net, optimizer in ((a, theirs), (b, own)):
        train(net, optimizer, 3, 6)
    return distance(a, b)


def as_it_is(content: Content) -> Content:
    return content


# ---- what is installed everywhere ----


def test_from_torch_and_back() -> None:
    made = {"lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.1}
    assert goes_on(lambda p: torch.optim.AdamW(p, **made), fusedoptim.AdamW, as_it_is) < 1e-3
    assert goes_on(lambda p: fusedoptim.AdamW(p, **made), torch.optim.AdamW, copy.deepcopy) < 1e-3  # torch shares


def grouped_steps(optimizer: torch.optim.Optimizer) -> Content:
    """As of apex and TransformerEngine: ``step`` is the group's."""
    content = copy.deepcopy(optimizer.state_dict())
    steps = [values.pop("step") for values in content["state"].values()]
    for group in content["param_groups"]:
        group["step"] = int(steps[0])
    return content


def one_step_counts(optimizer: torch.optim.Optimizer) -> Content:
    """As of DeepSpeed's FusedAdam: the last parameter's ``step`` counts, and the others' and the group's stay 0."""
    content = copy.deepcopy(optimizer.state_dict())
    for values in content["state"].values():
        values["step"] = 0 if values is not content["state"][max(content["state"])] else int(values["step"])
    content["param_groups"][0]["step"] = 0
    return content


@pytest.mark.parametrize("leave", [grouped_steps, one_step_counts])
def test_steps_that_are_not_each_parameters_own(leave: Callable[[torch.optim.Optimizer], Content]) -> None:
    a = model()
    source = fusedoptim.AdamW(a.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1)
    train(a, source, 0, 3)
    b = copy.deepcopy(a)
    target = fusedoptim.AdamW(b.parameters())
    target.load_state_dict(readable(leave(source)))
    for net, optimizer in ((a, source), (b, target)):
        train(net, optimizer, 3, 6)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_grouped_steps_are_refused_as_they_are() -> None:
    net = model()
    optimizer = fusedoptim.AdamW(net.parameters())
    train(net, optimizer, 0, 1)
    with pytest.raises(ValueError, match=r"\['step'\] are missing"):
        optimizer.load_state_dict(grouped_steps(optimizer))


def test_masters_of_transformer_engine_come_along() -> None:
    a = model(BF16)
    source = fusedoptim.AdamW(a.parameters(), lr=1e-3, master=torch.float32)
    train(a, source, 0, 3)
    content = grouped_steps(source)
    for values in content["state"].values():
        values["master_param"] = values.pop("param_master")
    for group in content["param_groups"]:
        del group["master"]
    b = copy.deepcopy(a)
    target = fusedoptim.AdamW(b.parameters(), master="remainder", state_dtype=torch.float32)
    target.load_state_dict(readable(content))
    for net, optimizer in ((a, source), (b, target)):
        train(net, optimizer, 3, 4)
    numbers = [o.portable_state_dict()["state"] for o in (source, target)]
    for i in range(4):
        assert_same_bits(numbers[0][i]["master"], numbers[1][i]["master"])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda p: fusedoptim.SGD(p, momentum=0.5), "momentum"),
        (lambda p: fusedoptim.LARS(p, momentum=0.5), "momentum"),
        (lambda p: fusedoptim.RMSprop(p, alpha=0.5), "alpha"),
    ],
)
def test_the_first_beta_of_bitsandbytes_is_momentum_or_alpha(made: Any, name: str) -> None:
    group = {"lr": 1e-3, "betas": (0.75, 0.0), "eps": 0.0, "weight_decay": 0.0, "params": [0]}
    optimizer = made([{"params": [torch.nn.Parameter(torch.ones(4))]} for _ in range(2)])
    eps = optimizer.defaults.get("eps")
    groups = [group, {**group, "params": [1]}]  # the second one's parameter has had no gradient yet
    optimizer.load_state_dict({"state": {0: {"step": 3, "state1": torch.ones(4)}}, "param_groups": groups})
    for own in optimizer.param_groups:
        assert own[name] == 0.75 and "betas" not in own
        assert own.get("eps") == (eps if name == "momentum" else 0.0), "theirs is a placeholder"
    without_states = made([torch.nn.Parameter(torch.ones(4))])  # anyone's, as torch.optim.Adam's before its first step
    with pytest.warns(UserWarning, match="It is probably another optimizer's"):
        without_states.load_state_dict({"state": {}, "param_groups": [group]})
    kept = without_states.param_groups[0]
    assert kept["betas"] == (0.75, 0.0) and kept[name] != 0.75


# ---- what may be ----


@pytest.mark.parametrize(
    ("name", "options", "here", "near"),
    [
        ("AdamW", {"betas": (0.8, 0.9), "weight_decay": 0.1}, fusedoptim.AdamW, 1e-3),
        ("AdamW8bit", {"weight_decay": 0.1}, lambda p: fusedoptim.AdamW(p, state_dtype="int8"), 0.3),
        ("SGD", {"momentum": 0.9}, fusedoptim.SGD, 1e-3),
        ("RMSprop", {"alpha": 0.9}, fusedoptim.RMSprop, 1e-3),
        ("Lion", {"betas": (0.8, 0.9)}, fusedoptim.Lion, 1e-3),
    ],
)
def test_from_bitsandbytes(name: str, options: dict[str, Any], here: Any, near: float) -> None:
    there = getattr(pytest.importorskip("bitsandbytes").optim, name)
    assert goes_on(lambda p: there(p, lr=1e-3, **options), here, as_it_is) < near


@pytest.mark.parametrize(
    ("row", "module", "name"),
    [
        ("apex", "apex.optimizers", "FusedAdam"),
        ("apex", "transformer_engine.pytorch.optimizers", "FusedAdam"),
        ("DeepSpeed `FusedAdam", "deepspeed.ops.adam", "FusedAdam"),
        ("DeepSpeed `DeepSpeedCPUAdam", "deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        ("bitsandbytes `AdamW(", "bitsandbytes.optim", "AdamW"),
        ("bitsandbytes `AdamW8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("bitsandbytes `AdamW8bit", "torchao.optim", "AdamW8bit"),
        ("torchao", "torchao.optim", "_AdamW"),
        ("optimi `AdamW", "optimi", "AdamW"),
        ("optimi, bf16", "optimi", "AdamW"),
    ],
)
def test_what_the_table_says_to_write_has_their_defaults(row: str, module: str, name: str) -> None:
    there = inspect.signature(getattr(pytest.importorskip(module), name)).parameters
    written = re.search(rf"^\| {re.escape(row)}.*?\| `AdamW\((?:\.\.\.(?:, )?)?(.*?)\)`", GUIDE.read_text(), re.M)
    assert written
    here = eval(f"dict({written[1]})", {"torch": torch})
    own = fusedoptim.AdamW([torch.nn.Parameter(torch.ones(1, dtype=BF16))], **here).defaults
    for option in ("betas", "eps", "weight_decay"):
        assert own[option] == there[option].default, option


def test_from_optimi() -> None:
    there = pytest.importorskip("optimi").AdamW
    made = {"lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.1}
    assert goes_on(lambda p: there(p, **made), fusedoptim.AdamW, readable) < 1e-3


def test_from_torchao() -> None:
    there = pytest.importorskip("torchao.optim").AdamW8bit
    a = model()
    theirs = there(a.parameters(), lr=1e-3)
    train(a, theirs, 0, 2)
    own = fusedoptim.AdamW(a.parameters())
    own.load_state_dict(theirs.state_dict())
    for p in a.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            saved = theirs.state[p][name]
            assert_same_bits(own.state[p][name], saved.dequantize() if p.numel() >= 4096 else saved)

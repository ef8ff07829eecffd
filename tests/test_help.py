"""What ``help()``, ``inspect.signature()`` and ``repr()`` say of the options that every optimizer has."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import typing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import EVERY, OPTIMIZERS, Case, parameters
from typing_extensions import Unpack

import fusedoptim
from fusedoptim import AdamW, StepOptions
from fusedoptim._norm_groups import norm_groups
from fusedoptim._options import DEFAULTS
from fusedoptim._rule import GROUP_OPTIONS

OPTIONS = list(StepOptions.__annotations__)


def entries(text: str) -> dict[str, str]:
    """The arguments that a docstring explains."""
    section = re.search(r"^( *)Args:\n(.*?)(?=^\1\S|\Z)", text, re.M | re.S)
    assert section is not None
    found = re.findall(rf"^{section[1]}    (\w[\w, ]*): (.*(?:\n{section[1]}     +\S.*)*)", section[2], re.M)
    return {name: explained for names, explained in found for name in names.split(", ")}


def public_functions() -> dict[str, Any]:
    modules = (fusedoptim, fusedoptim.rule_functions)
    return {n: f for m in modules for n in m.__all__ if inspect.isfunction(f := getattr(m, n))}


def examples(name: str, text: str) -> list[str]:
    """Code within a docstring that calls what it is of."""
    return [code for code in re.findall(r"``([^`]+)``", text) if f"{name}(" in code]


@pytest.mark.parametrize("name", public_functions())
def test_a_function_explains_its_arguments_and_what_it_returns_and_shows_a_call(name: str) -> None:
    function = public_functions()[name]
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    assert set(entries(text)) == set(signature.parameters)
    assert ("Returns:" in text) == (signature.return_annotation != "None")
    calls = examples(name, text)
    assert calls and all(ast.parse(code) for code in calls)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_an_optimizer_says_its_formula_its_source_its_states_and_its_errors(cls: Any) -> None:
    text = inspect.getdoc(cls) or ""
    assert ".. math::" in text and "ValueError: for values out of range" in text
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\([A-Z][^()]*\b(19|20)\d\d\)", text), "a source"
    states = re.search(r"State per\s+parameter(.*?)\n\n", text, re.S)
    assert states
    named = set(re.findall(r"``(\w+)``", states[1]))
    rule = cls.rule
    assert {s.name for s in (*rule.states, *rule.numbers)} | ({"step"} if rule.has_step else set()) <= named
    assert not any(what.startswith("as in") for what in entries(text).values()), "help() of one class is enough"


@pytest.mark.parametrize("cls", [fusedoptim.Rule, fusedoptim.State])
def test_what_a_rule_is_made_of_explains_its_fields(cls: Any) -> None:
    assert list(entries(inspect.getdoc(cls) or "")) == list(inspect.signature(cls).parameters)


def test_every_option_has_a_text() -> None:
    found = entries(inspect.getdoc(StepOptions) or "")
    assert list(found) == OPTIONS
    assert all(len(text.split()) > 5 for text in found.values())


def test_no_optimizer_is_left_out() -> None:
    public = (getattr(fusedoptim, name) for name in fusedoptim.__all__)
    assert {c for c in public if isinstance(c, type) and issubclass(c, fusedoptim.FusedOptimizer)} == {
        *OPTIMIZERS,
        fusedoptim.FusedOptimizer,
    }


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_help_explains_every_argument_and_every_option(cls: Any) -> None:
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    explained = entries(text[text.index(" |  ") :].replace(" |  ", ""))
    of_options = entries(inspect.getdoc(StepOptions) or "")
    for name in OPTIONS:
        assert explained[name].split() == of_options[name].split()
    assert set(explained) == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("of", [lambda cls: cls, lambda cls: cls.__init__], ids=["class", "constructor"])
def test_the_signature_lists_the_options(cls: Any, of: Any) -> None:
    found = inspect.signature(of(cls)).parameters
    types = typing.get_type_hints(StepOptions)
    for name in OPTIONS:
        assert found[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert found[name].default == {**GROUP_OPTIONS, **DEFAULTS}[name] and found[name].annotation == types[name]
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_the_defaults_in_the_signature_are_those_of_the_optimizer(cls: Any) -> None:
    """A tool that passes all of them makes the optimizer that is made without any."""
    given = {
        name: p.default for name, p in inspect.signature(cls).parameters.items() if p.default is not inspect._empty
    }
    a, b = cls(parameters([(2,)]), **given), cls(parameters([(2,)]))
    assert a.defaults == b.defaults and a._options == b._options


def test_a_users_subclass() -> None:
    class Silent(AdamW):
        pass

    class Own(AdamW):
        """Mine.

        Args:
            params: which.
            options: see :class:`fusedoptim.StepOptions`.
        """

        def __init__(self, params: Any, **options: Unpack[StepOptions]) -> None:
            super().__init__(params, lr=0.5, **options)

    class Closed(Own):
        """Takes no options."""

        def __init__(self, params: Any, **other: Any) -> None:
            super().__init__(params, max_grad_norm=1.0)

    class Odd(AdamW):
        __init__ = dict.update  # type: ignore[assignment]  # which has no signature

    assert Silent.__doc__ is None and inspect.getdoc(Silent) == inspect.getdoc(AdamW)
    assert inspect.signature(Silent) == inspect.signature(AdamW)
    assert list(entries(inspect.getdoc(Own) or "")) == ["params", *OPTIONS]
    assert list(inspect.signature(Own).parameters) == ["params", *OPTIONS]
    assert Closed.__doc__ == "Takes no options." and list(inspect.signature(Closed).parameters) == ["params", "other"]
    assert issubclass(Odd, AdamW)
    assert Own(parameters([(2,)]), ema_decay=0.5).param_groups[0]["ema_decay"] == 0.5


def test_without_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under python -OO, where a user may still have set one."""
    monkeypatch.setattr(StepOptions, "__doc__", None)

    class Silent(AdamW):
        def __init__(self, params: Any, **options: Unpack[StepOptions]) -> None:
            super().__init__(params, **options)

    class Own(Silent):
        __doc__ = "options: see :class:`fusedoptim.StepOptions`."

    assert Silent.__doc__ is None and Own.__doc__ == "options: see :class:`fusedoptim.StepOptions`."
    assert list(inspect.signature(Own).parameters) == ["params", *OPTIONS]


# ---- repr ----


def lines(optimizer: torch.optim.Optimizer) -> list[str]:
    return repr(optimizer).split("\n")


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_repr_is_torchs_where_no_option_is_set(case: Case) -> None:
    o = case.cls(parameters([(2,)]), **case.options)
    assert repr(o) == torch.optim.Optimizer.__repr__(o)
    assert not any(name in repr(o) for name in OPTIONS)


def test_repr_shows_the_options_in_use() -> None:
    p = parameters([(2,), (3,)])
    groups = [{"params": p[:1], "max_grad_norm": 2.0}, {"params": p[1:]}]
    o = AdamW(groups, backend="reference", state_dtype=torch.float32, skip_nonfinite=True, ema_decay=0.5)
    found = lines(o)
    first, second = found.index("Parameter Group 0"), found.index("Parameter Group 1")
    assert found[0] == "AdamW (" and found[-1] == ")"
    assert found[1:first] == ["    skip_nonfinite: True", "    backend: reference"]
    assert found.count("    state_dtype: torch.float32") == 2  # of each group
    assert "    max_grad_norm: 2.0" in found[first:second] and "    ema_decay: 0.5" in found[first:second]
    assert not any("max_grad_norm" in line for line in found[second:]) and "    ema_decay: 0.5" in found[second:]


def test_repr_shows_each_option_of_the_whole() -> None:
    for name, default in DEFAULTS.items():
        group = norm_groups(SimpleNamespace(group_name="stages"))
        value = {"backend": "cpu", "norm_group": group}.get(name, True)
        assert value != default
        assert lines(AdamW(parameters([(2,)]), **{name: value}))[1] == f"    {name}: {value}"  # type: ignore[misc]

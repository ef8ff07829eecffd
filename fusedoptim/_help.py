"""What ``help()``, ``inspect.signature()`` and ``repr()`` say of an optimizer's options, beside what torch's would."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from ._options import DEFAULTS, StepOptions
from ._rule import GROUP_OPTIONS

#: The line of a docstring that the options' own texts take the place of.
_REFERENCE = re.compile(r"^( *)options: see :class:`fusedoptim\.StepOptions`\.$", re.M)


def complete(cls: type) -> None:
    """Lists the options in an optimizer's docstring and in the signature of its constructor, where it has these."""
    own = vars(cls)
    if own.get("__doc__") is not None and StepOptions.__doc__ is not None:  # python -OO has neither
        cls.__doc__ = _REFERENCE.sub(lambda line: _texts(line[1]), own["__doc__"])
    if "__init__" in own:
        _spell_out(own["__init__"])


@functools.cache
def _texts(indent: str) -> str:
    of_options = inspect.cleandoc(StepOptions.__doc__ or "").partition("\nArgs:\n")[2]
    return textwrap.indent(inspect.cleandoc(of_options), indent)


def _spell_out(constructor: Any) -> None:
    """``**options: Unpack[StepOptions]`` as what it stands for. Types are real ones: the names in annotations that are
    texts would not be found in another's module."""
    try:
        signature = inspect.signature(constructor)
    except (TypeError, ValueError, NameError):  # a user's, which may be anything
        return
    parameters = list(signature.parameters.values())
    last = parameters.pop() if parameters else None
    if last is not None and last.kind is last.VAR_KEYWORD and "StepOptions" in str(last.annotation):
        constructor.__signature__ = signature.replace(parameters=[*parameters, *_parameters()])


@functools.cache
def _parameters() -> list[inspect.Parameter]:
    """Of the options."""
    defaults = {**GROUP_OPTIONS, **DEFAULTS}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in typing.get_type_hints(StepOptions).items()
    ]


def representation(of_torch: str, options: Mapping[str, Any]) -> str:
    """torch's text of an optimizer, with what it has of its own."""
    head, *lines = of_torch.split("\n")
    chosen = [f"    {name}: {value}" for name, value in options.items() if value != DEFAULTS.get(name)]
    return "\n".join([head, *chosen, *lines])

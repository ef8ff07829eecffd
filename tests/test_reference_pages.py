"""The pages that pdoc makes of the docstrings, by the command in a guide; and that all that is public has one."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fusedoptim

GUIDE = Path(__file__).parent.parent / "fusedoptim" / "guides" / "api_reference.md"
COMMAND = shlex.split(re.findall(r"^pdoc .*$", GUIDE.read_text(), re.M)[0])[1:]
MODULES = [word for word in COMMAND if re.fullmatch(r"fusedoptim[\w.]*", word)]


def names(module: Any) -> list[str]:
    """What a module exports: what its ``__all__`` says, or its own functions and classes."""
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [n for n in own if not n.startswith("_")])


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that this package defines, of the class and of those above it."""
    for of in cls.__mro__:
        if of.__module__.partition(".")[0] == "fusedoptim":
            for name, value in vars(of).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                field = name in getattr(of, "__dataclass_fields__", ())  # its default is not a method
                if not name.startswith("_") and inspect.isroutine(function) and not field:
                    yield f"{of.__name__}.{name}", function


def without_docstring(module: Any) -> set[str]:
    public = {name: getattr(module, name) for name in names(module)}
    classes = [value for value in public.values() if inspect.isclass(value)]
    everything = [(module.__name__, module), *public.items(), *(m for cls in classes for m in members(cls))]
    return {name for name, value in everything if not (value.__doc__ or "").strip()}


@pytest.mark.parametrize("name", MODULES)
def test_all_that_is_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert names(module)
    assert without_docstring(module) == set()


def test_a_missing_docstring_is_noticed() -> None:
    class Silent:
        def said(self) -> None:
            """A text."""

        def unsaid(self) -> None: ...

        @property
        def value(self) -> int:
            return 1

    Silent.__module__ = "fusedoptim.own"
    module = type(inspect)("own", "A module.")
    module.__dict__.update(Silent=Silent, __all__=["Silent"])
    assert without_docstring(module) == {"Silent", "Silent.unsaid", "Silent.value"}


def test_every_public_module_is_among_the_pages() -> None:
    package = GUIDE.parent.parent
    found = {f"fusedoptim.{path.stem}" for path in package.glob("[!_]*.py")} | {"fusedoptim", "fusedoptim.gallery"}
    #: A module with one class, which the package exports.
    families = {f"fusedoptim.{name}" for name in ("adagrad", "adam", "norm_adaptive", "rmsprop", "sgd")}
    assert set(MODULES) == found - families


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The texts by file name, made with warnings as errors."""
    command_line = pytest.importorskip("pdoc.__main__")
    folder = tmp_path_factory.mktemp("reference")
    show = warnings.showwarning
    try:
        command_line.cli([*COMMAND[: COMMAND.index("-o")], "-o", str(folder)])
    finally:
        warnings.showwarning = show
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def test_each_module_has_a_page_with_all_of_its_names(pages: dict[str, str]) -> None:
    assert set(pages) == {"index.html", *(f"{name.replace('.', '/')}.html" for name in MODULES)}
    for name in MODULES:
        page = pages[f"{name.replace('.', '/')}.html"]
        for public in names(importlib.import_module(name)):
            assert f'id="{public}"' in page, f"{name}.{public}"


def is_inherited(anchor: str) -> bool:
    """pdoc takes any word in a class's text that is an inherited member, such as a state named ``step``, for that
    member, which it writes at the class above: such a link leads to the page alone."""
    of, _, member = anchor.partition(".")
    cls = getattr(fusedoptim, of, None)
    return inspect.isclass(cls) and member not in vars(cls) and hasattr(cls, member)


def test_links_within_the_pages_lead_somewhere(pages: dict[str, str]) -> None:
    count = 0
    for name, page in pages.items():
        for link in re.findall(r'href="([^":$]+)"', page):
            to, _, anchor = html.unescape(link).partition("#")
            target = (Path("/", name).parent / to).resolve().relative_to("/") if to else Path(name)
            assert str(target) in pages, f"{name}: {link}"
            assert not anchor or f'id="{anchor}"' in pages[str(target)] or is_inherited(anchor), f"{name}: {link}"
            count += 1
    assert count > 100


def test_no_markup_is_left_over(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert not re.search(r":(class|func|meth|attr|mod):|\.\. math::", page), name

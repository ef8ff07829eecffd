"""How the sources hang together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fusedoptim"
FOLDERS = ("benchmarks", "csrc", "fusedoptim", "tests")
SUFFIXES = (".py", ".pyi", ".h", ".cuh", ".cpp", ".cu", ".c")
LINES = 400


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: set[str]) -> set[str]:
    """The package's modules that one imports, within functions and for types as well."""
    found: set[str] = set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= names & modules
            if not names <= modules:
                found.add(origin)
    return found & modules - {module_of(path)}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next one, the last the first; [] if there are none."""
    done: set[str] = set()

    def look(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if found := look(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := look(module, []))), [])


def test_modules_import_each_other_in_no_circle() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    modules = {module_of(path) for path in paths}
    imports = {module_of(path): imported(path, modules) for path in paths}
    assert "fusedoptim._rule" in imports["fusedoptim.adam"] and "fusedoptim.adam" in imports["fusedoptim"]
    assert circle(imports) == []


@pytest.mark.parametrize(
    ("imports", "found"),
    [({"a": {"b"}, "b": {"c"}, "c": set()}, []), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"])],
)
def test_circles_are_found(imports: dict[str, set[str]], found: list[str]) -> None:
    assert circle(imports) == found


def test_files_are_short() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    assert len(paths) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > LINES} == {}

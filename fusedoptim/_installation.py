"""What this copy of the package is: a source folder or an installed one, what was built for it, and how to build it
again."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from ._digest import sources

PACKAGE = Path(__file__).parent
NAME = __name__.partition(".")[0]
#: The folder with all sources, if this copy lies in it; None for an installed one.
SOURCE_FOLDER = PACKAGE.parent if (PACKAGE.parent / "csrc" / "module.cpp").exists() else None


def build_report() -> dict[str, str | None]:
    """What the build wrote about itself: torch's version, the sources' digest, and why kernels were left out."""
    try:
        report: dict[str, str | None] = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return report


def build_again(**environment: str) -> str:
    """A command for a shell, in any folder, that builds this copy again; where its sources are not known, or nothing
    here can install, a sentence with one."""
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    before, install = _installer()
    missing = " ".join(shlex.quote(requirement) for requirement in _missing())
    first = f"{before}{install} {missing} && " if missing else before
    if SOURCE_FOLDER is not None:
        return f"{first}{settings}{install} --no-build-isolation -e {shlex.quote(str(SOURCE_FOLDER))}"
    again, origin = f"{first}{settings}{install} --no-build-isolation --force-reinstall --no-deps", _origin()
    return f"{again} {shlex.quote(origin)}" if origin else f"in the folder with fusedoptim's sources: {again} ."


def _installer() -> tuple[str, str]:
    """The command that installs into this Python's environment, and what has to come before it. Environments that uv
    makes have no pip."""
    python = shlex.quote(sys.executable or "python")
    pip = f"{python} -m pip install"
    if _is_here("pip"):
        return "", pip
    if shutil.which("uv") is not None:
        return "", f"uv pip install --python {python}"
    if _is_here("ensurepip"):
        return f"{python} -m ensurepip && ", pip
    return f"{python} has no pip: install it (Debian, Ubuntu: apt-get install python3-pip), then ", pip


def _missing() -> list[str]:
    """What building needs beside torch, as far as it is not here. Older versions of setuptools make no wheel without
    the package of that name."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("setuptools") or "")
    except importlib.metadata.PackageNotFoundError:
        found = None
    fits = found is not None and (int(found[1]), int(found[2])) >= (70, 1)
    return [*([] if fits else ["setuptools>=70.1"]), *([] if _is_here("ninja") else ["ninja"])]


def _is_here(module: str) -> bool:
    # importlib.util would ask setuptools as well, which reloads distutils at the mere name of pip.
    return PathFinder.find_spec(module) is not None


def _origin() -> str | None:
    """What pip installed this copy from and can build again, as pip noted it: a folder or an archive of sources."""
    for distribution in importlib.metadata.distributions(name=NAME, path=[str(PACKAGE.parent)]):
        try:
            url: str = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        except ValueError:
            continue
        path = Path(url2pathname(urlparse(url).path))
        if url.startswith("file:") and path.exists() and path.suffix != ".whl":
            return str(path)
    return None


def wheel() -> str | None:
    """The tag of the wheel that this copy was installed from, such as cp311-cp311-manylinux_2_28_x86_64; None if it was
    built where it is, which makes a wheel for linux_x86_64 or the like."""
    for distribution in importlib.metadata.distributions(name=NAME, path=[str(PACKAGE.parent)]):
        found = re.search(r"^Tag: (\S+-manylinux\S+)$", distribution.read_text("WHEEL") or "", re.M)
        return found[1] if found else None
    return None


def other_copy() -> Path | None:
    """Another copy of the package, which Python would import if this one did not come before it."""
    folders = [folder for folder in sys.path if Path(folder).resolve() != PACKAGE.parent.resolve()]
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(NAME, folders) if find is not None else None
        if spec is not None and spec.origin is not None and Path(spec.origin).parent.resolve() != PACKAGE.resolve():
            return Path(spec.origin).parent
    return None


def not_built(cause: str | None) -> str:
    return f"they were not built: {cause or 'the build left no note of it'}. To build again: {build_again()}"


def has_library() -> bool:
    """Whether a compiled library for this Python is here. An editable installation of another clone offers its own
    where one is missing, which may not fit."""
    return any((PACKAGE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def absent() -> str:
    """Why there is no compiled library, and the remedy."""
    cause = build_report().get("cpu")
    if cause is not None:
        return not_built(cause)
    if SOURCE_FOLDER is None:
        return f"no library for Python {platform.python_version()} is in {PACKAGE}. To build one: {build_again()}"
    other = other_copy()
    elsewhere = f"the installed copy lies in {other}: run Python in another folder, or " if other else ""
    return (
        f"this is the source folder {PACKAGE}, without a library for Python {platform.python_version()}; "
        f"{elsewhere}build one here: {build_again()}"
    )


def unloadable(error: ImportError) -> str:
    """Why the compiled library cannot be loaded, and the remedy."""
    return (
        f"the library, built with torch {build_report().get('torch', 'unknown')}, does not load under torch "
        f"{torch.__version__} ({error}); torch >= 2.10 is needed, or build again: {build_again()}"
    )


def mismatch(library: str | None, made_from: str | None) -> str | None:
    """Why a library is not one of this copy's, and the remedy; None if it is. ``made_from`` is the digest of its
    sources, None if it has none. An installed copy compares with what its build noted, a source folder with what lies
    there."""
    expected = build_report().get("sources") if SOURCE_FOLDER is None else sources(SOURCE_FOLDER)
    if expected in (None, made_from):
        return None
    return (
        f"{library} was built from other sources than this copy's (their digest is {made_from or 'unknown'}, here it "
        f"is {expected}), and the two may not fit together. Build again: {build_again()}"
    )

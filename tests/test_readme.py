"""The README, the guides and the other documents: Python snippets run as they stand, links lead somewhere, lists are
complete."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import context

import fusedoptim

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "fusedoptim" / "guides").glob("*.md"))
DOCUMENTS = [README, *(p for top in ("benchmarks", "csrc", "fusedoptim") for p in sorted((ROOT / top).rglob("*.md")))]
#: A marker in a comment may stand right before a block: "gpu" or "torchrun".
BLOCK = re.compile(r"(?:<!-- (?P<marker>\w+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
HEADING = re.compile(r"^#+ (.+)$", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.M)
#: Now and then gloo's threads end a process that runs down with an abort, with torch's optimizers as well.
WITHOUT_RUNNING_DOWN = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def snippets() -> list:
    found = []
    for path in (README, *GUIDES):
        for i, block in enumerate(BLOCK.finditer(path.read_text()), 1):
            marks = [pytest.mark.gpu] if block["marker"] == "gpu" else []
            found.append(pytest.param(block["code"], block["marker"], id=f"{path.stem} {i}", marks=marks))
    return found


def test_every_python_block_is_found() -> None:
    assert len(GUIDES) > 10
    assert len(snippets()) == sum(path.read_text().count("```python") for path in DOCUMENTS)
    assert all(s.values[1] in (None, "gpu", "torchrun") for s in snippets())


def _launched(file: Path) -> tuple[int, str]:
    """Exit status and output."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(file)],
        cwd=file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(file.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.returncode, result.stdout + (result.stderr if result.returncode else "")


def _forked(file: Path) -> tuple[int, str]:
    """In a process that comes with the package and torch, whose import is most of what a snippet waits for."""
    process = context().Process(target=_as_program, args=(file,))
    process.start()
    process.join(300)
    process.kill()
    out, err = ((file.parent / name).read_text() for name in ("out", "err"))
    return process.exitcode, out + (err if process.exitcode else "")


def _as_program(file: Path) -> None:
    """In a process of its own, as if Python had been started with the file."""
    os.chdir(file.parent)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ["TMPDIR"] = str(file.parent)
    torch.set_num_threads(1)
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize(("code", "marker"), snippets())
def test_it_runs(code: str, marker: str | None, tmp_path: Path) -> None:
    for module in IMPORT.findall(code):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    file = tmp_path / "snippet.py"
    file.write_text(code + (WITHOUT_RUNNING_DOWN if marker == "torchrun" else ""))
    status, output = _launched(file) if marker == "torchrun" else _forked(file)
    assert status == 0, output
    assert output, "a snippet shows what it did"
    if marker == "torchrun":
        sums = re.findall(r"rank \d: sum of weights (-?[\d.]+(?:e-?\d+)?)", output)  # lines of two may mix
        assert len(sums) == 2 and sums[0] == sums[1]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+://", link):
            continue
        to, _, anchor = link.partition("#")
        target = path.parent / to if to else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text()) == []


def test_a_broken_link_is_noticed() -> None:
    text = "[a](no.md) [b](README.md#no) [c](#no) [d](README.md#install) [e](#install) [f](https://x.org) `[g](no)`"
    assert broken_links(README, text) == ["no.md", "README.md#no", "#no"]


def test_the_readme_leads_to_every_document() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(README.read_text())}
    notes = {path for path in DOCUMENTS if path.name == "NOTES.md"}
    assert {README, *linked} >= set(DOCUMENTS) - notes


def test_the_readme_lists_every_option_of_a_step() -> None:
    section = re.search(r"^## Options$.*?(?=^## )", README.read_text(), re.M | re.S)
    assert section
    listed = re.findall(r"^\| `(\w+)=", section[0], re.M)
    assert listed == list(fusedoptim.StepOptions.__annotations__)

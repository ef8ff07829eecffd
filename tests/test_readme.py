"""The README's Python snippets run as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: A marker in a comment may stand right before a block: "gpu" or "torchrun".
BLOCK = re.compile(r"(?:<!-- (?P<marker>\w+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^##+ (.+)$", re.M)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.M)


def snippets() -> list:
    text = (ROOT / "README.md").read_text()
    found = []
    for block in BLOCK.finditer(text):
        title = HEADING.findall(text, 0, block.start())[-1]
        marks = [pytest.mark.gpu] if block["marker"] == "gpu" else []
        name = f"{title} {sum(title in f.id for f in found) + 1}"
        found.append(pytest.param(block["code"], block["marker"], id=name, marks=marks))
    return found


def test_every_python_block_is_found() -> None:
    assert len(snippets()) == (ROOT / "README.md").read_text().count("```python")
    assert all(s.values[1] in (None, "gpu", "torchrun") for s in snippets())


@pytest.mark.parametrize(("code", "marker"), snippets())
def test_it_runs(code: str, marker: str | None, tmp_path: Path) -> None:
    for module in IMPORT.findall(code):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    file = tmp_path / "snippet.py"
    file.write_text(code)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if marker == "torchrun" else []
    result = subprocess.run(
        [sys.executable, *launcher, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout, "a snippet shows what it did"
    if marker == "torchrun":
        sums = re.findall(r"rank \d: sum of weights (-?[\d.]+(?:e-?\d+)?)", result.stdout)  # lines of two may mix
        assert len(sums) == 2 and sums[0] == sums[1]

"""The table of fusedoptim/guides/which_options.md: bytes are what ``memory()`` counts, times are those of another
guide's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fusedoptim import AdamW, RMSprop

GUIDES = Path(__file__).parent.parent / "fusedoptim" / "guides"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: The row of low_precision.md's table of times, by what is set.
STORAGES = {
    ("fp32", ""): "fp32",
    ("bf16", 'master="remainder"'): "remainder, bf16 states",
    ("bf16", 'master="remainder", state_dtype=torch.float32'): "remainder, fp32 states",
    ("bf16", 'master="remainder", state_dtype="int8"'): "remainder, 8-bit states",
    ("bf16", 'master="remainder8", state_dtype="int8"'): "remainder8, 8-bit states",
}


def rows() -> list[list[str]]:
    text = (GUIDES / "which_options.md").read_text()
    table = re.search(r"<!-- which options -->\n(.*?)<!-- end", text, re.S)
    assert table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]


def times() -> dict[str, list[str]]:
    """By storage: on the H100, over fp32's there, on the CPU, over fp32's there."""
    table = re.search(r"<!-- results: storages -->\n(.*?)<!-- end", (GUIDES / "low_precision.md").read_text(), re.S)
    assert table
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table[1].splitlines() if line.startswith("|")]
    return {row[0]: row[2:] for row in cells[2:]}


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[1]} {row[2]}")
def test_bytes(row: list[str]) -> None:
    dtype = DTYPES[row[1]]
    p = torch.nn.Parameter(torch.empty(4096, 4096, dtype=dtype, device="meta"))
    optimizer = eval(row[2].strip("`"), {"torch": torch, "AdamW": AdamW, "RMSprop": RMSprop, "params": [p]})
    found = 2 * dtype.itemsize + sum(optimizer.memory().to_come.values()) / p.numel()
    assert row[3] == f"{found:.2f}".removesuffix(".00")


def test_times_are_those_of_the_results() -> None:
    known, count = times(), 0
    for what, dtype, code, _, _, time in rows():
        if time:
            options = re.sub(r"^`\w+\(params(?:, )?|\)`$", "", code)
            of = known[STORAGES[dtype, options]]
            assert float(time) == float(of[3] if "offload" in what else of[1])
            count += 1
    assert count == 5


def test_bytes_of_a_rank() -> None:
    """Of 64, of a model of 7e9 parameters."""
    text = (GUIDES / "which_options.md").read_text()
    by_dtype = {row[1]: float(row[3]) for row in rows() if "gradients" in row[0]}
    line = re.search(r"^\| bytes on each of 64 ranks, 7e9 parameters \| (\S+) \| (\S+) \|$", text, re.M)
    assert line
    assert [f"{by_dtype[of] * 7e9 / 64:.3g}" for of in ("fp32", "bf16")] == [f"{float(x):.3g}" for x in line.groups()]

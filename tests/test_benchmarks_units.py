"""How numbers are written in the benchmarks' tables and pictures."""

from __future__ import annotations

import pytest

from benchmarks import tables
from benchmarks.common import units
from benchmarks.measure.results import OURS, Results


@pytest.mark.parametrize(
    "value,text",
    [
        *((22100.4, "22100"), (3350.0, "3350"), (999.6, "1000"), (59.0, "59")),
        *((0.979, "0.979"), (1.2e-5, "0.000012"), (0.0, "0")),
    ],
)
def test_numbers_have_no_power_of_ten(value: float, text: str) -> None:
    assert units.number(value) == text


@pytest.mark.parametrize(
    "seconds,text",
    [
        *((2.21e-5, "22.1 us"), (5.07e-7, "507 ns"), (9.999e-7, "1 us"), (1e-6, "1 us"), (1.19e-9, "1.19 ns")),
        *((3.24e-10, "324 ps"), (4e-14, "0.04 ps"), (0.0643, "64.3 ms"), (7.0, "7 s"), (1234.0, "1230 s")),
        *((-2.5e-5, "-25 us"), (0.0, "0 ps")),
    ],
)
def test_a_time_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_a_slope_of_22_microseconds_is_called_that() -> None:
    rows = [
        {"curve": "tensors", "says": "number of tensors", "over": "tensors", "tensors": n}
        | {"contenders": {OURS: {"ms": {"median": 1 + 0.0221 * n}}}}
        for n in (1, 10, 100)
    ]
    results = Results({}, 3)
    results.scaling = rows
    assert tables.scaling(results).splitlines()[-1] == "| fusedoptim: number of tensors | 22.1 us per tensor |"


def test_a_gpus_bandwidth_is_written_out() -> None:
    row = {"optimizer": "AdamW", "dtype": "fp32", "case": "1G", "condition": "kept"}
    row |= {"contenders": {OURS: {"ms": {"median": 12.8}, "gb_s": 3352.0}}}
    assert "| 12.8 | 3350 |" in tables.comparison(Results({"device": "cuda"}, 1), [row])

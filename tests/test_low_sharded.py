"""Stochastic rounding, masters and 8 bits over shards and replicas: the bits of one process that has everything."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from low_layouts import CASES, Part, alone, assert_a_part, params_of
from ranks import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STEPS = 3
LAYOUTS = {
    2: ["fsdp2", "in_columns", "tensor_parallel", "ddp"],
    4: ["fsdp2", "in_columns", "tensor_parallel", "both", "hsdp"],
}


def check_layout(layout: str) -> None:
    for name, case in CASES.items():
        for backend in ("cpu", "reference") if name.startswith("8 bits") else ("cpu",):
            part = Part(layout, case.dtype)
            named = name != "sgd"
            optimizer = case.make(params_of(part.model, named), backend=backend)
            part.advance(optimizer, range(STEPS))
            assert_a_part(part, optimizer, alone(name, STEPS, named), f"{name}, {layout}, {backend}")


@pytest.mark.parametrize(("world", "layout"), [(world, layout) for world in LAYOUTS for layout in LAYOUTS[world]])
def test_bits_of_one_process(world: int, layout: str) -> None:
    run(world, check_layout, layout)

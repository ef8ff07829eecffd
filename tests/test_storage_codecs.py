"""Numbers in fewer bits on the CPU, in every instruction set, and in the reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import spelled
import torch
from cases import CAPABILITIES, assert_same_raw
from storage_tests import *  # noqa: F403
from storage_tests import BLOCKS, SHAPES_IN_BLOCKS, any_bits, as_bf16, as_int8, for_blocks, halves, random_bits

from fusedoptim import _native, reference


@pytest.fixture(params=[*CAPABILITIES, "reference"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "reference":
        return SimpleNamespace(backend="reference", slow=True)
    assert _native._C.set_cpu_capability(request.param)
    return SimpleNamespace(backend="cpu", slow=False)


# ---- the reference against another spelling of the formulas ----


@pytest.mark.parametrize("storage", ["bf16_stochastic", "bf16_remainder", "bf16_remainder8"])
def test_the_reference_encodes_as_the_formulas_say(storage: str) -> None:
    x = any_bits()[: 1 << 20]
    random = random_bits(x, 0)
    elements, extra = reference.encode(storage, x, random)
    expected, rest = spelled.encode(storage, spelled.bits(x), random.numpy())
    assert_same_raw(elements, as_bf16(expected))
    if rest is None:
        assert extra is None
    else:
        assert extra is not None
        assert_same_raw(extra, as_bf16(rest) if rest.itemsize == 2 else as_int8(rest))


@pytest.mark.parametrize("storage", ["bf16_remainder", "bf16_remainder8"])
def test_the_reference_decodes_as_the_formulas_say(storage: str) -> None:
    upper, rest = halves(1)
    extra, unit = (rest.view(torch.bfloat16), 1) if storage == "bf16_remainder" else (rest.to(torch.int8), 256)
    kept = rest.numpy() if unit == 1 else extra.numpy()
    expected = spelled.join(upper.numpy().view(np.uint16), kept.astype(np.int64) * unit)
    found = reference.decode(storage, upper.view(torch.bfloat16), extra)
    assert np.array_equal(spelled.bits(found), expected)


@pytest.mark.parametrize("storage", BLOCKS)
def test_the_reference_has_the_blocks_of_the_formulas(storage: str) -> None:
    squares = storage.startswith("q8_squares")
    for shape in SHAPES_IN_BLOCKS:
        x = for_blocks(shape)
        x = x * x if squares else x
        random = random_bits(x, 1)
        codes, scales = reference.encode(storage, x, random)
        decoded = reference.decode(storage, codes, scales)
        rows = [t.reshape(shape[0], -1).numpy() for t in (x, random, codes, decoded)]
        for r, (of_x, of_random, of_codes, of_decoded) in enumerate(zip(*rows, strict=True)):
            for b, first in enumerate(range(0, len(of_x), spelled.BLOCK)):
                part = slice(first, first + spelled.BLOCK)
                own = of_random[part] if storage.endswith("_stochastic") else None
                expected, scale = spelled.encode_block(of_x[part], squares, own)
                assert np.array_equal(of_codes[part], expected), (shape, r, b)
                assert spelled.bits(scales[r, b]) == spelled.bits(scale), (shape, r, b)
                read = spelled.decode_block(expected, scale, squares)
                assert np.array_equal(of_decoded[part], read, equal_nan=True), (shape, r, b)

"""Sets of parameters to step, as shapes.

Those of models follow from the models' published configurations; the tests compare their element counts with the
published ones. A shard is what the first of 8 processes holds when each tensor is split along its first dimension, as
fully sharded training does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Case:
    """``groups`` is the number of parameter groups that the shapes are dealt to. Of each ``live`` rows of a gradient
    only the first has elements other than zero, at every step the same, so that the others' states stay zero."""

    name: str
    shapes: Shapes
    groups: int = 1
    live: int = 1

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2(layers: int, d: int) -> Iterator[Shape]:
    """Radford et al. 2019; the names and shapes of the released weights, with the output tied to the embedding."""
    yield from ((50257, d), (1024, d))
    for _ in range(layers):
        yield from ((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,))  # norm, attention
        yield from ((d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,))  # norm, MLP
    yield from ((d,), (d,))


def llama3_8b() -> Iterator[Shape]:
    """meta-llama/Meta-Llama-3-8B, config.json: 32 layers, 8 key and value heads of 128, an untied output."""
    d, hidden, key_value, vocabulary = 4096, 14336, 8 * 128, 128256
    yield (vocabulary, d)
    for _ in range(32):
        yield from ((d, d), (key_value, d), (key_value, d), (d, d))
        yield from ((hidden, d), (hidden, d), (d, hidden), (d,), (d,))
    yield from ((d,), (vocabulary, d))


def vit_l16() -> Iterator[Shape]:
    """Dosovitskiy et al. 2021, as torchvision.models.vit_l_16 has it, with 1000 classes."""
    d, hidden = 1024, 4096
    yield from ((1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d))
    for _ in range(24):
        yield from ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,))
        yield from ((d,), (d,), (hidden, d), (hidden,), (d, hidden), (d,))
    yield from ((d,), (d,), (1000, d), (1000,))


def resnet50() -> Iterator[Shape]:
    """He et al. 2015, as torchvision.models.resnet50 has it."""

    def convolution(outputs: int, inputs: int, size: int) -> Iterator[Shape]:
        yield from ((outputs, inputs, size, size), (outputs,), (outputs,))  # and its batch norm

    yield from convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(width, inputs, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


def olmoe_1b_7b() -> Iterator[Shape]:
    """A mixture of experts, allenai/OLMoE-1B-7B-0924, config.json: 16 layers of 64 experts, each of three matrices."""
    d, hidden, experts, vocabulary = 2048, 1024, 64, 50304
    yield (vocabulary, d)
    for _ in range(16):
        yield from ((d, d),) * 4
        yield from ((d,),) * 2  # norms of queries and keys
        yield (experts, d)
        for _ in range(experts):
            yield from ((hidden, d), (hidden, d), (d, hidden))
        yield from ((d,),) * 2
    yield from ((d,), (vocabulary, d))


def shard(shapes: Iterator[Shape], of: int) -> Iterator[Shape]:
    for first, *rest in shapes:
        yield (-(-first // of), *rest)


def odd_sizes(count: int, largest: int) -> Iterator[Shape]:
    """Odd sizes, evenly spread over the orders of magnitude, always the same ones."""
    draw = random.Random(0)
    for _ in range(count):
        yield (int(math.exp(draw.uniform(0.0, math.log(largest)))) | 1,)


def evenly(tensors: int, elements: int) -> Case:
    """A case for scaling curves: tensors of equal size."""
    return Case(f"{tensors} of {elements // tensors}", ((elements // tensors,),) * tensors)


CASES = {
    case.name: case
    for case in (
        Case("64M", ((1 << 26,),)),
        Case("1G", ((1 << 30,),)),
        Case("gpt2-small", tuple(gpt2(12, 768))),
        Case("gpt2-xl", tuple(gpt2(48, 1600))),
        Case("llama3-8b", tuple(llama3_8b())),
        Case("llama3-8b-shard", tuple(shard(llama3_8b(), 8))),
        Case("vit-l16", tuple(vit_l16())),
        Case("resnet50", tuple(resnet50())),
        Case("olmoe", tuple(olmoe_1b_7b())),
        Case("olmoe-shard", tuple(shard(olmoe_1b_7b(), 8))),
        Case("300x1024", ((1024,),) * 300),
        Case("2000x64", ((64,),) * 2000),
        Case("2000x1024", ((1024,),) * 2000),
        Case("5000-odd", tuple(odd_sizes(5000, 20_000))),
        Case("465-groups", ((64,),) * 465, groups=465),
        # GPT-2 XL's, of whose tokens a batch has few.
        Case("embedding-95", ((50257, 1600),), live=20),
    )
}

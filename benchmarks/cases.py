"""Sets of parameters to step, as shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """``groups`` is the number of parameter groups that the shapes are dealt to."""

    name: str
    shapes: tuple[Shape, ...]
    groups: int = 1

    @property
    def elements(self) -> int:
        return sum(torch.Size(s).numel() for s in self.shapes)

    def parameters(self, dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
        """Random parameters with random gradients."""
        g = torch.Generator().manual_seed(seed)
        params = []
        for shape in self.shapes:
            p = torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype))
            p.grad = torch.randn(shape, generator=g).to(dtype)
            params.append(p)
        return params

    def grouped(self, params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        per_group = -(-len(params) // self.groups)
        return [
            {"params": params[i : i + per_group], "lr": 1e-3 * (1 + n)}
            for n, i in enumerate(range(0, len(params), per_group))
        ]


def _gpt2_small() -> tuple[Shape, ...]:
    d = 768
    block: tuple[Shape, ...] = (
        *((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)),
        *((d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)),
    )
    return ((50257, d), (1024, d), *(block * 12), (d,), (d,))


CASES = {
    case.name: case
    for case in (
        Case("64M", ((1 << 26,),)),
        Case("gpt2-small", _gpt2_small()),
        Case("2000x64", ((64,),) * 2000),
        Case("2000x1024", ((1024,),) * 2000),
        Case("465 groups", ((64,),) * 465, groups=465),
    )
}

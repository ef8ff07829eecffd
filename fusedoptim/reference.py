"""The specification: each update rule as a short eager function, to be read beside its paper.

The formulas are those of torch.optim's own for-loop code, operation by operation, hence with its roundings, with one
exception: the square root is correctly rounded, as IEEE 754, CUDA and Triton have it (torch's on the CPU is MKL's,
which is off by one unit in the last place for a fifth of all fp32 values). Every kernel gives the bits of these
functions.

Each function updates ``p`` and the tensors in ``s`` in place. All tensors are contiguous and of the compute dtype: fp64
for fp64 parameters, fp32 for all others. 16-bit tensors are converted before and rounded once after. States that are
one number are Python floats in ``s``, and are set there, to be rounded to fp32. ``t`` is the number of the step, from
1, and ``h`` the parameter group, its values Python floats. Only lr may be a tensor, which keeps torch's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._rule import Group
from .rule_functions import correctly_rounded_sqrt, double, norm, sum_of_squares, to_fp32

__all__ = [
    "adagrad",
    "adam",
    "clipped",
    "correctly_rounded_sqrt",
    "decode",
    "encode",
    "global_norm",
    "half_of_slot",
    "norm_adaptive",
    "norm_of",
    "random_stream",
    "random_word",
    "rmsprop",
    "sgd",
    "sum_of_squares",
]

States = dict[str, Any]


def adam(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101) and AMSGrad (arXiv:1904.09237)."""
    lr, (beta1, beta2), weight_decay = scalar_lr(h), h["betas"], h["weight_decay"]
    if h["maximize"]:
        g = -g
    if weight_decay != 0:
        if h["decoupled_weight_decay"]:
            p.mul_(1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)
    s["exp_avg"].lerp_(g, 1 - beta1)
    s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    second = s["exp_avg_sq"]
    if h["amsgrad"]:
        second = torch.maximum(s["max_exp_avg_sq"], second, out=s["max_exp_avg_sq"])
    corrects = h.get("bias_correction", True)
    bias_correction1 = 1 - beta1**t if corrects else 1.0
    bias_correction2 = 1 - beta2**t if corrects else 1.0
    denom = (correctly_rounded_sqrt(second) / bias_correction2**0.5).add_(h["eps"])
    p.addcdiv_(s["exp_avg"], denom, value=-(lr / bias_correction1))


def sgd(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """SGD with momentum (Sutskever et al., ICML 2013). The first gradient enters the buffer undamped."""
    momentum = h["momentum"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    if momentum != 0:
        if s["momentum_buffer"] is None:
            s["momentum_buffer"] = g.clone()
        else:
            s["momentum_buffer"].mul_(momentum).add_(g, alpha=1 - h["dampening"])
        g = g.add(s["momentum_buffer"], alpha=momentum) if h["nesterov"] else s["momentum_buffer"]
    p.add_(g, alpha=-scalar_lr(h))


def rmsprop(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """RMSprop (Hinton, 2012), centered (Graves, arXiv:1308.0850), with momentum. eps is added to the root, or before it
    as in TensorFlow."""
    lr, alpha = scalar_lr(h), h["alpha"]
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["square_avg"].mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = s["square_avg"]
    if h["centered"]:
        s["grad_avg"].lerp_(g, 1 - alpha)
        variance = variance.addcmul(s["grad_avg"], s["grad_avg"], value=-1)
    if h.get("eps_inside_root", False):
        denom = correctly_rounded_sqrt(variance.add(h["eps"]))
    else:
        denom = correctly_rounded_sqrt(variance).add_(h["eps"])
    if h["momentum"] > 0:
        s["momentum_buffer"].mul_(h["momentum"]).addcdiv_(g, denom)
        p.add_(s["momentum_buffer"], alpha=-lr)
    else:
        p.addcdiv_(g, denom, value=-lr)


def adagrad(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011)."""
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        g = g.add(p, alpha=h["weight_decay"])
    s["sum"].addcmul_(g, g, value=1)
    denom = correctly_rounded_sqrt(s["sum"]).add_(h["eps"])
    p.addcdiv_(g, denom, value=-(scalar_lr(h) / (1 + (t - 1) * h["lr_decay"])))


def norm_adaptive(p: Tensor, g: Tensor, s: States, t: float, h: Group) -> None:
    """lr divided by a moving average of the gradient's norm: ``a = beta*a + (1-beta)*||g||``,
    ``p = p*(1 - lr*weight_decay) - (lr/(a+eps))*g``, where the quotient is 0 if its divisor is. Scalars in double,
    rounded once to fp32."""
    lr, beta = double(h["lr"]), h["beta"]
    average = to_fp32(beta * s["avg_grad_norm"] + (1 - beta) * to_fp32(norm(g)))
    divisor = average + h["eps"]
    s["avg_grad_norm"] = average
    if h["maximize"]:
        g = -g
    if h["weight_decay"] != 0:
        p.mul_(to_fp32(1 - lr * h["weight_decay"]))
    p.add_(g, alpha=-to_fp32(lr / divisor if divisor != 0 else 0.0))


def global_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients, each of its compute dtype: 0-dim, fp32, or fp64 if one of them has fp64. The sums of
    squares of the tensors are added one by one, in the order of the parameters."""
    return norm_of([sum_of_squares(g) for g in grads], any(g.dtype == torch.float64 for g in grads))


def norm_of(sums: list[Tensor], wide: bool) -> Tensor:
    """The norm of tensors with these sums of squares, in fp32, or if ``wide`` in fp64."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for x in sums:
        total = total + x.to(total.device)
    return correctly_rounded_sqrt(total).to(torch.float64 if wide else torch.float32)


def clipped(g: Tensor, norm: Tensor | None, h: Group) -> Tensor:
    """The gradient that a rule gets, as torch.nn.utils.clip_grad_norm_ and then clip_grad_value_ leave it. norm: that
    of all gradients; None if no group needs it."""
    if h.get("max_grad_norm") not in (None, torch.inf):
        assert norm is not None
        g = g * torch.clamp(h["max_grad_norm"] / (norm + 1e-6), max=1.0).to(g.device, g.dtype)
    if h.get("clip_grad_value") is not None:
        limit = h["clip_grad_value"]
        if g.dtype != torch.float64:
            limit = to_fp32(limit)  # which torch refuses to do where that is infinity
        g = g.clamp(-limit, limit)
    return g


def scalar_lr(h: Group) -> Any:
    """lr as a number or a 0-dim tensor."""
    lr = h["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


# ---- how numbers are stored in fewer bits: see csrc/core/storage.h and csrc/core/random_bits.h ----


def random_stream(seed: int, parameter: int, step: int) -> int:
    """What the random bits of one parameter follow from in one step: uint64, by SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014)."""
    return _split_mix(_split_mix(_split_mix(seed) ^ parameter) ^ step)


def random_word(index: Tensor, stream: int, word: int) -> Tensor:
    """32 random bits for each element, int64.

    Args:
        index: of the elements, in the whole tensor, int64.
        word: which of a parameter's words. The lower half of the first is the parameter's, its upper half the second
            moment's; other states have the next halves, in order.
    """
    found = torch.zeros_like(index)
    for upper in torch.unique(index >> 32).tolist():
        key = _split_mix(stream ^ (word | upper << 8))
        x = (index * 0x9E3779B1 + (key & _U32)) & _U32
        x = x ^ (x >> 16)
        x = (x * 0x21F0AAAD + (key >> 32)) & _U32
        x = x ^ (x >> 15)
        x = (x * 0x735A2D97) & _U32
        found = torch.where(index >> 32 == upper, x ^ (x >> 15), found)
    return found


_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


def _split_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _U64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _U64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _U64
    return x ^ x >> 31


def half_of_slot(slot: int, second: int) -> int:
    """Which 16 bits of a parameter's words a state is rounded with, counted in halves.

    Args:
        second: the state that is the second moment; -1 without such.
    """
    return 1 if slot == second else slot + 1 if 0 <= second < slot else slot + 2


def encode(storage: str, x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored.

    Args:
        storage: how, by its name in csrc/core/storage.h.
        x: fp32, contiguous; fp64 is rounded to that first.
        random: 16 bits for each element, int64; only for what is rounded stochastically.

    Returns:
        The elements, and what is kept beside them: None if nothing is.
    """
    x = x.float()
    if storage.startswith("q8"):
        return _encode_blocks(x, storage.startswith("q8_squares"), random if storage.endswith("_stochastic") else None)
    if storage == "bf16_stochastic":
        assert random is not None
        u = _bits(x)
        return _halves(torch.where(x.isnan(), u | 0x400000, u + random) >> 16), None
    if storage in ("bf16_master", "f16_master"):
        return x.to(torch.bfloat16 if storage == "bf16_master" else torch.float16), x.clone()
    u = torch.where(x.isnan(), 0x7FC00000, _bits(x))
    if storage == "bf16_remainder":
        return _halves(u + 0x8000 >> 16), _halves(u)
    assert storage == "bf16_remainder8", storage
    u = (u + 0x7F + (u >> 8 & 1)) & 0xFFFFFF00
    return _halves(u + 0x8000 >> 16), _signed(u >> 8, 8).to(torch.int8)


def decode(storage: str, elements: Tensor, extra: Tensor | None) -> Tensor:
    """The numbers, fp32, contiguous, that are stored in elements and what is kept beside them."""
    if storage.startswith("q8"):
        assert extra is not None
        return _decode_blocks(elements.contiguous(), extra, storage.startswith("q8_squares"))
    x = elements.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if extra is None:
        return x
    extra = extra.detach().contiguous()
    if storage in ("bf16_master", "f16_master"):
        return torch.where(_bits(extra.to(elements.dtype).float()) == _bits(x), extra, x)
    rest = _signed(_bits16(extra), 16) if storage == "bf16_remainder" else extra.long() * 256
    u = _bits(x)
    rest = torch.where(((u & 0x7FFF0000) == 0) & (rest < 0), 0, rest)
    return _signed(u + rest & _U32, 32).to(torch.int32).view(torch.float32)


#: Of an 8-bit code, by whether it is of squares: bits of its mantissa, the largest, and what the largest number of a
#: block is scaled to.
BLOCK, BLOCK_FORMATS = 128, {False: (5, 127, 14.75), True: (4, 255, 63487.0)}


def _in_rows(x: Tensor) -> Tensor:
    """With a row for each index of the first dimension, padded with zeros to whole blocks: rows, blocks, 128. One
    dimension is one row."""
    rows = x.reshape(x.shape[0], x.shape[1:].numel()) if x.dim() > 1 else x.reshape(1, x.numel())
    blocks = -(-rows.shape[1] // BLOCK)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(rows.shape[0], blocks, BLOCK)


def _out_of_rows(x: Tensor, shape: torch.Size) -> Tensor:
    row = shape[1:].numel() if len(shape) > 1 else shape.numel()
    return x.flatten(1)[:, :row].reshape(shape)


def _encode_blocks(x: Tensor, squares: bool, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blocks of 128 elements of one row, each with a scale, fp32, of shape (rows, blocks of a row)."""
    mantissa, largest, top = BLOCK_FORMATS[squares]
    blocks = _in_rows(x)
    widest = (_bits(blocks) & 0x7FFFFFFF).amax(2, keepdim=True)
    number = _signed(widest, 32).to(torch.int32).view(torch.float32)
    scale = torch.where(widest == 0, 0.0, number.clamp(min=2.0**-100))
    loud = widest >= 0x7F800000
    scale = torch.where(loud, torch.nan, scale)
    # A number over a tensor is its reciprocal times the number, which rounds twice.
    inverse = torch.where(scale > 0, torch.full_like(scale, top) / scale, 0.0)
    rounding = 1 << 22 - mantissa if random is None else _in_rows(random) << 7 - mantissa
    code = (_bits(blocks.abs() * inverse + 1.0) - 0x3F800000 + rounding >> 23 - mantissa).clamp(max=largest)
    code = torch.where(loud | (inverse == 0), 0, code)
    if squares:
        code = torch.where((code == 0) & (inverse > 0) & (blocks.abs() > 0), 1, code)
    else:
        code = torch.where(_bits(blocks) >> 31 == 1, -code, code)
    return _out_of_rows(code, x.shape).to(torch.uint8 if squares else torch.int8), scale.squeeze(2)


def _decode_blocks(codes: Tensor, scales: Tensor, squares: bool) -> Tensor:
    mantissa, _, top = BLOCK_FORMATS[squares]
    blocks = _in_rows(codes.long())
    unit = (scales * torch.full_like(scales, top).reciprocal()).unsqueeze(2)
    size = (0x3F800000 + (blocks.abs() << 23 - mantissa)).to(torch.int32).view(torch.float32) - 1.0
    return _out_of_rows(torch.where(blocks < 0, -(size * unit), size * unit), codes.shape)


def _bits(x: Tensor) -> Tensor:
    """Of fp32 numbers, as int64 from 0 on."""
    return x.view(torch.int32).long() & _U32


def _bits16(x: Tensor) -> Tensor:
    return x.view(torch.int16).long() & 0xFFFF


def _halves(u: Tensor) -> Tensor:
    """The lower 16 bits, as bfloat16: other types of 16 bits cross no process group."""
    return _signed(u & 0xFFFF, 16).to(torch.int16).view(torch.bfloat16)


def _signed(u: Tensor, bits: int) -> Tensor:
    u = u & (1 << bits) - 1
    return torch.where(u >> bits - 1 == 1, u - (1 << bits), u)

"""The training program's command line."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..common.arguments import Parser, UsageError, known
from . import choices, parallel, sharding
from .gpt import GPTConfig


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """Raises UsageError for what makes no sense."""
    p = Parser(prog="python -m benchmarks.train", description=description)
    p.add_argument("--optimizer", default="AdamW", help=f"one of {', '.join(choices.SETTINGS)} (default: AdamW)")
    p.add_argument("--text", type=Path, help="a file to train on, by bytes (default: Python's standard library)")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--lr", type=float, help="the highest learning rate (default: one that suits the optimizer)")
    p.add_argument("--warmup", type=int, default=40, help="steps of linear warm-up; cosine decay to a tenth follows")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--accumulate", type=int, default=1, help="batches per step")
    p.add_argument("--max-grad-norm", type=float, default=1.0, help="clips within the step; 0 for no clipping")
    p.add_argument(
        "--ema", type=float, metavar="DECAY", help="average the weights within the step; validates them, too"
    )
    p.add_argument("--eval-every", type=int, default=100, help="steps between validations, which write checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--layers", type=int, default=GPTConfig.layers)
    p.add_argument("--width", type=int, default=GPTConfig.width)
    p.add_argument("--heads", type=int, default=GPTConfig.heads)
    p.add_argument("--context", type=int, default=GPTConfig.context)
    p.add_argument("--out", type=Path, default=Path("runs/train"), help="folder for checkpoints, history and plot")
    p.add_argument("--resume", type=Path, help="a checkpoint of this program, latest.pt or best.pt")
    p.add_argument("--amp", choices=["bf16"], help="compute the forward pass in this dtype where autocast does")
    p.add_argument("--compile", action="store_true", help="torch.compile the forward pass and the optimizer's step")
    shares = "; ".join(f"{kind}: {has}" for kind, has in sharding.KINDS.items())
    p.add_argument(
        "--shard", choices=sharding.KINDS, help=f"under torchrun, what each process has of the model; {shares}"
    )
    p.add_argument("--compare", action="store_true", help="train the same model with torch.optim, too")
    args = p.parse_args(argv)
    args.optimizer = known("--optimizer", [args.optimizer], choices.SETTINGS)[0]
    if args.lr is None:
        args.lr = choices.SETTINGS[args.optimizer][0]
    for name in ("steps", "batch", "accumulate", "eval_every", "layers", "width", "heads", "context"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(args, name)}")
    for name in ("lr", "warmup", "max_grad_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0 and finite, but is {getattr(args, name)}")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise UsageError(f"--ema must be at least 0 and below 1, but is {args.ema}")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 2**32 - 1, but is {args.seed}")
    if args.width % args.heads:
        raise UsageError(f"--width {args.width} must be a multiple of --heads {args.heads}")
    parallel.check(args.batch)
    args.shard = sharding.check(args.shard)
    if args.shard == "zero" and args.ema is not None:
        raise UsageError("--shard zero leaves a process averages of some parameters only: --ema needs another kind")
    if args.compare and args.resume:
        raise UsageError("--compare starts both models afresh: leave out --resume")
    return args

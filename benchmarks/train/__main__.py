"""``python -m benchmarks.train``: trains a small GPT on text, with any of the optimizers.

``--compare`` trains a second model beside it with torch.optim, on the same batches, and says whether the losses are the
same to the last bit. For the time, fusedoptim and the fastest that torch has step copies of the parameters, in turn;
what torch.optim's second model takes is not measured, since its for-loop is there for its bits.
Under ``torchrun --nproc_per_node N -m benchmarks.train`` N processes share every batch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import fusedoptim

from .. import witness
from ..common.arguments import UsageError
from ..common.files import make_folder, write_atomically
from ..text import Text, load_text
from . import checkpoint, choices, parallel
from . import times as train_times
from .checkpoint import Progress
from .gpt import GPT, GPTConfig


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m benchmarks.train", description=__doc__)
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
    p.add_argument("--compare", action="store_true", help="train the same model with torch.optim, too")
    args = p.parse_args(argv)
    args.optimizer = choices.canonical(args.optimizer)
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
    if args.compare and args.resume:
        raise UsageError("--compare starts both models afresh: leave out --resume")
    return args


class Learner:
    """A model, its optimizer and its schedule."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
        self.model, self.optimizer, self.args = model, optimizer, args
        wrapped = parallel.wrap(model)
        self.forward: Callable[..., Tensor] = torch.compile(wrapped) if args.compile else wrapped
        self.step: Callable[[], Any] = torch.compile(optimizer.step) if args.compile else optimizer.step
        # A run that ends within the warm-up never comes to the cosine, which must begin later.
        total = max(args.steps, args.warmup + 1)
        self.schedule = fusedoptim.warmup_cosine(optimizer, args.warmup, total, args.lr / 10)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.args.amp == "bf16"):
            return self.forward(x, y)

    def gradients(self, text: Text, step: int) -> float:
        """The loss."""
        args, total = self.args, 0.0
        self.optimizer.zero_grad()
        for micro in range(args.accumulate):
            x, y = text.batch(args.seed, step * args.accumulate + micro, args.batch, args.context)
            loss = self.loss(parallel.part(x), parallel.part(y)) / args.accumulate
            loss.backward()
            total += loss.item()
        return parallel.mean(total)

    @torch.no_grad()
    def validate(self, text: Text) -> float:
        batches = text.validation_batches(self.args.batch, self.args.context, 8)
        return statistics.fmean(self.loss(x, y).item() for x, y in batches)


class Comparison:
    """The same training with torch.optim's witness. Beside it, fusedoptim and the fastest that torch has are
    timed, each on a copy of the parameters: the model's own lie in the cache after a backward pass."""

    def __init__(self, config: GPTConfig, args: argparse.Namespace, params: list[torch.nn.Parameter]) -> None:
        model = GPT(config, args.seed)
        self.learner = Learner(model, choices.make_witness(args.optimizer, model.parameters(), args.lr), args)
        self.params = params
        ours, theirs = ([torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
        name, fastest = choices.make_fastest(args.optimizer, theirs, args.lr)
        self.timed = [("fusedoptim", choices.make(args.optimizer, ours, args.lr), ours), (name, fastest, theirs)]
        self.seconds: dict[str, list[float]] = {"fusedoptim": [], name: []}
        self.first_difference: int | None = None

    def step(self, text: Text, step: int, loss: float) -> None:
        self.check(step, loss, self.learner.gradients(text, step))
        fusedoptim.clip_grad_norm_(self.learner.model.parameters(), limit_of(self.learner.args))
        witness.witness_step(self.learner.optimizer)
        self.learner.schedule.step()

    def check(self, step: int, loss: float, other: float) -> None:
        if other != loss and self.first_difference is None:
            self.first_difference = step

    def time_steps(self, step: int) -> None:
        for i in (0, 1) if step % 2 else (1, 0):  # whoever comes second finds warm gradients
            name, optimizer, copies = self.timed[i]
            for p, q in zip(self.params, copies, strict=True):
                q.grad = p.grad
            start = time.perf_counter()
            optimizer.step()
            self.seconds[name].append(time.perf_counter() - start)


def limit_of(args: argparse.Namespace) -> float:
    """Of the gradients' norm; without one it is measured all the same."""
    return args.max_grad_norm if args.max_grad_norm > 0 else math.inf


def check_compiler() -> None:
    """Compiles something small, because torch says only then what it lacks: a C++ compiler, Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # what goes wrong inside of a compiler can be anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(
            f"--compile: torch.compile does not work here ({lines[0]}): it needs a C++ compiler that works, which the "
            "environment variable CXX can name, and Python's headers. Mend that, or leave out --compile"
        ) from error


def train(args: argparse.Namespace) -> int:
    if args.compile:
        check_compiler()
    config = GPTConfig(args.layers, args.width, args.heads, args.context)
    text = load_text(args.text, args.context)
    make_folder(args.out, "--out")
    model = GPT(config, args.seed)
    optimizer = choices.make(
        args.optimizer, model.parameters(), args.lr, max_grad_norm=limit_of(args), ema_decay=args.ema
    )
    learner = Learner(model, optimizer, args)
    settings: dict[str, Any] = {**asdict(config), "optimizer": args.optimizer, "seed": args.seed, "batch": args.batch}
    settings |= {"accumulate": args.accumulate, "steps": args.steps, "lr": args.lr}
    settings |= {"warmup": args.warmup, "max_grad_norm": args.max_grad_norm, "text_crc32": text.checksum()}
    settings |= {"amp": args.amp, "compile": args.compile or None}  # None: as in checkpoints from before these options
    settings |= {"ema": args.ema}
    parts = {"model": model, "optimizer": optimizer, "schedule": learner.schedule}
    progress = Progress()
    if args.resume is not None:
        progress = checkpoint.load(args.resume, settings, **parts)
        if parallel.is_first():
            checkpoint.carry_best(args.resume, args.out)
    params = list(model.parameters())
    comparison = Comparison(config, args, params) if args.compare else None
    entropy = text.unigram_entropy()
    parallel.say(
        f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters in {len(params)} tensors, {args.optimizer}, "
        f"lr {args.lr:g}, {len(text.train) / 1e6:.2f} MB of text, unigram entropy {entropy:.3f} nats"
    )
    tokens = args.batch * args.context * args.accumulate
    bar = tqdm(
        total=args.steps,
        initial=progress.step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not parallel.is_first(),
    )
    began, start_step = time.perf_counter(), progress.step
    while progress.step < args.steps:
        step = progress.step
        loss = learner.gradients(text, step)
        if not math.isfinite(loss):
            bar.close()
            raise UsageError(f"the loss is {loss} at step {step}: try an --lr below {args.lr:g}")
        lr = learner.schedule.get_last_lr()[0]
        start = time.perf_counter()
        learner.step()
        seconds = time.perf_counter() - start
        norm = float(optimizer.last_grad_norm)
        learner.schedule.step()
        if comparison is not None:
            comparison.time_steps(step)
            comparison.step(text, step, loss)
        progress.train.append({"loss": loss, "lr": lr, "grad_norm": norm, "optimizer_s": seconds})
        progress.step += 1
        bar.update()
        speed = tokens * (progress.step - start_step) / (time.perf_counter() - began)
        bar.set_postfix_str(
            f"loss {loss:.3f} lr {lr:.1e} |g| {norm:.2f} {speed:,.0f} tok/s opt {seconds * 1e3:.2f} ms", refresh=False
        )
        if progress.step % args.eval_every == 0 or progress.step == args.steps:
            record(args, learner, text, settings, progress, parts, entropy)
    bar.close()
    if comparison is not None:  # the last step shows in no training loss
        comparison.check(args.steps, progress.validation[-1]["loss"], comparison.learner.validate(text))
    return summary(args, progress, entropy, comparison) if parallel.is_first() else 0


def record(
    args: argparse.Namespace, learner: Learner, text: Text, settings: dict[str, Any], progress: Progress,
    parts: dict[str, Any], entropy: float,
) -> None:  # fmt: skip
    """Validates and writes. The best checkpoint comes first: if the process is killed between the two, the run resumes
    before this point and comes here again."""
    best = min((v["loss"] for v in progress.validation), default=math.inf)
    progress.validation.append({"step": progress.step, "loss": learner.validate(text)})
    if args.ema is not None:
        with parts["optimizer"].ema_weights():
            progress.validation[-1]["loss_of_averages"] = learner.validate(text)
    if not parallel.is_first():
        return
    if progress.validation[-1]["loss"] < best:
        checkpoint.save(args.out / "best.pt", settings, progress, **parts)
    checkpoint.save(args.out / "latest.pt", settings, progress, **parts)
    history = {"settings": settings, "unigram_entropy": entropy, "torch": torch.__version__, **vars(progress)}
    write_atomically(args.out / "history.json", lambda f: f.write(json.dumps(history).encode()))


def summary(args: argparse.Namespace, progress: Progress, entropy: float, comparison: Comparison | None) -> int:
    from .curves import plot_training

    plot_training(args.out / "loss.png", args.optimizer, vars(progress), entropy)
    best = min(v["loss"] for v in progress.validation)
    print(f"validation loss {progress.validation[-1]['loss']:.4f}, best {best:.4f}; unigram entropy {entropy:.4f}")
    if args.ema is not None:
        print(f"validation loss of the averaged weights {progress.validation[-1]['loss_of_averages']:.4f}")
    print(
        *train_times.says(args, [t["optimizer_s"] for t in progress.train], comparison and comparison.seconds), sep="\n"
    )
    print(f"Written to {args.out}: latest.pt best.pt history.json loss.png")
    if comparison is None:
        return 0
    first = comparison.first_difference
    if first is not None:
        print(f"first step at which the losses differ: {first}")
    print(f"losses identical: {'yes' if first is None else 'no'}")
    return 0 if first is None else 1


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        with parallel.joined():
            return train(args)
    except UsageError as error:
        parallel.say(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.train``: trains a small GPT on text, with any of the optimizers.

``--compare`` trains a second model beside it with torch.optim, on the same batches, and says whether the losses are the
same to the last bit. For the time, fusedoptim and the fastest that torch has step copies of the parameters, in turn;
what torch.optim's second model takes is not measured, since its for-loop is there for its bits.
Under ``torchrun --nproc_per_node N -m benchmarks.train`` N processes share every batch, and with ``--shard`` the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..common.arguments import UsageError
from ..common.files import make_folder, write_atomically
from ..text import Text, load_text
from . import checkpoint, choices, options, parallel, sharding, times
from .comparison import Comparison
from .gpt import GPT, GPTConfig
from .learner import Learner, check_compiler, limit_of

#: Options that a resumed run must share with the one before, beside those of the model.
SHARED = ("optimizer", "seed", "batch", "accumulate", "steps", "lr", "warmup", "max_grad_norm", "amp", "ema")


@dataclass
class Run:
    args: argparse.Namespace
    text: Text
    entropy: float
    learner: Learner
    settings: dict[str, Any]
    progress: checkpoint.Progress

    def train(self, comparison: Comparison | None) -> None:
        args, learner, progress = self.args, self.learner, self.progress
        tokens = args.batch * args.context * args.accumulate
        began, start_step = time.perf_counter(), progress.step
        hidden = not parallel.is_first()
        with tqdm(
            total=args.steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=0.5, disable=hidden
        ) as bar:
            while (step := progress.step) < args.steps:
                loss = learner.gradients(self.text, step)
                if not math.isfinite(loss):
                    bar.close()
                    raise UsageError(f"the loss is {loss} at step {step}: try an --lr below {args.lr:g}")
                lr = learner.schedule.get_last_lr()[0]
                start = time.perf_counter()
                learner.step()
                seconds = time.perf_counter() - start
                norm = float(sharding.own(learner.optimizer).last_grad_norm)
                learner.schedule.step()
                if comparison is not None:
                    comparison.time_steps(step)
                    comparison.step(self.text, step, loss)
                progress.train.append({"loss": loss, "lr": lr, "grad_norm": norm, "optimizer_s": seconds})
                progress.step += 1
                bar.update()
                speed = tokens * (progress.step - start_step) / (time.perf_counter() - began)
                says = f"loss {loss:.3f} lr {lr:.1e} |g| {norm:.2f} {speed:,.0f} tok/s opt {seconds * 1e3:.2f} ms"
                bar.set_postfix_str(says, refresh=False)
                if progress.step % args.eval_every == 0 or progress.step == args.steps:
                    self.record()
        if comparison is not None:  # the last step shows in no training loss
            comparison.check(args.steps, progress.validation[-1]["loss"], comparison.learner.validate(self.text))

    def record(self) -> None:
        """Validates and writes. The best checkpoint comes first: if the process is killed between the two, the run
        resumes before this point and comes here again."""
        args, learner, progress = self.args, self.learner, self.progress
        best = min((v["loss"] for v in progress.validation), default=math.inf)
        progress.validation.append({"step": progress.step, "loss": learner.validate(self.text)})
        if args.ema is not None:
            with learner.optimizer.ema_weights(learner.model):
                progress.validation[-1]["loss_of_averages"] = learner.validate(self.text)
        states = learner.states()
        if not parallel.is_first():
            return
        if progress.validation[-1]["loss"] < best:
            checkpoint.save(args.out / "best.pt", self.settings, progress, **states)
        checkpoint.save(args.out / "latest.pt", self.settings, progress, **states)
        history = {"settings": self.settings, "unigram_entropy": self.entropy, "torch": torch.__version__}
        text = json.dumps(history | vars(progress)).encode()
        write_atomically(args.out / "history.json", lambda f: f.write(text))

    def summary(self, comparison: Comparison | None) -> None:
        from .curves import plot_training

        out, progress = self.args.out, self.progress
        plot_training(out / "loss.png", self.args.optimizer, vars(progress), self.entropy)
        last, best = progress.validation[-1], min(v["loss"] for v in progress.validation)
        print(f"validation loss {last['loss']:.4f}, best {best:.4f}; unigram entropy {self.entropy:.4f}")
        if self.args.ema is not None:
            print(f"validation loss of the averaged weights {last['loss_of_averages']:.4f}")
        own = [t["optimizer_s"] for t in progress.train]
        print(*times.says(self.args, own, comparison and comparison.seconds), sep="\n")
        print(f"Written to {out}: latest.pt best.pt history.json loss.png")
        if comparison is not None:
            first = comparison.first_difference
            if first is not None:
                print(f"first step at which the losses differ: {first}")
            print(f"losses identical: {'yes' if first is None else 'no'}")


def start(args: argparse.Namespace) -> int:
    if args.compile:
        check_compiler()
    config = GPTConfig(args.layers, args.width, args.heads, args.context)
    text = load_text(args.text, args.context)
    make_folder(args.out, "--out")
    model = GPT(config, args.seed)
    sizes = [p.numel() for p in model.parameters()]
    norm: Any = {"max_grad_norm": limit_of(args), **sharding.norm_options(args.shard)}
    learner = Learner(
        model, lambda params: choices.make(args.optimizer, params, args.lr, ema_decay=args.ema, **norm), args
    )
    settings: dict[str, Any] = asdict(config) | {name: getattr(args, name) for name in SHARED}
    settings |= {"text_crc32": text.checksum(), "compile": args.compile or None}  # None: as without the option
    progress = checkpoint.Progress()
    if args.resume is not None:
        progress, states = checkpoint.load(args.resume, settings)
        learner.load(states)
        if parallel.is_first():
            checkpoint.carry_best(args.resume, args.out)
    comparison = Comparison(config, args, learner) if args.compare else None
    entropy = text.unigram_entropy()
    parallel.say(
        f"{sum(sizes) / 1e6:.2f} M parameters in {len(sizes)} tensors{sharding.says(args.shard)}, {args.optimizer}, "
        f"lr {args.lr:g}, {len(text.train) / 1e6:.2f} MB of text, unigram entropy {entropy:.3f} nats"
    )
    run = Run(args, text, entropy, learner, settings, progress)
    run.train(comparison)
    if not parallel.is_first():
        return 0
    run.summary(comparison)
    return 0 if comparison is None or comparison.first_difference is None else 1


def main(argv: list[str] | None = None) -> int:
    try:
        args = options.parse(argv, __doc__)
        with parallel.joined():
            return start(args)
    except UsageError as error:
        parallel.say(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.plot FILE.json``: pictures of a results file, as PNGs beside it.

NAME-bandwidth.png: the share of the copy's bandwidth, per optimizer and dtype. NAME-speedup.png: fusedoptim's speed-up
over each peer. NAME-scaling.png: time against the number of tensors and against their size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from . import arguments
from .errors import UsageError
from .files import make_folder, write_atomically
from .optimizers import DTYPES, SETTINGS
from .results import COPY, OURS, STREAM, Result, Results, load, ratio_of
from .scaling import points, slopes
from .tables import peers_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Large enough that the caches do not matter, the largest first choice.
LARGE_CASES = ("llama3-8b-shard", "gpt2-xl", "gpt2-small", "64M")
#: What the speed-up is shown for: memory-bound, many tensors, many groups.
SPEEDUP_CASES = ("gpt2-small", "64M", "vit-l16", "resnet50", "2000x1024", "2000x64", "5000-odd", "465-groups")
COLOURS = dict(zip(DTYPES, ("#2171b5", "#d94801", "#238b45"), strict=True))


def _kept(results: Results) -> dict[tuple[str, str, str], Result]:
    """Rows that have a time, by optimizer, dtype and case."""
    rows = (r for r in results.rows if r["condition"] == "kept")
    return {(r["optimizer"], r["dtype"], r["case"]): r for r in rows if "ms" in r.get("contenders", {}).get(OURS, {})}


def _machine(results: Results) -> str:
    e = results.environment
    name = e["gpu"] if e["device"] == "cuda" else f"{e['cpu']}, {e['threads']} threads"
    return f"{name}, torch {e['torch']}, commit {e['commit']}"


def bandwidth(results: Results) -> Figure | None:
    """Bars per optimizer and dtype, the plain pass as a mark, the copy as a line."""
    rows = _kept(results)
    covered = {c: sum(k[2] == c for k in rows) for c in LARGE_CASES}
    case = max(LARGE_CASES, key=lambda c: covered[c])
    found = {
        k[:2]: r["contenders"] for k, r in rows.items() if k[2] == case and f"share_of_{COPY}" in r["contenders"][OURS]
    }
    if not found:
        return None
    optimizers = [o for o in SETTINGS if any(k[0] == o for k in found)]
    figure, axes = plt.subplots(figsize=(9, 4.5), dpi=110)
    width = 0.27
    for i, dtype in enumerate(DTYPES):
        places = [(x + (i - 1) * width, found[o, dtype]) for x, o in enumerate(optimizers) if (o, dtype) in found]
        heights = [c[OURS][f"share_of_{COPY}"] for _, c in places]
        bars = axes.bar([x for x, _ in places], heights, width * 0.92, color=COLOURS[dtype], label=f"{dtype}")
        axes.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=8, padding=2)
        limits = [(x, c[STREAM]["gb_s"] / c[COPY]["gb_s"]) for x, c in places if "gb_s" in c.get(STREAM, {})]
        label = "plain pass with the same reads and writes" if i == 0 else None
        if limits:
            xs, ys = zip(*limits, strict=True)
            axes.scatter(xs, ys, s=330, marker="_", color="black", zorder=3, label=label)
    axes.axhline(1.0, color="#555555", linestyle="--", linewidth=1, label="copy within the memory, same run")
    axes.set_xticks(range(len(optimizers)), optimizers)
    axes.set_ylabel("share of the copy's bandwidth")
    axes.set_title(f"Bandwidth of a step, {case}\n{_machine(results)}", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.28)
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def speedup(results: Results) -> Figure | None:
    """AdamW fp32: a group of bars per case, a bar per peer, on a logarithmic axis."""
    rows = {k[2]: r for k, r in _kept(results).items() if k[:2] == ("AdamW", "fp32")}
    cases = [c for c in SPEEDUP_CASES if c in rows]
    peers = peers_of([rows[c] for c in cases])
    if not peers:
        return None
    figure, axes = plt.subplots(figsize=(10.5, 4.8), dpi=110)
    width = 0.86 / len(peers)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for i, peer in enumerate(peers):
        offset = (i - (len(peers) - 1) / 2) * width
        bars = [(x + offset, r) for x, c in enumerate(cases) if (r := ratio_of(rows[c], peer)) is not None]
        axes.bar(
            [x for x, _ in bars],
            [r - 1 for _, r in bars],
            width * 0.92,
            bottom=1,
            color=colours[i % len(colours)],
            label=f"over {peer}",
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("speed-up of fusedoptim (below 1: slower)")
    axes.set_title(f"AdamW fp32, speed-up over each peer\n{_machine(results)}", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, ncols=2, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scaling(results: Results) -> Figure | None:
    if not results.scaling:
        return None
    curves = list(dict.fromkeys(r["curve"] for r in results.scaling))
    figure, all_axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 4.5), dpi=110, squeeze=False)
    for axes, curve in zip(all_axes[0], curves, strict=True):
        _curve(axes, [r for r in results.scaling if r["curve"] == curve], curve)
    figure.suptitle(f"AdamW fp32, time of a step\n{_machine(results)}", fontsize=10)
    return figure


def _curve(axes: Axes, rows: Sequence[Result], curve: str) -> None:
    fitted = {name: f"{value:.3g} {unit}" for _, name, unit, value in slopes(rows)}
    for name in [OURS, *peers_of(rows)]:
        places = points(rows, curve, name)
        if places:
            style = {"color": "black", "linewidth": 2.0, "zorder": 3} if name == OURS else {"linewidth": 1.2}
            slope = f": {fitted[name]}" if name in fitted else ""
            axes.plot(*zip(*places, strict=True), "o-", markersize=3.5, label=f"{name}{slope}", **style)
    axes.set(xscale="log", yscale="log", xlabel=rows[0]["says"], ylabel="ms")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "bandwidth": bandwidth,
    "speedup": speedup,
    "scaling": scaling,
}


def write_picture(path: Path, figure: Figure) -> None:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write_atomically(path, lambda f: f.write(buffer.getvalue()))


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.plot", description=__doc__)
    p.add_argument("file", type=Path)
    p.add_argument("--out", type=Path, help="the folder for the pictures (default: that of the file)")
    args = p.parse_args(argv)
    results = load(args.file)
    folder = args.out or args.file.parent
    make_folder(folder, "--out")
    drawn = 0
    for name, draw in PICTURES.items():
        figure = draw(results)
        if figure is None:
            print(f"no {name} picture: {args.file} has no rows for it")
            continue
        path = folder / f"{args.file.stem}-{name}.png"
        write_picture(path, figure)
        print(path)
        drawn += 1
    if drawn == 0:
        raise UsageError(f"{args.file} has nothing to draw")
    return 0


if __name__ == "__main__":
    arguments.run(main)

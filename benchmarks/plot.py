"""``python -m benchmarks.plot FILE.json``: pictures of a results file, as PNGs beside it.

NAME-bandwidth.png: the share of the copy's bandwidth, per optimizer and dtype. NAME-speedup.png: fusedoptim's speed-up
over each peer. NAME-scaling.png: time against the number of tensors and against their size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .common import arguments
from .common.arguments import UsageError
from .common.files import make_folder, write_atomically
from .common.units import duration
from .measure.optimizers import DTYPES, SETTINGS
from .measure.results import COPY, OURS, STREAM, Result, Results, key_of, load, ratio_of
from .measure.scaling import points, slopes
from .tables import peers_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

#: Large enough that the caches do not matter, the largest first choice.
LARGE_CASES = ("llama3-8b-shard", "gpt2-xl", "gpt2-small", "64M", "resnet50")
#: What the speed-up is shown for: memory-bound, many tensors, many groups.
SPEEDUP_CASES = ("gpt2-small", "64M", "vit-l16", "resnet50", "2000x1024", "2000x64", "5000-odd", "465-groups")
STREAM_SAYS = "plain pass with the same reads and writes"
COLOURS = dict(zip(DTYPES, ("#2171b5", "#d94801", "#238b45", "#fdae6b", "#756bb1", "#bcbddc"), strict=True))


def _kept(results: Results) -> dict[tuple[str, str, str], Result]:
    """Rows that have a time, by optimizer, dtype and case."""
    rows = (r for r in results.rows if r["condition"] == "kept")
    return {key_of(r)[:3]: r for r in rows if "ms" in r.get("contenders", {}).get(OURS, {})}


def _machine(results: Results) -> str:
    e = results.environment
    name = e["gpu"] if e["device"] == "cuda" else f"{e['cpu']}, {e['threads']} threads"
    return f"{name}, torch {e['torch']}, commit {e['commit']}"


def bandwidth(results: Results) -> Figure | None:
    """A bar per optimizer and dtype, the plain pass as a mark, the copy as a line."""
    rows = _kept(results)
    covered = {c: sum(k[2] == c for k in rows) for c in LARGE_CASES}
    case = max(LARGE_CASES, key=lambda c: covered[c])
    found = {
        k[:2]: r["contenders"] for k, r in rows.items() if k[2] == case and f"share_of_{COPY}" in r["contenders"][OURS]
    }
    if not found:
        return None
    keys = [(o, d) for o in SETTINGS for d in DTYPES if (o, d) in found]
    shares = [found[k][OURS][f"share_of_{COPY}"] for k in keys]
    optimizers = list(dict.fromkeys(o for o, _ in keys))
    places = [y + 0.6 * optimizers.index(o) for y, (o, _) in enumerate(keys)]
    labels = [(y, " ".join(k), f"{share:.2f}") for y, k, share in zip(places, keys, shares, strict=True)]
    figure, axes = _lanes(labels, 0.22, 8.5)
    axes.barh(places, shares, 0.85, color=[COLOURS[d] for _, d in keys])
    speeds = [[found[k].get(limit, {}).get("gb_s") for limit in (STREAM, COPY)] for k in keys]
    marks = [(stream / copy, y) for y, (stream, copy) in zip(places, speeds, strict=True) if stream and copy]
    if marks:
        axes.scatter(*zip(*marks, strict=True), s=130, marker="|", color="black", linewidth=2, label=STREAM_SAYS)
    axes.axvline(1.0, color="#555555", linestyle="--", linewidth=1, label="copy within the memory, same run")
    axes.set_xlim(0, 1.05 * max([1.0, *shares, *(x for x, _ in marks)]))
    axes.set_xlabel("share of the copy's bandwidth")
    axes.set_title(f"Bandwidth of a step, {case}\n{_machine(results)}", fontsize=10)
    _legend_below(axes, 2)
    return figure


def speedup(results: Results) -> Figure | None:
    """AdamW fp32: below each case's name a bar per peer, on a logarithmic axis that shows both sides of 1."""
    rows = {k[2]: r for k, r in _kept(results).items() if k[:2] == ("AdamW", "fp32")}
    peers = peers_of(list(rows.values()))
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    labels: list[tuple[float, str, str]] = []
    bars: list[tuple[float, float, Any]] = []
    for case in (c for c in SPEEDUP_CASES if c in rows):
        found = [(p, r) for p in peers if (r := ratio_of(rows[case], p)) is not None]
        if found:
            labels.append((labels[-1][0] + 1.5 if labels else 0.0, case, ""))
        for peer, ratio in found:
            labels.append((labels[-1][0] + 1, peer, f"{ratio:.2f}x"))
            bars.append((labels[-1][0], ratio, colours[peers.index(peer) % len(colours)]))
    if not bars:
        return None
    figure, axes = _lanes(labels, 0.14, 7.5)
    for (_, _, value), text in zip(labels, axes.get_yticklabels(), strict=True):
        text.set_weight("normal" if value else "bold")
    places, ratios, colour = zip(*bars, strict=True)
    axes.barh(places, [r - 1 for r in ratios], 0.7, left=1, color=colour)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, 0.9 * min(ratios)), max(2.0, 1.1 * max(ratios)))
    axes.axvspan(axes.get_xlim()[0], 1, color="black", alpha=0.06, linewidth=0, zorder=0)
    axes.axvline(1.0, color="black", linewidth=1)
    _label_axis(axes.xaxis, lambda value, _: f"{value:g}x")
    axes.set_xlabel("time of the peer over fusedoptim's (in the grey part the peer is faster)")
    axes.set_title(f"AdamW fp32, speed-up over each peer\n{_machine(results)}", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _lanes(labels: Sequence[tuple[float, str, str]], inches: float, size: float) -> tuple[Figure, Axes]:
    """Axes with a lane per (place, name, value): names on the left, values on the right, nothing in between that bars
    could hide. The first is on top, and the height grows with their number."""
    places = [place for place, _, _ in labels]
    figure, axes = plt.subplots(figsize=(9, inches * (places[-1] + 2) + 1.6), dpi=110)
    axes.set_ylim(places[-1] + 1, -1)
    axes.set_yticks(places, [name for _, name, _ in labels], fontsize=size)
    axes.tick_params(axis="y", length=0)
    right = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
    for place, _, value in labels:
        axes.annotate(value, (1, place), xytext=(6, 0), va="center", fontsize=size, **right)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def scaling(results: Results) -> Figure | None:
    rows = [r for r in results.scaling if "contenders" in r]
    curves = list(dict.fromkeys(r["curve"] for r in rows))
    if not curves:
        return None
    figure, all_axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 5.2), dpi=110, squeeze=False)
    for axes, curve in zip(all_axes[0], curves, strict=True):
        _curve(axes, [r for r in rows if r["curve"] == curve], curve)
    figure.suptitle(f"AdamW fp32, time of a step\n{_machine(results)}", fontsize=10)
    return figure


def _curve(axes: Axes, rows: Sequence[Result], curve: str) -> None:
    fitted = {name: f": {duration(seconds)} per {what}" for _, name, what, seconds in slopes(rows)}
    for name in [OURS, *peers_of(rows)]:
        places = points(rows, curve, name)
        if places:
            style = {"color": "black", "linewidth": 2.0, "zorder": 3} if name == OURS else {"linewidth": 1.2}
            xs, ms = zip(*places, strict=True)
            seconds = [t * 1e-3 for t in ms]
            axes.plot(xs, seconds, "o-", markersize=3.5, label=f"{name}{fitted.get(name, '')}", **style)
    axes.set(xscale="log", yscale="log", xlabel=rows[0]["says"])
    _label_axis(axes.yaxis, lambda value, _: duration(value))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25)
    _legend_below(axes, 1)


def _label_axis(axis: Axis, text: Callable[[float, int | None], str]) -> None:
    """Of a logarithmic one: at 1, 2, 5 and their multiples by powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    axis.set_major_formatter(text)
    axis.set_minor_locator(NullLocator())


def _legend_below(axes: Axes, columns: int) -> None:
    """Where it hides nothing."""
    below = axes.transAxes + ScaledTranslation(0, -0.55, axes.get_figure(root=True).dpi_scale_trans)  # in inches
    axes.legend(
        frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below
    )


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

"""Pictures of results: they show what was measured, no text hides another, and both sides of 1 are seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_benchmarks_results import a_row, curve, results, saved

from benchmarks.common.arguments import UsageError
from benchmarks.measure import plan
from benchmarks.measure.optimizers import DTYPES, SETTINGS
from benchmarks.measure.results import Results

pytest.importorskip("matplotlib")

from matplotlib import image, pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import plot
from benchmarks.train import curves


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def with_peers(*ratios: float) -> dict[str, float]:
    return {f"a peer with a long name {i}": 2.0 * ratio for i, ratio in enumerate(ratios)}


FEW = results(a_row(2.0, {"torch fused": 3.0}), scaling=curve())
NEAR = results(a_row(2.0, with_peers(0.97, 0.99, 1.0, 1.01, 1.02, 1.05)), scaling=curve())
PEERS = with_peers(*(0.05 * 2.2**i for i in range(14)))
MANY = results(
    *(a_row(2.0, PEERS, ("AdamW", "fp32", c, "kept")) for c in plot.SPEEDUP_CASES[:5]),
    *(
        a_row(2.0, {}, (o, d, "gpt2-small", "kept"))
        for o, d, *_ in plan.combinations(list(SETTINGS), list(DTYPES), ["64M"], ["kept"])
        if (o, d) != ("AdamW", "fp32")
    ),
    scaling=[*curve(), *curve("elements")],
    cpu="Some(R) Processor(TM) Platinum 8481C CPU @ 2.70GHz",
    threads=208,
)


def texts(figure: Figure) -> list[Text]:
    """That are drawn."""
    figure.tight_layout()
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and shown(t, figure)]


def shown(text: Text, figure: Figure) -> bool:
    """A tick beyond the limits has a label that is not drawn."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for tick in axis.get_major_ticks():
                if text is tick.label1:
                    low, high = sorted(axis.get_view_interval())
                    return bool(low * 0.999 <= tick.get_loc() <= high * 1.001)
                if text is tick.label2:
                    return False
    return True


@pytest.mark.parametrize("content", [FEW, NEAR, MANY], ids=["few", "near", "many"])
@pytest.mark.parametrize("name", list(plot.PICTURES))
def test_no_text_hides_another_a_bar_or_a_mark_or_leaves_the_picture(name: str, content: Results) -> None:
    figure = plot.PICTURES[name](content)
    assert figure is not None
    found = texts(figure)
    boxes = [(t.get_text(), t.get_window_extent()) for t in found]
    assert len(boxes) > 5
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (a, b)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for axes in figure.axes:
            assert not box.overlaps(axes.get_window_extent()), f"{text} is where bars, marks and curves are"


@pytest.mark.parametrize("ratios", [(1.05, 1.04, 400.0), (0.97, 0.3), (1.0,)], ids=str)
def test_both_sides_of_1_are_in_the_picture(ratios: tuple[float, ...]) -> None:
    """What is near 1 has a bar that is seen, at least in width of a few hundredths of an inch, on its side."""
    figure = plot.speedup(results(a_row(2.0, with_peers(*ratios))))
    [axes] = figure.axes
    texts(figure)
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and low <= 0.5 and high >= 2 and low < min(ratios) and max(ratios) < high
    assert "1x" in [t.get_text() for t in axes.get_xticklabels()]
    bars = [b for b in axes.patches if b.get_height() < 1]  # the other patch is the grey one
    ends = {round(b.get_x() + b.get_width(), 9): b.get_window_extent() for b in bars}
    for ratio in ratios:
        box = ends[ratio]
        assert box.width / figure.dpi > 0.02 or ratio == 1
    [grey] = [b for b in axes.patches if b not in bars]
    assert (grey.get_x(), grey.get_x() + grey.get_width()) == (low, 1)


def test_times_on_axes_have_their_unit() -> None:
    figure = plot.scaling(FEW)
    labels = [t.get_text() for t in texts(figure)]
    assert {"1 ms", "2 ms", "torch fused: 20 us per tensor"} <= set(labels), labels


def test_the_last_loss_stands_where_no_curve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(plot.plt, "close", kept.append)
    progress = {
        "train": [{"loss": 5.0 - 0.01 * i + 0.2 * (-1) ** i} for i in range(300)],
        "validation": [{"step": s, "loss": 5.0 - 0.01 * s} for s in (100, 200, 300)],
    }
    curves.plot_training(tmp_path / "loss.png", "AdamW", progress, 3.0)
    [axes] = kept[0].axes
    [last] = [t for t in texts(kept[0]) if t.get_text() == "2.00"]
    ends = max(x for line in axes.lines[:3] for x in line.get_xdata())
    assert last.get_window_extent().x0 > axes.transData.transform((ends, 0))[0]
    assert last.get_window_extent().x1 < axes.get_window_extent().x1


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = results(a_row(2.0, {"torch fused": 3.0, "optimi": 1.0}), scaling=[*curve(), *curve("elements")])
    path = saved(tmp_path / "name.json", content)
    folder = tmp_path / "pictures"
    assert plot.main([str(path), "--out", str(folder)]) == 0
    names = ["name-bandwidth.png", "name-scaling.png", "name-speedup.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert sorted(capsys.readouterr().out.split()) == [str(folder / n) for n in names]
    for name in names:
        pixels = image.imread(folder / name)
        assert pixels.shape[0] > 180 and pixels.shape[1] > 600
        assert ((pixels[..., :3].min(axis=2) < 0.9).mean()) > 0.01, "an empty picture"


def test_a_picture_shows_what_was_measured(tmp_path: Path) -> None:
    content = results(a_row(2.0, {"torch fused": 3.0, "optimi": 1.0}), scaling=curve())
    figure = plot.bandwidth(content)
    assert [round(bar.get_width(), 3) for bar in figure.axes[0].patches] == [0.875]
    figure = plot.speedup(content)
    bars = [bar for bar in figure.axes[0].patches if bar.get_height() < 1]
    ends = sorted(round(bar.get_x() + bar.get_width(), 3) for bar in bars)
    assert ends == [0.5, 1.5], "above 1 for a peer that is slower, below for one that is faster"
    figure = plot.scaling(content)
    [ours, fused] = figure.axes[0].lines
    assert list(ours.get_xdata()) == [1, 10, 100] and list(fused.get_ydata()) == pytest.approx([1.02e-3, 1.2e-3, 3e-3])
    assert fused.get_label() == "torch fused: 20 us per tensor"


def test_nothing_to_draw(tmp_path: Path) -> None:
    row = a_row()
    row.pop("contenders")
    path = saved(tmp_path / "name.json", results({**row, "skipped": "too large"}))
    with pytest.raises(UsageError, match="has nothing to draw"):
        plot.main([str(path)])
    assert [p.name for p in tmp_path.iterdir()] == ["name.json"]

"""runs/NAME/learning.png out of metrics.jsonl: accuracy, answer length, staleness, importance ratio; of a job that
learns from examples its loss, and what held-out ones say.

The launcher calls it at the end of a run, and after a failed one too: it draws whatever rows there are.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offtrail.platform.tracking.recorder import Row, read_rows
from offtrail.platform.tracking.summary import LOSSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and by lightness in print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
HELD_OUT = {"eval/accuracy": "accuracy", "eval/auc": "AUC", "eval/first_error_f1": "first error, F1"}
"""Of a model that scores."""
Curve = tuple[list[int], list[float]]


def learning_curve(run_dir: Path) -> Path:
    """Draw runs/NAME/learning.png and return its path. FileNotFoundError without metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(run_dir)
    loss = next((name for name in LOSSES if curve(rows, name)[0]), "")
    figure = Figure(figsize=(11, 3.8 if loss else 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=12, fontweight="bold", x=0.01, ha="left")
    if loss:
        _supervised(figure, rows, loss)
    else:
        _reinforced(figure, rows)
    path = run_dir / "learning.png"
    partial = path.with_name(".learning.png")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path


def _supervised(figure: Figure, rows: list[Row], loss: str) -> None:
    """The loss of a job that learns from examples, and beside it what held-out ones say, where some are measured."""
    scores = {name: label for name, label in HELD_OUT.items() if curve(rows, name)[0]}
    left, *right = figure.subplots(1, 1 + bool(scores), squeeze=False)[0]
    for axes in (left, *right):
        frame(axes, rows[-1]["step"])
        axes.set_xlabel("optimizer update")
    title(left, "Loss", "nats per token of the worked answers" if loss == "loss/sft" else "nats")
    draw(left, curve(rows, loss), "training batches", BLUE)
    left.set_ylim(bottom=0)
    legend(left)
    for axes in right:
        title(axes, "Held-out answers", "")
        for (name, label), colour in zip(scores.items(), (ORANGE, BLUE, GREEN), strict=False):
            draw(axes, curve(rows, name), label, colour, "o-")
        axes.set_ylim(0, 1.02)
        legend(axes)


def _reinforced(figure: Figure, rows: list[Row]) -> None:
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    last = max((row["step"] for row in rows), default=1)
    for axes in (top_left, top_right, bottom_left, bottom_right):
        frame(axes, last)
    _accuracy(top_left, rows)
    _length(top_right, rows)
    _staleness(bottom_left, rows)
    _ratio(bottom_right, rows)
    for axes in (bottom_left, bottom_right):
        axes.set_xlabel("learner step (version)")


def curve(rows: list[Row], name: str) -> Curve:
    """(steps, values) of one metric where it was recorded and finite."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in found], [float(value) for _, value in found]


def frame(axes: Axes, last: int | None) -> None:
    """Of a panel over the learner steps up to ``last``, or (None) over another quantity."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=GREY)
    if last is not None:
        axes.set_xlim(0, max(1, last) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def title(axes: Axes, words: str, note: str) -> None:
    """On the left what is shown, on the right its unit."""
    axes.set_title(words, loc="left", fontsize=11)
    axes.set_title(note, loc="right", fontsize=9, color=GREY)


def draw(axes: Axes, data: Curve, label: str, colour: str, style: str = "-") -> None:
    """A curve, where it has points."""
    steps, values = data
    if steps:
        # A line of one point would be invisible.
        shown = style if len(steps) > 1 else "o"
        axes.plot(steps, values, shown, color=colour, linewidth=1.6, markersize=5, label=label)


def legend(axes: Axes, place: str = "best") -> None:
    """Of the curves that were drawn, or that none was recorded."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc=place)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)


def _accuracy(axes: Axes, rows: list[Row]) -> None:
    title(axes, "Accuracy", "share of answers that are right")
    draw(axes, curve(rows, "reward/accuracy"), "training batches", BLUE)
    steps, values = curve(rows, "eval/accuracy")
    if steps:
        axes.plot(steps, values, "o-", color=ORANGE, linewidth=2, markersize=6, label="held-out prompts", clip_on=False)
        _label(axes, steps[0], values[0], (9, -14), "left")
        if len(steps) > 1:
            _label(axes, steps[-1], values[-1], (0, -19), "right")
    for label, style in zip(_sets(rows), cycle((":", "-.", "--")), strict=False):
        draw(axes, curve(rows, f"eval/{label}/accuracy"), f"held-out: {label}", GREEN, style)
    axes.set_ylim(0, 1.02)
    legend(axes, "best" if _sets(rows) else _free_corner(_later(rows)))


def _sets(rows: list[Row]) -> list[str]:
    """The held-out sets beside the task's own."""
    names = {name: None for row in rows for name in row if name.startswith("eval/") and name.endswith("/accuracy")}
    return [name.split("/")[1] for name in names if name.count("/") == 2]


def _later(rows: list[Row]) -> list[float]:
    """Accuracies of both curves in the right half of the axes."""
    points = [p for name in ("reward/accuracy", "eval/accuracy") for p in zip(*curve(rows, name), strict=True)]
    half = max((step for step, _ in points), default=0) / 2
    return [value for step, value in points if step >= half]


def _free_corner(values: list[float]) -> str:
    """A corner on the right where no curve with these values, nor the label below its end, lies under the legend."""
    if min(values, default=1.0) > 0.3:
        return "lower right"
    return "upper right" if max(values) < 0.75 else "best"


def _label(axes: Axes, step: int, value: float, offset: tuple[int, int], side: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    if value < 0.1:  # below it lies the axis
        offset = (offset[0], 9)
    style: dict[str, Any] = {"color": ORANGE, "fontsize": 11, "fontweight": "bold", "bbox": box, "ha": side}
    axes.annotate(f"{value:.3f}", (step, value), xytext=offset, textcoords="offset points", **style)


def _length(axes: Axes, rows: list[Row]) -> None:
    title(axes, "Answer length", "tokens")
    draw(axes, curve(rows, "length/mean"), "mean, training", BLUE)
    draw(axes, curve(rows, "length/max"), "longest, training", BLUE, ":")
    draw(axes, curve(rows, "eval/length_mean"), "mean, held-out", ORANGE, "o--")
    axes.set_ylim(bottom=0)
    legend(axes)


def _staleness(axes: Axes, rows: list[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    title(axes, "Staleness of trained tokens", "versions")
    draw(axes, curve(rows, "staleness/max"), "oldest token", BLUE, ":")
    draw(axes, curve(rows, "staleness/mean"), "mean", BLUE)
    draw(axes, curve(rows, "staleness/in_queue_mean"), "mean, in the queue", GREEN, "--")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]) * 1.35)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, "upper right")


def _ratio(axes: Axes, rows: list[Row]) -> None:
    """The ratio in the upper half (left scale), what was clipped in the lower half (right scale): they never cross."""
    title(axes, "Importance ratio and clipping", "ratio left, clipped tokens right")
    ratio = curve(rows, "policy/ratio_mean")
    spread = max([0.005, *(abs(value - 1) for value in ratio[1])])
    draw(axes, ratio, "mean ratio", BLUE)
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    axes.set_ylim(1 - 4 * spread, 1 + 2 * spread)
    axes.ticklabel_format(axis="y", useOffset=False)
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.tick_params(labelsize=9, color=GREY)
    clipped = [curve(rows, f"policy/clip_{side}_fraction") for side in ("low", "high")]
    draw(right, clipped[0], "clipped below", GREEN)
    draw(right, clipped[1], "clipped above", ORANGE, "--")
    right.set_ylim(0, 2.4 * max([0.01, *clipped[0][1], *clipped[1][1]]))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    if handles:
        right.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", ncols=3)
    else:
        legend(axes)

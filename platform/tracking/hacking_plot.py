"""runs/NAME/hacking.png out of metrics.jsonl: proxy and truth over steps and over KL, how far they agree, and what
becomes of the answers. The launcher calls it where it draws learning.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from offtrail.platform.tracking.hacking import TRUTH, Alarm, alarms, models
from offtrail.platform.tracking.plot import BLUE, GREEN, GREY, ORANGE, curve, draw, frame, legend, title
from offtrail.platform.tracking.recorder import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANSWERS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "Steps": ("", {"length/steps": ("steps an answer", BLUE), "length/tokens_per_step": ("tokens a step", GREEN)}),
    "Answers of few steps": (
        "share",
        {"length/no_step_share": ("no step", ORANGE), "length/one_step_share": ("one step", BLUE)},
    ),
    "Loops and cut answers": (
        "share",
        {"length/truncated_share": ("cut", ORANGE), "behaviour/repeated_suffix_share": ("repeated end", BLUE)},
    ),
}
"""Panel → its unit, and the curves in it."""


def hacking_curves(run_dir: Path) -> Path | None:
    """Draw runs/NAME/hacking.png and return its path; None where no model scores. FileNotFoundError without
    metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(run_dir)
    names, found = models(rows), alarms(rows)
    if not names:
        return None
    figure = Figure(figsize=(15, 3.6 * (1 + len(names))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=12, fontweight="bold", x=0.01, ha="left")
    *tops, bottom = figure.subplots(1 + len(names), 3, squeeze=False)
    last = max(row["step"] for row in rows)
    for name, axes in zip(names, tops, strict=True):
        _over_steps(axes[0], rows, name, found.get(name), last)
        _over_kl(axes[1], rows, name)
        _agreement(axes[2], rows, name, last)
    _answers(bottom, rows, last)
    path = run_dir / "hacking.png"
    partial = path.with_name(".hacking.png")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path


def _over_steps(axes: Axes, rows: list[Row], name: str, found: Alarm | None, last: int) -> None:
    """The proxy on the left scale, the truth on the right one."""
    frame(axes, last)
    title(axes, f"{name}: proxy and truth", "proxy left, share right")
    draw(axes, curve(rows, f"hacking/{name}/proxy"), "what the model pays", ORANGE)
    draw(axes, curve(rows, f"eval/{name}/proxy"), "what it pays, held-out", ORANGE, "o--")
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.tick_params(labelsize=9, color=GREY)
    draw(right, curve(rows, TRUTH), "right, training", BLUE)
    draw(right, curve(rows, "eval/accuracy"), "right, held-out", BLUE, "o--")
    right.set_ylim(0, 1.02)
    if found:
        right.axvline(found.onset, color=GREY, linestyle=":", label=f"alarm at step {found.step}, onset {found.onset}")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles=handles, frameon=False, fontsize=9)
    axes.set_xlabel("learner step (version)")


def _over_kl(axes: Axes, rows: list[Row], name: str) -> None:
    """The same points by how far the policy has gone from the reference."""
    frame(axes, None)
    title(axes, "Over KL from the reference", "proxy left, share right")
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.tick_params(labelsize=9, color=GREY)
    right.set_ylim(0, 1.02)
    shown = ((axes, f"hacking/{name}/proxy", ORANGE), (right, TRUTH, BLUE))
    for side, tag, colour in shown:
        both = [(row["policy/kl_ref"], row[tag]) for row in rows if row.get("policy/kl_ref") is not None and tag in row]
        if both:
            side.plot(*zip(*both, strict=True), ".-", color=colour, linewidth=0.8, markersize=4)
    if not any(row.get("policy/kl_ref") is not None for row in rows):
        axes.text(0.5, 0.5, "not recorded (algo.kl=none)", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xlabel("policy/kl_ref (nats a token)")


def _agreement(axes: Axes, rows: list[Row], name: str, last: int) -> None:
    frame(axes, last)
    title(axes, "On the policy's own answers", "")
    draw(axes, curve(rows, f"hacking/{name}/auc"), "AUC of right answers", GREEN)
    draw(axes, curve(rows, f"eval/{name}/auc"), "the same, held-out", GREEN, "o--")
    draw(axes, curve(rows, f"hacking/{name}/rank_correlation"), "rank correlation inside a prompt", BLUE, "--")
    axes.axhline(0.5, color=GREEN, linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color=BLUE, linewidth=0.8, linestyle=":")
    axes.set_ylim(-1.02, 1.02)
    legend(axes)
    axes.set_xlabel("learner step (version)")


def _answers(panels: npt.NDArray[np.object_], rows: list[Row], last: int) -> None:
    """What becomes of the answers: the loops, the one-step answers, the answers that never end."""
    for axes, (heading, (unit, curves)) in zip(panels, ANSWERS.items(), strict=True):
        frame(axes, last)
        title(axes, heading, unit)
        for tag, (label, colour) in curves.items():
            draw(axes, curve(rows, tag), label, colour)
        axes.set_ylim(0, 1.02 if unit == "share" else None)
        legend(axes)
        axes.set_xlabel("learner step (version)")

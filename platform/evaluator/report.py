"""What job=eval leaves of its answers: eval.json, eval.png, the `eval/…` of summary.json, and a table.

    Asked (one a set) ─► measured ─► rows ─► write_results

eval.json has the layout that lm-evaluation-harness writes, `results` → set → "MEASURE,none" and "MEASURE_stderr,none",
so that what reads its files reads ours; beside it stand the intervals and the settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from offtrail.platform.config.schema import Config
from offtrail.platform.evaluator.measures import (
    Estimate,
    Values,
    average,
    consensus,
    over_questions,
    pass_at,
    sizes_up_to,
)
from offtrail.platform.tracking.plot import BLUE, GREY, ORANGE
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS, FIGURE = "eval.json", "eval.png"


@dataclass(frozen=True)
class Asked:
    """The n answers to each of a set's Q questions: their [Q, n] scores of the main component, texts (None: no answer),
    lengths in tokens, and whether they were cut at the longest length.
    """

    name: str
    scores: Values
    answers: list[list[str | None]]
    lengths: Values
    cut: Values


def measured(asked: Asked) -> dict[str, Estimate]:
    """Measure → estimate, in the order in which they are shown; pass@k and cons@k at the powers of 2 and at n."""
    n = asked.scores.shape[1]
    found = {f"avg@{n}": over_questions(average(asked.scores))}
    for k in sizes_up_to(n)[1:]:
        found[f"pass@{k}"] = over_questions(pass_at(asked.scores, k))
    for k in sizes_up_to(n)[1:]:
        found[f"cons@{k}"] = over_questions(consensus(asked.answers, asked.scores, k))
    answered = np.array([[answer is not None for answer in row] for row in asked.answers], np.float64)
    return found | {
        "answered": over_questions(average(answered)),
        "truncated": over_questions(average(asked.cut)),
        "length": over_questions(average(asked.lengths)),
    }


def write_results(config: Config, run_dir: Path, model: Path, sets: Sequence[Asked], longest: int) -> Table:
    """Write the files; the table for the terminal. ``longest``: the most tokens that an answer could have."""
    rows = {asked.name: measured(asked) for asked in sets}
    told = {
        "results": {name: _harness(found) for name, found in rows.items()},
        "n-samples": {a.name: {"original": len(a.scores), "effective": len(a.scores)} for a in sets},
        "intervals": {
            name: {measure: [_number(e.low), _number(e.high)] for measure, e in found.items()}
            for name, found in rows.items()
        },
        "config": {
            "model": str(model), "checkpoint": config.checkpoint, "answers": config.eval.samples,
            "answers_by_set": {a.name: a.scores.shape[1] for a in sets},
            "max_new_tokens": longest, "seed": config.run.seed,
            "sets": config.eval.sets or {config.task.name: asdict(config.task)},
            **{name: getattr(config.eval, name) for name in ("temperature", "top_p")},
        },
    }  # fmt: skip
    write_atomic(run_dir / RESULTS, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    flat = {f"eval/{name}/{measure}": _number(e.mean) for name, found in rows.items() for measure, e in found.items()}
    write_summary(run_dir, read_summary(run_dir) | flat)
    draw(run_dir / FIGURE, config, rows)
    return table(rows, sets)


def table(rows: dict[str, dict[str, Estimate]], sets: Sequence[Asked]) -> Table:
    """A line for each measure of each set: however many sets there are, a terminal of 80 columns cuts no number."""
    shown = Table("set", "measure", "mean", "95 % interval", box=None)
    for asked, found in zip(sets, rows.values(), strict=True):
        name = f"{asked.name} ({len(asked.scores)} × {asked.scores.shape[1]})"
        for measure, estimate in found.items():
            digits = 1 if measure == "length" else 3
            low_high = () if math.isnan(estimate.low) else (estimate.low, estimate.high)
            shown.add_row(name, measure, f"{estimate.mean:.{digits}f}", " – ".join(f"{x:.{digits}f}" for x in low_high))
            name = ""
    return shown


def _harness(found: dict[str, Estimate]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for measure, estimate in found.items():
        results[f"{measure},none"] = _number(estimate.mean)
        results[f"{measure}_stderr,none"] = _number(estimate.error)
    return results


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def draw(path: Path, config: Config, rows: dict[str, dict[str, Estimate]]) -> None:
    """pass@k and cons@k over k with their intervals, a panel a set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 4.2 * len(rows)), 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{config.checkpoint}: T = {config.eval.temperature:g}, top-p = {config.eval.top_p:g}",
        fontsize=10, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (name, found) in zip(panels, rows.items(), strict=True):
        _panel(axes, name, found)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _panel(axes: Axes, name: str, found: dict[str, Estimate]) -> None:
    alone = next(estimate for measure, estimate in found.items() if measure.startswith("avg@"))
    for measure, colour in (("pass", BLUE), ("cons", ORANGE)):
        curve = [(1, alone)] + [
            (int(known.partition("@")[2]), e) for known, e in found.items() if known.startswith(f"{measure}@")
        ]
        k, mean = [k for k, _ in curve], [e.mean for _, e in curve]
        axes.plot(k, mean, marker="o", color=colour, label=f"{measure}@k")
        if not any(math.isnan(e.low) for _, e in curve):
            low, high = [max(0.0, e.low) for _, e in curve], [min(1.0, e.high) for _, e in curve]
            axes.fill_between(k, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(alone.mean, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, [str(one) for one in k])
    axes.set_ylim(0, 1.02)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("k answers")
    axes.set_ylabel("share of questions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")

"""What job=eval leaves of its answers: eval.json, eval.png, the `eval/…` of summary.json, and a table.

    Asked (one a set) ─► measured ─► rows ─► write_results

eval.json has the layout that lm-evaluation-harness writes, `results` → set → "MEASURE,none" and "MEASURE_stderr,none",
so that what reads its files reads ours; beside it stand the intervals and the settings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from offtrail.platform.config.schema import Config
from offtrail.platform.evaluator.asked import Asked
from offtrail.platform.evaluator.measures import (
    Estimate,
    Values,
    average,
    best_of,
    consensus,
    over_questions,
    pass_at,
    ratio,
    sizes_up_to,
    weighted_vote,
)
from offtrail.platform.tracking.plot import BLUE, GREEN, GREY, ORANGE
from offtrail.platform.tracking.summary import read_summary, write_atomic, write_summary
from offtrail.rewards.behaviour import REFLECTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS, FIGURE, COMPARED = "eval.json", "eval.png", "few_shot.png"
OF_WORDS = {f"behaviour/{word}_per_1000_words" for word in REFLECTION}
"""In eval.json, and not in the table."""
ONE_DIGIT = re.compile(r"^length$|_1000_|words_mean$|/unscored$")
"""Measures that are no shares."""
CHOSEN = re.compile(r"(best_of_n|weighted_vote)/(.*)@(\d+)")
"""What an answer is chosen by the scores of a model: the use, the model and its aggregate, of how many."""
SHADES = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Of models that choose: what is left of Okabe and Ito's palette."""


def by_question(asked: Asked) -> dict[str, Values]:
    """Measure → [Q] one value a question; pass@k, cons@k, wcons@k and what models choose: k the powers of 2, and n."""
    n = asked.scores.shape[1]
    sizes = sizes_up_to(n)[1:]
    return {
        f"avg@{n}": average(asked.scores),
        **{f"pass@{k}": pass_at(asked.scores, k) for k in sizes},
        **{f"cons@{k}": consensus(asked.answers, asked.scores, k) for k in sizes},
        **{f"wcons@{k}": consensus(asked.answers, asked.scores, k, asked.weights) for k in sizes},
        **{
            f"best_of_n/{name}@{k}": best_of(marks.values, asked.scores, k)
            for name, marks in asked.marks.items()
            for k in sizes
        },
        **{
            f"weighted_vote/{name}@{k}": weighted_vote(asked.answers, marks.values, asked.scores, k)
            for name, marks in asked.marks.items()
            if marks.weighs
            for k in sizes
        },
    }


def reranked(asked: Asked) -> dict[str, dict[str, Estimate]]:
    """What a model chooses of all n answers → what it is compared with, the vote and one answer alone → the paired
    difference, question by question.
    """
    values, n = by_question(asked), asked.scores.shape[1]
    chosen = [measure for measure in values if (found := CHOSEN.fullmatch(measure)) and int(found[3]) == n]
    return {
        measure: {other: over_questions(values[measure] - values[other]) for other in (f"cons@{n}", f"avg@{n}")}
        for measure in chosen
    }


def measured(asked: Asked) -> dict[str, Estimate]:
    """Measure → estimate, in the order in which they are shown. A model's mean score is of the answers that have one;
    how many have none is a count.
    """
    answered = np.array([[answer is not None for answer in row] for row in asked.answers], np.float64)
    values = by_question(asked) | {
        "answered": average(answered), "truncated": average(asked.cut), "length": average(asked.lengths),
    }  # fmt: skip
    found = {measure: over_questions(value) for measure, value in values.items()}
    for one in (marks for marks in asked.marks.values() if marks.own):
        known = ~np.isnan(one.values)
        found[one.model] = ratio(np.nan_to_num(one.values), known.astype(np.float64))
        found[f"{one.model}/unscored"] = Estimate(float(one.unscored), math.nan, math.nan, math.nan)
    return found | {measure: ratio(one.above, one.below) for measure, one in asked.ratios.items()}


@dataclass(frozen=True)
class Comparison:
    """A set after ``shots`` examples against itself without: each measure's difference, question by question, over the
    ``questions`` that had room for an answer both ways; ``left_out``: the others.
    """

    name: str
    beside: str
    shots: int
    questions: int
    left_out: int
    differences: dict[str, Estimate]


def compared(sets: Sequence[Asked]) -> list[Comparison]:
    """Every set that was asked both ways. The same questions are drawn with the same random numbers, and the interval
    is of the paired differences: it is narrower than two intervals beside each other would have it.
    """
    by_name, found = {asked.name: asked for asked in sets}, []
    for few in sets:
        if not few.beside:
            continue
        zero = by_name[few.beside]
        rooms = [np.ones(len(zero.scores)) if one.room is None else one.room for one in (zero, few)]
        both = (rooms[0] * rooms[1]) > 0
        plain, shown = by_question(zero), by_question(few)
        differences = {name: over_questions(shown[name][both] - plain[name][both]) for name in plain if both.any()}
        asked, left = int(both.sum()), int((~both).sum())
        found.append(Comparison(few.name, zero.name, few.shots, asked, left, differences))
    return found


def write_results(config: Config, run_dir: Path, model: Path, sets: Sequence[Asked], longest: int) -> Table:
    """Write the files; the table for the terminal. ``longest``: the most tokens that an answer could have."""
    rows, comparisons = {asked.name: measured(asked) for asked in sets}, compared(sets)
    chosen = {asked.name: found for asked in sets if (found := reranked(asked))}
    told = {
        "results": {name: _harness(found) for name, found in rows.items()},
        "n-shot": {asked.name: asked.shots for asked in sets},
        "n-samples": {a.name: {"original": len(a.scores), "effective": len(a.scores)} for a in sets},
        "intervals": {
            name: {measure: [_number(e.low), _number(e.high)] for measure, e in found.items()}
            for name, found in rows.items()
        },
        **({"comparisons": {one.name: _told(one) for one in comparisons}} if comparisons else {}),
        **({"reranking": {name: _differences(found) for name, found in chosen.items()}} if chosen else {}),
        **({"scored_by": {a.name: _scored_by(a) for a in sets if a.marks}} if any(a.marks for a in sets) else {}),
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
    for one in comparisons:
        flat |= {f"eval/{one.name}/{measure}_less_plain": _number(e.mean) for measure, e in one.differences.items()}
    for name, found in chosen.items():
        flat |= {
            f"eval/{name}/{measure}_less_{other}": _number(e.mean)
            for measure, against in found.items()
            for other, e in against.items()
        }
    write_summary(run_dir, read_summary(run_dir) | flat)
    draw(run_dir / FIGURE, config, rows, {asked.name: own_of(asked) for asked in sets})
    if comparisons:
        draw_comparisons(run_dir / COMPARED, config, comparisons)
    return table(rows, sets, comparisons)


def own_of(asked: Asked) -> list[str]:
    """The marks of each model by the aggregate that its entry names."""
    return [name for name, marks in asked.marks.items() if marks.own]


def _told(one: Comparison) -> dict[str, Any]:
    return {
        "with": one.beside, "n_shot": one.shots, "questions": one.questions, "left_out": one.left_out,
        "differences": {measure: _estimate(e) for measure, e in one.differences.items()},
    }  # fmt: skip


def _differences(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {
        measure: {f"less_{other}": _estimate(e) for other, e in against.items()} for measure, against in found.items()
    }


def _scored_by(asked: Asked) -> dict[str, Any]:
    return {
        one.model: {"folder": str(one.folder), "versions": list(one.versions), "unscored": one.unscored}
        for one in asked.marks.values()
        if one.own
    }


def _estimate(e: Estimate) -> dict[str, float | None]:
    return {"mean": e.mean, "stderr": _number(e.error), "low": _number(e.low), "high": _number(e.high)}


def table(rows: dict[str, dict[str, Estimate]], sets: Sequence[Asked], comparisons: Sequence[Comparison] = ()) -> Table:
    """A line for each measure of each set, and for each difference of one that was asked both ways, or that models have
    chosen from by the aggregates of their entries: however many sets there are, a terminal of 80 columns cuts no
    number. What models choose of fewer than all answers stands in eval.json and the figure.
    """
    shown, by_name = Table("set", "measure", "mean", "95 % interval", box=None), {one.name: one for one in comparisons}
    for asked, found in zip(sets, rows.values(), strict=True):
        name = f"{asked.name} ({len(asked.scores)} × {asked.scores.shape[1]})"
        for measure, estimate in found.items():
            of_fewer = (chosen := CHOSEN.fullmatch(measure)) and int(chosen[3]) < asked.scores.shape[1]
            if measure not in OF_WORDS and not of_fewer:
                shown.add_row(name, measure, *_cells(estimate, ".1f" if ONE_DIGIT.search(measure) else ".3f"))
                name = ""
        for measure, against in reranked(asked).items():
            if any(f"/{own}@" in measure for own in own_of(asked)):
                for other, estimate in against.items():
                    shown.add_row("", f"{measure}, less {other}", *_cells(estimate, "+.3f"))
        if (one := by_name.get(asked.name)) is not None:
            for measure, estimate in one.differences.items():
                mean, interval = _cells(estimate, "+.3f")
                left = f", {one.left_out} left out" if one.left_out else ""
                shown.add_row("", f"{measure}, less plain", mean, f"{interval}{left}")
    return shown


def _cells(estimate: Estimate, form: str) -> tuple[str, str]:
    low_high = () if math.isnan(estimate.low) else (estimate.low, estimate.high)
    return f"{estimate.mean:{form}}", " – ".join(f"{x:{form}}" for x in low_high)


def _harness(found: dict[str, Estimate]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for measure, estimate in found.items():
        results[f"{measure},none"] = _number(estimate.mean)
        results[f"{measure}_stderr,none"] = _number(estimate.error)
    return results


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def draw(path: Path, config: Config, rows: dict[str, dict[str, Estimate]], chosen: Mapping[str, Sequence[str]]) -> None:
    """pass@k, cons@k and wcons@k over k with their intervals, and what models choose by the marks ``chosen`` of a set;
    a panel a set.
    """
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
        _panel(axes, name, found, chosen[name])
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def draw_comparisons(path: Path, config: Config, comparisons: Sequence[Comparison]) -> None:
    """A line a set: what examples before the question add to avg@n (and to cons@n, where there are several answers),
    with the paired interval.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.6 + 0.55 * len(comparisons)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for prefix, colour, above in (("avg@", BLUE, 0.0), ("cons@", ORANGE, 0.22)):
        label = f"{prefix}n"
        for place, one in enumerate(comparisons):
            named = [measure for measure in one.differences if measure.startswith(prefix)]
            if not named:
                continue
            e = one.differences[named[-1]]
            reach = [[0.0], [0.0]] if math.isnan(e.low) else [[e.mean - e.low], [e.high - e.mean]]
            axes.errorbar([e.mean], [place + above], xerr=reach, fmt="o", color=colour, capsize=3, label=label)
            label = "_"  # said once
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [f"{one.beside} ({one.questions})" for one in comparisons])
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.set_xlabel("after examples − plainly, share of questions (paired 95 % interval)")
    axes.set_title(
        f"{Path(config.checkpoint).name}: {comparisons[0].shots}-shot against zero-shot", fontsize=10, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _panel(axes: Axes, name: str, found: dict[str, Estimate], chosen: Sequence[str]) -> None:
    alone = next(estimate for measure, estimate in found.items() if measure.startswith("avg@"))
    by_models = [f"{use}/{marks}" for marks in chosen for use in ("best_of_n", "weighted_vote")]
    shades = [("pass", BLUE), ("cons", ORANGE), ("wcons", GREEN), *zip(by_models, cycle(SHADES), strict=False)]
    for measure, colour in shades:
        curve = [(1, alone)] + [
            (int(known.partition("@")[2]), e) for known, e in found.items() if known.startswith(f"{measure}@")
        ]
        if len(curve) == 1 and measure in by_models:
            continue
        k, mean = [k for k, _ in curve], [e.mean for _, e in curve]
        label = f"best of k by {measure.partition('/')[2]}" if measure.startswith("best_of_n/") else f"{measure}@k"
        axes.plot(k, mean, marker="o", color=colour, label=label)
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

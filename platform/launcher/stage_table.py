"""The table of a recipe's models: dev.json, dev.md and dev.png, one row for each model that a stage of job=eval asked.

    stages' eval.json and summary.json ─► rows ─┬─► dev.json, summary.json
    published.py ───────────────────────────────┼─► dev.md, the table on the terminal
                                                └─► dev.png

DeepSeek-R1's paper has such a table of its Dev1, Dev2 and Dev3; its figures stand beside rows that have those names.
Everything is read from what the stages have left, so that a recipe that was interrupted gives the same table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from offtrail.platform.config.recipe import Stage
from offtrail.platform.launcher import published
from offtrail.platform.launcher.stage_cost import Summaries, lineage, made_for, together
from offtrail.platform.tracking.plot import BLUE, GREEN, GREY, ORANGE
from offtrail.platform.tracking.summary import finite, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
"""stage, asked_by, sets (set → measure → [mean, low, high]), cost, cost_with_what_it_stands_on, published."""
JSON_FILE, TEXT_FILE, FIGURE = "dev.json", "dev.md", "dev.png"
MEASURES = ("accuracy", "language", "format", "length")
"""In this order, as far as they were measured; dev.json has all."""
OTHER_LANGUAGE = "behaviour/other_language_share"
CALLED = {"behaviour/format_share": "format"}
"""Measure of eval.json → its name here."""
INTERVAL = re.compile(r" \(([\d.]+)–([\d.]+)\)")
GIVEN = "model.path"
"""The name of the model that no stage has made."""
PURPLE, YELLOW, RED = "#CC79A7", "#E69F00", "#882255"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, RED, GREY)


def rows_of(stages: Sequence[Stage], evaluations: Mapping[str, Mapping[str, Any]], summaries: Summaries) -> list[Row]:
    """The rows in the order in which the models were asked. ``evaluations``: stage of job=eval → its eval.json."""
    rows: list[Row] = []
    counted = set[str]()
    for stage in stages:
        if stage.job != "eval" or stage.name not in evaluations:
            continue
        model = stage.start_from
        own = [name for name in made_for(model, stages) if name not in counted]
        counted |= set(own)
        rows.append(
            {
                "stage": model or GIVEN,
                "asked_by": stage.name,
                "sets": measures_of(evaluations[stage.name]),
                "cost": together(own, summaries),
                "cost_with_what_it_stands_on": together(lineage(model, stages), summaries),
                "published": published.of_stage(model),
            }
        )
    return rows


def measures_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Set → measure → [mean, low, high] of an eval.json. avg@n is called accuracy; language is the share of words that
    are not of another language.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for name, intervals in evaluation["intervals"].items():
        means = evaluation["results"][name]
        told: dict[str, list[float | None]] = {}
        for measure, ends in intervals.items():
            triple = [means[f"{measure},none"], *ends]
            told["accuracy" if measure.startswith("avg@") else CALLED.get(measure, measure)] = triple
        if other := told.get(OTHER_LANGUAGE):
            told["language"] = [None if value is None else 1.0 - value for value in (other[0], other[2], other[1])]
        found[name] = told
    return found


def write_table(run_dir: Path, recipe: str, rows: Sequence[Row], verdict: Mapping[str, Any] | None = None) -> None:
    """Write the three files; each is whole or not there."""
    told: dict[str, Any] = {"recipe": recipe, "rows": list(rows)}
    if any(row["published"] for row in rows):
        told["published"] = {"source": published.SOURCE, "unit": "percent"}
    if verdict:
        told["verdict"] = verdict
    write_atomic(run_dir / JSON_FILE, json.dumps(finite(told), indent=2, ensure_ascii=False) + "\n")
    write_atomic(run_dir / TEXT_FILE, as_markdown(recipe, rows, verdict))
    draw(run_dir / FIGURE, recipe, rows)


def in_short(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Stage → set → measure → mean, for summary.json."""
    return {
        row["stage"]: {
            name: {measure: measures[measure][0] for measure in shown_of(rows) if measure in measures}
            for name, measures in row["sets"].items()
        }
        for row in rows
    }


def shown_of(rows: Sequence[Row]) -> list[str]:
    """The measures of MEASURES that any row has."""
    return [m for m in MEASURES if any(m in measures for row in rows for measures in row["sets"].values())]


def sets_of_rows(rows: Sequence[Row]) -> list[str]:
    """The sets in the order of the first row that has them."""
    return list(dict.fromkeys(name for row in rows for name in row["sets"]))


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(heads, lines of cells) of the table; accuracy with its interval."""
    sets, measures = sets_of_rows(rows), shown_of(rows)
    heads = ["stage", *(f"{name}: {m}" for name in sets for m in measures), "FLOPs", "made", "trained", "seconds"]
    lines = []
    for row in rows:
        line = [row["stage"]]
        line += [_cell(m, row["sets"].get(name, {}).get(m)) for name in sets for m in measures]
        cost = row["cost"]
        line += [_large(cost["flops"]), _large(cost["generated"]), _large(cost["trained"]), f"{cost['seconds']:.0f}"]
        lines.append(line)
    return heads, lines


def _cell(measure: str, told: Sequence[float | None] | None) -> str:
    if not told or told[0] is None:
        return "–"
    mean, low, high = told
    if measure == "length":
        return f"{mean:.1f}"
    if measure != "accuracy" or low is None or high is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({max(0.0, low):.3f}–{min(1.0, high):.3f})"


def _large(value: float) -> str:
    return "–" if not value else f"{value:.2e}" if value >= 1e6 else f"{value:,.0f}"


def as_table(rows: Sequence[Row]) -> Table:
    """For the terminal: a column a model, accuracy with half the width of its interval."""
    heads, lines = cells(rows)
    shown = Table("", *(line[0] for line in lines), box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    for place, head in enumerate(heads[1:], 1):
        shown.add_row(head, *(INTERVAL.sub(_half, line[place]) for line in lines))
    return shown


def _half(interval: re.Match[str]) -> str:
    return f" ±{(float(interval[2]) - float(interval[1])) / 2:.3f}"


def as_markdown(recipe: str, rows: Sequence[Row], verdict: Mapping[str, Any] | None = None) -> str:
    """dev.md."""
    parts = [f"# The stages of recipe={recipe}\n", _markdown(*cells(rows))]
    parts.append(
        "Accuracy is the mean over questions of the share of right answers, with its 95 % interval over questions; the "
        "cost of a row is that of its own stage and of those that made its data since the row before, without "
        "evaluation: FLOPs, tokens made, tokens trained, seconds.\n"
    )
    theirs = [row for row in rows if row["published"]]
    if theirs:
        heads = ["stage", *published.SHOWN]
        lines = [[row["stage"], *(f"{row['published'][name]:.1f}" for name in published.SHOWN)] for row in theirs]
        parts.append(f"DeepSeek-R1's own stages, in percent, as published ({published.SOURCE}); not measured here:\n")
        parts.append(_markdown(heads, lines))
    if verdict:
        parts.append("\n".join(f"- {line}" for line in verdict["lines"]) + "\n")
    return "\n".join(parts)


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def draw(path: Path, recipe: str, rows: Sequence[Row]) -> None:
    """Four panels over the stages: accuracy, language and format, answer length, and R1's own figures or the cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9.0, 1.5 * len(rows) + 4), 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"recipe={recipe}", fontsize=12, fontweight="bold", x=0.01, ha="left")
    (accuracy, behaviour), (length, last) = figure.subplots(2, 2)
    names = [row["stage"] for row in rows]
    for axes in (accuracy, behaviour, length, last):
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axes.set_xlim(-0.4, len(names) - 0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _points(accuracy, rows, [(name, "accuracy") for name in sets_of_rows(rows)], "accuracy, with 95 % over questions")
    other = [(name, m) for m in ("language", "format") for name in sets_of_rows(rows)]
    _points(behaviour, rows, other, "language consistency and format")
    _points(length, rows, [(name, "length") for name in sets_of_rows(rows)], "answer length, tokens")
    for axes in (accuracy, behaviour):
        axes.set_ylim(0, 1.03)
    length.set_ylim(bottom=0)
    if any(row["published"] for row in rows):
        _published(last, rows)
    else:
        _costs(last, rows)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _points(axes: Axes, rows: Sequence[Row], curves: Sequence[tuple[str, str]], title: str) -> None:
    for colour, (name, measure) in zip(COLOURS, curves, strict=False):
        told = [row["sets"].get(name, {}).get(measure) for row in rows]
        places = [place for place, one in enumerate(told) if one and one[0] is not None]
        if not places:
            continue
        means = [told[place][0] for place in places]
        spread = [
            [max(0.0, abs(mean - end)) if end is not None and not math.isnan(end) else 0.0 for mean, end in ends]
            for ends in ([(told[p][0], told[p][1]) for p in places], [(told[p][0], told[p][2]) for p in places])
        ]
        label = name if measure in ("accuracy", "length") else f"{name}: {measure}"
        axes.errorbar(places, means, yerr=spread, fmt="o-", color=colour, capsize=3, markersize=5, label=label)
    axes.set_title(title, loc="left", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _published(axes: Axes, rows: Sequence[Row]) -> None:
    places = [place for place, row in enumerate(rows) if row["published"]]
    for colour, name in zip(COLOURS, published.SHOWN, strict=False):
        axes.plot(places, [rows[p]["published"][name] for p in places], "s--", color=colour, markersize=4, label=name)
    axes.set_title("DeepSeek-R1's own, as published, %", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7)


def _costs(axes: Axes, rows: Sequence[Row]) -> None:
    axes.bar(range(len(rows)), [row["cost"]["flops"] for row in rows], color=GREY)
    axes.set_title("FLOPs of the stage", loc="left", fontsize=10)

"""Two arms of a recipe compared: `recipe.compare`, arm → the stages that are its models, one a seed, in the same order.

    answers of the stages of job=eval ─► [seeds, questions] of each arm ─► difference ─► verdict.json and its lines

What is said is what was measured, whichever arm it favours: an arm is ahead only where the 95 % interval of the paired
difference over questions does not hold 0. That interval is of these seeds; the one for other seeds too stands beside it
(offtrail.ablations.intervals), and is wide with few.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtrail.ablations.intervals import two_way
from offtrail.platform.config.recipe import Stage
from offtrail.platform.evaluator.measures import Estimate, over_questions
from offtrail.platform.evaluator.report import RESULTS
from offtrail.platform.launcher.asking import PART, file_of
from offtrail.platform.launcher.stage_cost import Summaries, made_for, together

Outcomes = NDArray[np.float64]
"""[seeds, questions]: the share of right answers."""


def compared(
    arms: Mapping[str, Sequence[str]],
    stages: Sequence[Stage],
    summaries: Summaries,
    answers: Mapping[str, Mapping[str, Outcomes]],
) -> dict[str, Any]:
    """The verdict. ``answers``: stage → set → [questions] share of right answers."""
    (one, ones), (other, others) = arms.items()
    flops = {arm: [together(made_for(name, stages), summaries)["flops"] for name in arms[arm]] for arm in arms}
    found: dict[str, Any] = {"arms": {arm: {"stages": list(arms[arm]), "flops": flops[arm]} for arm in arms}}
    sets, lines = {}, []
    for name in answers[ones[0]]:
        a, b = (np.stack([answers[stage][name] for stage in arm]) for arm in (ones, others))
        sets[name] = of_set(one, a, other, b)
        lines.append(line_of(name, one, other, sets[name], flops, a.shape))
    return found | {"sets": sets, "lines": lines}


def of_set(one: str, a: Outcomes, other: str, b: Outcomes) -> dict[str, Any]:
    """Both arms, and the paired difference ``other`` − ``one``."""
    difference = over_questions((b - a).mean(axis=0))
    wide = two_way(b - a) if len(a) > 1 else None
    said = other if difference.low > 0 else one if difference.high < 0 else ""
    return {
        one: {"accuracy": _triple(over_questions(a.mean(axis=0))), "by_seed": [float(v) for v in a.mean(axis=1)]},
        other: {"accuracy": _triple(over_questions(b.mean(axis=0))), "by_seed": [float(v) for v in b.mean(axis=1)]},
        "difference": _triple(difference),
        "difference_of_other_seeds": [wide.mean, wide.low, wide.high] if wide else None,
        "ahead": said,
    }


def line_of(
    name: str,
    one: str,
    other: str,
    found: Mapping[str, Any],
    flops: Mapping[str, Sequence[float]],
    shape: tuple[int, ...],
) -> str:
    """The verdict of one set in a line."""
    seeds, questions = shape
    spent = {arm: f"{np.mean(flops[arm]):.2e}" for arm in (one, other)}
    said = f"{found['ahead']} is ahead" if found["ahead"] else "undecided, the interval holds 0"
    wide = found["difference_of_other_seeds"]
    also = f"; for other seeds too {_signed(wide)}" if wide else ""
    return (
        f"{name}: {one} {_shown(found[one]['accuracy'])} at {spent[one]} FLOPs, {other} "
        f"{_shown(found[other]['accuracy'])} at {spent[other]}; {other} − {one} = {_signed(found['difference'])} over "
        f"{questions} questions and {seeds} {'seeds' if seeds > 1 else 'seed'}: {said}{also}"
    )


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.mean, estimate.low, estimate.high]


def _shown(triple: Sequence[float]) -> str:
    mean, low, high = triple
    return f"{mean:.3f} ({low:.3f}–{high:.3f})"


def _signed(triple: Sequence[float]) -> str:
    mean, low, high = triple
    return f"{mean:+.3f} ({low:+.3f}–{high:+.3f})"


def shares_of(folder: Path) -> dict[str, Outcomes]:
    """Set → [questions] share of right answers, from the sealed answers of a stage of job=eval. A question whose prompt
    left no room has none, and stands at its place with 0, as in the table: arms are paired by question.
    """
    from offtrail.platform.broker.archive import read_groups  # slow to import
    from offtrail.platform.config.compose import load_config

    main = load_config(folder / "config.yaml").reward.main
    asked = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["n-samples"]
    found = {}
    for name, told in asked.items():
        shares = found[name] = np.zeros(told["original"])
        for first in range(0, len(shares), PART):
            for group in read_groups(file_of(folder, name, first), range(first, first + PART)):
                shares[group.group] = np.nan_to_num(group.components[main].astype(np.float64)).mean()
    return found

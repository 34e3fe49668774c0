"""The rows that job=reward_model and job=prm train on, and those that are held out. No torch: the command reads them
before anything starts, the learner when it begins (labelled.py).

Invariant: no prompt that is held out is trained on.
"""

from __future__ import annotations

import math
from pathlib import Path

from offtrail.core.problem import Problem
from offtrail.platform.config.schema import Config
from offtrail.rewards.steps import Steps
from offtrail.tasks.base import TaskError
from offtrail.tasks.labelled_steps import LabelledAnswer, hard, labelled_in
from offtrail.tasks.preferences import Judged, Pair, judged_in, pairs_in
from offtrail.tasks.split import is_held_out

Row = Pair | Judged | LabelledAnswer


def read(config: Config) -> tuple[list[Row], list[Row]]:
    """The rows that are trained on, and those that are held out. Raises TaskError, one line with file and row, also
    where there are none to train on.
    """
    head = config.head
    assert head is not None
    rows = rows_of(config, "path")
    if head.eval_path:
        held = rows_of(config, "eval_path")
    else:
        held = [row for row in rows if is_held_out(config.job, asked(row.problem), head.held_out_share)]
    prompts = {asked(row.problem) for row in held}
    trained = [row for row in rows if asked(row.problem) not in prompts]
    if not trained:
        raise TaskError(f"{config.job}.path={head.path}: all its prompts are held out; name another file")
    if not held and head.held_out_share and not head.eval_path:
        raise TaskError(
            f"{config.job}.held_out_share={head.held_out_share}: holds out none of {len(rows)} rows of {head.path}; "
            f"raise it, name {config.job}.eval_path, or take 0, which measures nothing"
        )
    return trained, held


def rows_of(config: Config, which: str) -> list[Row]:
    """The rows of PATH or EVAL_PATH. Raises TaskError for one that the objective cannot use."""
    key = f"{config.job}.{which}"
    if config.job == "reward_model":
        model = config.reward_model
        path, read_rows = Path(getattr(model, which)), pairs_in if model.objective == "pairwise" else judged_in
        return list(read_rows(path, model.fields, key, model.reads))
    prm = config.prm
    path = Path(getattr(prm, which))
    answers = list(labelled_in(path, prm.fields, key, Steps.of(prm.cut, "prm.cut")))
    for one in answers:
        if prm.objective == "steps" and not one.labels:
            raise lacking(one, "has no 'labels' of its steps; give them, or set prm.objective=implicit")
        if prm.objective == "implicit" and math.isnan(one.outcome):
            raise lacking(one, "says neither 'label' nor 'labels', so that its outcome is not known; mend the line")
    if prm.objective == "steps" and answers and all(math.isnan(label) for one in answers for label in one.labels):
        raise TaskError(f"{key}={path}: no step of its answers has a label, each is null; label some (job=label)")
    return [hard(one) if prm.labels == "hard" else one for one in answers]


def lacking(row: Row, what: str) -> TaskError:
    """What is wrong with a row, under its place."""
    return TaskError(f"{row.problem.task}, {row.problem.meta['place']}: {what}")


def asked(problem: Problem) -> str:
    """Rows of equal ones are on one side of the split."""
    return " ".join(problem.prompt.split())

"""job=eval: a checkpoint answers held-out problems of one or several sets, n times each.

    problems ─► asking.py: parts of answers, sealed ─► answers/SET-K.parquet ─► measures.py
             ─► eval.json, eval.png, summary.json and the table on the terminal

Everything that is said is said of the sealed parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from offtrail.core.types import FINISH_REASONS, Group
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import sets_of
from offtrail.platform.evaluator.report import Asked, write_results
from offtrail.platform.launcher.asking import (
    Manner,
    Outcome,
    Questions,
    ask,
    check_same,
    groups_of,
    link_model,
    run_asking,
    version_of,
)
from offtrail.platform.launcher.serve import served_model, text_of
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.device import require_device
from offtrail.platform.tracking.held import Meter
from offtrail.rewards.answer import find_answer
from offtrail.rewards.format import parse

STOP = FINISH_REASONS.index("stop")
EVAL_SEED = 0xE7A15E7
"""Mixed into run.seed: answers share no random numbers with training, nor with the evaluation during training."""


def run_evaluation(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=eval: how it ended, and why."""
    return run_asking(evaluate, "evaluator", config, run_dir, interrupted)


def evaluate(config: Config, run_dir: Path, interrupted: list[int], meter: Meter) -> Outcome:
    """Ask what was not asked yet, then say what came of all of it."""
    require_device("engine.device", config.engine.device)
    model = served_model(config)
    link_model(run_dir, model)
    check_same(config, run_dir, "evaluation")
    text, held = text_of(config, model), config.eval
    manner = Manner("evaluator", held.temperature, held.top_p, config.run.seed ^ EVAL_SEED)
    sets = [Questions(one.label, one.config, one.problems(), one.samples) for one in sets_of(config)]
    ask(config, run_dir, text, sets, manner, interrupted, meter)
    found = [collect(run_dir, questions, text) for questions in sets]
    longest = config.sampling.longest_at(version_of(run_dir))
    Console().print(write_results(config, run_dir, model, found, longest))
    return "completed", ""


def collect(run_dir: Path, questions: Questions, text: Text) -> Asked:
    """What came of a set, out of its sealed parts. Questions that left no room for an answer are wrong."""
    Q, n, reward = len(questions.problems), questions.samples, questions.config.reward
    made: dict[int, Group] = dict(groups_of(run_dir, questions))
    scores = np.zeros((Q, n))
    asked = Asked(questions.name, scores, [[None] * n for _ in range(Q)], np.zeros((Q, n)), np.zeros_like(scores))
    for place, group in made.items():
        main = np.nan_to_num(group.components[reward.main].astype(np.float64))
        asked.scores[place], asked.lengths[place] = main, group.lengths
        asked.cut[place] = group.finish != STOP
        told = [text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
        asked.answers[place] = [
            find_answer(words, parse(words), not cut, reward) for words, cut in zip(told, asked.cut[place], strict=True)
        ]
    return asked

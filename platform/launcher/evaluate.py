"""job=eval: a checkpoint answers held-out problems of one or several sets, n times each.

    problems ─► asking.py: parts of answers, sealed ─► answers/SET-K.parquet ─► measures.py
             ─► eval.json, eval.png, summary.json and the table on the terminal

Everything that is said is said of the sealed parts, what the models of scorer.models say too: they are asked in this
process.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import EvalSet, sets_of
from offtrail.platform.evaluator.asked import asked_of
from offtrail.platform.evaluator.report import write_results
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

EVAL_SEED = 0xE7A15E7
"""Mixed into run.seed: answers share no random numbers with training, nor with the evaluation during training."""


def run_evaluation(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=eval: how it ended, and why."""
    return run_asking(evaluate, "evaluator", config, run_dir, interrupted)


def evaluate(config: Config, run_dir: Path, interrupted: list[int], meter: Meter) -> Outcome:
    """Ask what was not asked yet, then say what came of all of it."""
    from offtrail.platform.scorer.local import load_scorers  # torch: no other job of the launcher needs it

    require_device("engine.device", config.engine.device)
    if config.scorer.models:
        require_device("scorer.device", config.scorer.device)
    model = served_model(config)
    link_model(run_dir, model)
    check_same(config, run_dir, "evaluation")
    text, held = text_of(config, model), config.eval
    manner = Manner("evaluator", held.temperature, held.top_p, config.run.seed ^ EVAL_SEED)
    sets = [(one, questions_of(one, text)) for one in sets_of(config)]
    questions, total = [asked for _, asked in sets], sum(len(asked.problems) for _, asked in sets)
    scorers = load_scorers(config, run_dir, text)
    ask(config, run_dir, text, questions, manner, interrupted, meter, total, scorers)
    found = [asked_of(one, asked.problems, dict(groups_of(run_dir, asked)), text) for one, asked in sets]
    longest = config.sampling.longest_at(version_of(run_dir))
    Console().print(write_results(config, run_dir, model, found, longest))
    return "completed", ""


def questions_of(one: EvalSet, text: Text) -> Questions:
    """The questions of a set, each after its examples where it has some."""
    problems = one.problems()
    return Questions(one.label, one.config, problems, one.samples, one.put(problems, chats=text.chats))

"""job=label: the steps of answers are labelled, by what a model makes of their beginnings or by the task's own checker.

    rows of label.paths ─► judged whole (reject.scored) ─► Answer: tokens and step ends
        ─► a method (tasks/step_labels.py) ⇄ asking.py: rollouts from step ends, sealed ─► data.jsonl, for prm.path

A rollout goes on from the prompt's tokens and the answer's own up to the end of a step: the answer is tokenised once,
as a whole, and never split again. Both together are one answer, of at most sampling.max_new_tokens tokens, judged as
every other. Invariant: what is asked in a phase follows from the rows and the sealed parts of the phases before, so
that a job that was cut goes on where it was; with the embedded engine it then writes the same data.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from offtrail.core.types import Int32
from offtrail.platform.config.schema import Config
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
from offtrail.platform.launcher.dataset import as_line, write_about, write_data
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.reject import asked, place_of, plain, scored
from offtrail.platform.launcher.sample import model_of
from offtrail.platform.launcher.serve import served_model, text_of
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.device import require_device
from offtrail.platform.tracking.held import Meter
from offtrail.platform.tracking.summary import read_summary, write_summary
from offtrail.rewards.score_metrics import auc
from offtrail.rewards.steps import Pieces, Steps
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.registry import make_task
from offtrail.tasks.rejection import Candidate
from offtrail.tasks.step_labels import (
    Labels,
    Method,
    Stepped,
    answers_in,
    by_rollouts,
    by_search,
    checked,
    judged_as,
    most_asks,
    noised,
    without_steps,
)

LABEL_SEED = 0x1ABE1
"""Mixed into run.seed: rollouts share no random numbers with the answers that they go on with."""
SECTIONS = ("task", "prompt", "label", "sampling", "reward", "engine")
"""Of the configuration, what decides the data beside the model."""
OWN = ("prompt", "messages", "answer", "steps", "completions", "labels", "label", "gold")
"""Fields that a line says for itself; readers would take `steps` for the answer's."""


@dataclass(frozen=True)
class Answer:
    """One row at its place, its ``tokens`` [T] and the ``ends`` [S] of its steps in them."""

    place: int
    row: Candidate
    tokens: Int32
    ends: Int32
    steps: Stepped


@dataclass
class Found:
    """What came of the rows: counted while they are labelled."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → answers that are no line: no_steps, uneven (steps that cannot be told apart), no_room, unjudged."""
    answers: int = 0
    steps: int = 0
    right: int = 0
    rollouts: int = 0
    tokens: int = 0
    phases: int = 0
    flipped: int = 0
    depths: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Depth from 1 → the labels there are."""
    exact: list[tuple[float, bool]] = field(default_factory=list)
    """(label, whether by the task's checker no step was wrong so far) of every step that has both."""

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        labels = [label for depth in self.depths.values() for label in depth]
        values, good = [value for value, _ in self.exact], [float(one) for _, one in self.exact]
        area = auc(values, good) if self.exact else float("nan")
        return {
            "label/rows": self.rows,
            "label/answers": self.answers,
            "label/answers_right": self.right,
            "label/steps": self.steps,
            "label/steps_labelled": len(labels),
            "label/good_share": float(np.mean(labels)) if labels else 0.0,
            "label/good_by_depth": {str(depth): float(np.mean(own)) for depth, own in sorted(self.depths.items())},
            "label/phases": self.phases,
            "label/rollouts": self.rollouts,
            "label/tokens": self.tokens,
            "label/flipped": self.flipped,
            **({} if area != area else {"label/auc_exact": area}),
            "data/lines": self.answers,
            "data/left_out": dict(self.left_out),
        }

    def table(self) -> Table:
        """For the terminal."""
        told = self.summary()
        shown = Table.grid(padding=(0, 2))
        depths = [f"{share:.2f}" for share in told["label/good_by_depth"].values()]
        rows = {
            "answers labelled": f"{self.answers:,} of {self.rows:,}, {self.right:,} of them right",
            "steps labelled": f"{told['label/steps_labelled']:,} of {self.steps:,}",
            "good": f"{told['label/good_share']:.3f} of these",
            "good by depth": ", ".join(depths[:12]) + (", …" if depths[12:] else ""),
            "rollouts": f"{self.rollouts:,} in {self.phases:,} phases, {self.tokens:,} tokens" if self.rollouts else "",
            "turned by label.noise": f"{self.flipped:,}" if self.flipped else "",
            "AUC against the task's checker": f"{told['label/auc_exact']:.3f}" if "label/auc_exact" in told else "",
            "left out": ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.left_out.items())),
        }
        for name, value in rows.items():
            if value:
                shown.add_row(name, value)
        return shown


def run_labelling(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=label: how it ended, and why."""
    return run_asking(label, "generator", config, run_dir, interrupted)


def label(config: Config, run_dir: Path, interrupted: list[int], meter: Meter) -> Outcome:
    """Judge the rows, ask what was not asked yet, then write the labelled answers and what they are."""
    given, task, found = config.label, make_task(config.task, config.run.seed), Found()
    exact, about = given.method == "exact", dict[str, Any]()
    if not exact:
        require_device("engine.device", config.engine.device)
        model = served_model(config)
        link_model(run_dir, model)
    check_same(config, run_dir, "labelling")
    rows = judged(config, task, interrupted, found)
    if exact:
        labelled = by_checker(config, task, rows, found)
    else:
        about["model"] = model_of(config, model, hashes(inputs_of(config, run_dir)))
        text = text_of(config, model)
        manner = Manner("generator", given.temperature, given.top_p, config.run.seed ^ LABEL_SEED)
        longest = manner.sampling(config, text, version_of(run_dir)).max_new_tokens
        answers = answers_of(config, text, rows, longest, found)
        phases = Phases(config, run_dir, answers, found)
        total = most_asks(given, [one.steps for one in answers])
        ask(config, run_dir, text, phases, manner, interrupted, meter, total)
        labelled = [(one.place, one.row, labels) for one, labels in zip(answers, phases.labels, strict=True)]
    data = write_data(run_dir, lines_of(config, task, labelled, found))
    told = found.summary()
    if not data["lines"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in found.left_out.items())
        return "failed", f"{without_steps(given, config.task.name, found.rows)} ({reasons})"
    write_about(
        run_dir, config, SECTIONS, {**about, "counts": told, "data": data, "inputs": hashes(inputs_of(config, run_dir))}
    )
    write_summary(run_dir, read_summary(run_dir) | told)
    Console().print(found.table(), highlight=False)
    return "completed", ""


def judged(config: Config, task: Task, interrupted: list[int], found: Found) -> list[tuple[int, Candidate]]:
    """(place, row with the verdict on its whole answer) of each, in order."""
    candidates = answers_in(config.label, task, config.task)
    rows = sorted(scored(config, candidates, interrupted), key=lambda row: row[0])
    found.rows = len(rows)
    known = [(place, one) for place, one in rows if one.reward is not None]
    if len(known) < len(rows):
        found.left_out["unjudged"] = len(rows) - len(known)
    return known


def is_right(one: Candidate) -> bool:
    """Whether the whole answer was judged right."""
    return (one.reward or 0.0) >= 1.0


def by_checker(
    config: Config, task: Task, rows: Sequence[tuple[int, Candidate]], found: Found
) -> list[tuple[int, Candidate, Labels]]:
    """Each answer whose steps are those that the task's checker sees, with its verdicts."""
    cut, labelled = Steps.of(config.label.cut, "label.cut"), []
    for place, one in rows:
        labels, steps = checked(one, task), len(cut.cut(one.problem.answer))
        if not labels or len(labels) != steps:
            found.left_out["uneven" if labels and steps else "no_steps"] += 1
            continue
        labelled.append((place, one, Labels(labels)))
    return labelled


def answers_of(
    config: Config, text: Text, rows: Sequence[tuple[int, Candidate]], longest: int, found: Found
) -> list[Answer]:
    """The answers as tokens, without their stop token, but for those that cannot be gone on with; ``longest``: tokens
    of an answer.
    """
    problems, cut = [one.problem for _, one in rows], Steps.of(config.label.cut, "label.cut")
    pieces = Pieces(lambda ids: str(text.tokenizer.decode(ids, skip_special_tokens=False)), text.stop_token_ids)
    prompts, outputs = text.encode_all(problems), text.encode_answers(problems, [one.answer for one in problems])
    answers = []
    for (place, one), prompt, tokens in zip(rows, prompts, outputs, strict=True):
        parts = pieces.of(tokens)
        ends = cut.ends(parts, text.opened(one.problem))
        if not len(ends):
            found.left_out["no_steps"] += 1
            continue
        if cut.by != "tokens" and len(cut.cut(one.problem.answer)) != len(ends):
            found.left_out["uneven"] += 1
            continue
        whole = not "".join(parts[ends[-1] :]).strip()
        steps = Stepped(len(ends), is_right(one), whole)
        last = int(ends[steps.asked - 1]) if steps.asked else 0
        if len(prompt) + longest > config.model.max_length or last >= longest:
            found.left_out["no_room"] += 1
            continue
        answers.append(Answer(place, one, tokens[:-1], ends, steps))
    return answers


class Phases:
    """The questions of a method, phase by phase: the next ones are there when those before are sealed. After the last,
    ``labels`` has those of each answer.
    """

    def __init__(self, config: Config, run_dir: Path, answers: Sequence[Answer], found: Found) -> None:
        self._config, self._run_dir, self._answers, self._found = config, run_dir, answers, found
        self.labels: list[Labels] = []

    def __iter__(self) -> Iterator[Questions]:
        given, steps = self._config.label, [one.steps for one in self._answers]
        method: Method = (
            by_search(steps) if given.method == "search" else by_rollouts(steps, hard=given.labels == "hard")
        )
        first = 0
        try:
            asks = next(method)
            for phase in count(1):
                answers = [self._answers[place] for place, _ in asks]
                questions = Questions(
                    f"phase_{phase}",
                    self._config,
                    [judged_as(one.row, self._config.task.name) for one in answers],
                    given.rollouts,
                    first=first,
                    begun=[one.tokens[: one.ends[kept - 1]] for one, (_, kept) in zip(answers, asks, strict=True)],
                )
                yield questions
                first += len(asks)
                asks = method.send(self._shares(questions))
        except StopIteration as end:
            self.labels = end.value

    def _shares(self, questions: Questions) -> list[float]:
        """Of each question the share of right rollouts; NaN where there was no room for any."""
        shares, found = [float("nan")] * len(questions.problems), self._found
        for place, group in groups_of(self._run_dir, questions):
            main = np.nan_to_num(group.components[self._config.reward.main])
            shares[place] = float((main >= 1.0).mean())
            found.rollouts += group.size
            found.tokens += int(group.lengths.sum())
        found.phases += bool(shares)
        return shares


def lines_of(
    config: Config, task: Task, labelled: Sequence[tuple[int, Candidate, Labels]], found: Found
) -> Iterator[str]:
    """The lines of data.jsonl, in the order of the rows; ``found`` is told of them."""
    for place, one, sure in labelled:
        labels, turned = noised(sure, config.label.noise, config.run.seed, place)
        found.answers += 1
        found.steps += len(labels)
        found.right += is_right(one)
        found.flipped += len(turned)
        for depth, value in enumerate(labels, start=1):
            if value is not None:
                found.depths[depth].append(float(value))
        found.exact += compared(one, task, labels)
        names = {*OWN, config.label.prompt_field, config.label.answer_field, config.label.gold_field}
        rest = {name: value for name, value in one.fields.items() if name not in names}
        yield as_line(
            {
                **asked(one.problem),
                "answer": one.problem.answer,
                "labels": [round(value, 6) if type(value) is float else value for value in labels],
                "label": is_right(one),
                "gold": one.gold,
                **plain(rest),
                **({"turned": turned} if turned else {}),
                "labelled_by": config.label.method,
                "from": place_of(one),
            }
        )


def compared(one: Candidate, task: Task, labels: Labels) -> list[tuple[float, bool]]:
    """(label, whether no step was wrong so far) of the labelled steps of an answer that the task can check."""
    try:
        verdicts = checked(one, task)
    except TaskError:  # no problem of the task's own
        return []
    if len(verdicts) != len(labels):
        return []
    good = np.logical_and.accumulate(verdicts).tolist()
    return [(float(value), right) for value, right in zip(labels, good, strict=True) if value is not None]

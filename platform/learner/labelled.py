"""Labelled answers as tokens: what job=reward_model and job=prm train on, and what they are measured by.

    labelled_rows.read ──► Item (tokens) ──► Labelled.table: the batch of an update
                                        └──► held_out.py: scores of a version

Invariants: the batch of a step is a function of the settings and the step alone, as in data.py; steps end where the
answer's own tokens do (rewards/steps.py), as in an answer that is scored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offtrail.core.types import Float32, Int32
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.labelled_rows import Row, lacking, read
from offtrail.platform.learner.reward_objectives import LabelledSteps, ScoredAnswers
from offtrail.platform.model.packing import SampleTable, table_of
from offtrail.platform.model.text import Text
from offtrail.rewards.steps import Pieces, Steps, answer_from, token_ends
from offtrail.tasks.base import TaskError
from offtrail.tasks.files import permutation
from offtrail.tasks.labelled_steps import LabelledAnswer, check_count
from offtrail.tasks.preferences import Judged, Pair

log = logging.getLogger("offtrail.learner")


@dataclass(frozen=True)
class Item:
    """One row as tokens: a prompt, its ``outputs`` and how good each is (NaN: not known). Of the one output of a row
    with labelled steps also where they end, ``ends`` [S], and their ``labels`` [S], NaN of a step without one.
    """

    prompt: Int32
    outputs: tuple[Int32, ...]
    scores: tuple[float, ...]
    ends: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    labels: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def longest(self) -> int:
        """Tokens of its longest sample."""
        return len(self.prompt) + max(map(len, self.outputs))


class Labelled:
    """The items of a run: ``table`` gives the batch of an update, a permutation of all of them in each epoch; ``held``
    are those that are held out.
    """

    def __init__(self, config: Config, text: Text) -> None:
        head = config.head
        assert head is not None
        self.head, self.batch_of = head, batch_of(config)
        trained, self.held = (self._items(config, text, rows) for rows in read(config))
        self.items = trained

    def table(self, step: int) -> Any:
        """See LocalSource."""
        places = drawn(len(self.items), self.head.batch_size, step, self.head.seed)
        return self.batch_of([self.items[place] for place in places])

    def _items(self, config: Config, text: Text, rows: Sequence[Row]) -> list[Item]:
        """Raises TaskError for a row that is too long, unless such are dropped."""
        items = items_of(config, text, rows)
        longest = config.model.max_length
        long = [i for i, item in enumerate(items) if item.longest > longest]
        if long and (self.head.long == "refuse" or len(long) == len(items)):
            what = f"prompt and answer take {items[long[0]].longest} tokens, more than model.max_length={longest}"
            way = f"raise it, or set {config.job}.long=drop"
            raise lacking(rows[long[0]], f"{what} ({len(long)} of {len(items)} rows do); {way}")
        if long:
            log.warning("%d of %d rows are longer than model.max_length, and left out", len(long), len(items))
        return [item for item in items if item.longest <= longest]


def drawn(n: int, size: int, update: int, seed: int) -> list[int]:
    """The places of an update's items among n: all of them once in each epoch, in an order of its own."""
    places = (divmod(update * size + i, n) for i in range(size))
    return [permutation(n, seed, epoch)[i] for epoch, i in places]


def items_of(config: Config, text: Text, rows: Sequence[Row]) -> list[Item]:
    """Rows of one kind as tokens. Raises TaskError for a text that the tokenizer lacks, and for steps that cannot be
    told apart in tokens.
    """
    problems = [row.problem for row in rows]
    pieces = Pieces(lambda ids: str(text.tokenizer.decode(ids, skip_special_tokens=False)), text.stop_token_ids)
    cut, of = Steps.of(config.prm.cut, "prm.cut"), config.reward_model.reads

    def outputs(texts: Sequence[str]) -> list[Int32]:
        tokens = text.encode_answers(problems, texts)
        answer_alone = config.job == "reward_model" and of == "answer"
        return [t[answer_from(pieces.of(t)) :] for t in tokens] if answer_alone else tokens

    def with_steps(prompt: Int32, output: Int32, row: LabelledAnswer) -> Item:
        ends = step_ends(row, pieces.of(output), cut, text.opened(row.problem)) if row.labels else np.zeros(0, np.int32)
        return Item(prompt, (output,), (row.outcome,), ends, np.array(row.labels, np.float32))

    if not rows:
        return []
    prompts = text.encode_all(problems)
    if pairs := [row for row in rows if isinstance(row, Pair)]:
        both = zip(outputs([pair.chosen for pair in pairs]), outputs([pair.rejected for pair in pairs]), strict=True)
        return [Item(prompt, answers, (1.0, 0.0)) for prompt, answers in zip(prompts, both, strict=True)]
    if judged := [row for row in rows if isinstance(row, Judged)]:
        answers = zip(prompts, outputs([row.answer for row in judged]), judged, strict=True)
        return [Item(prompt, (answer,), (row.label,)) for prompt, answer, row in answers]
    labelled = [row for row in rows if isinstance(row, LabelledAnswer)]
    return list(map(with_steps, prompts, outputs([row.text for row in labelled]), labelled))


def step_ends(row: LabelledAnswer, pieces: Sequence[str], cut: Steps, opened: str) -> Int32:
    """[S] where the labelled steps end in the answer's tokens. Raises TaskError where they are not one a label."""
    where = f"{row.problem.task}, {row.problem.meta['place']}"
    if row.ends is None:
        ends = cut.ends(pieces, opened)
        check_count(len(row.labels), len(ends), cut, where)
        return ends
    if "".join(pieces) != row.text:
        raise TaskError(f"{where}: the tokenizer gives the text back otherwise, so that its steps have no place in it")
    ends = token_ends(pieces, row.ends)
    if len(ends) != len(row.labels):
        raise TaskError(f"{where}: two of its steps end in one token; mend the line, or set prm.cut")
    return ends


def batch_of(config: Config) -> Callable[[Sequence[Item]], Any]:
    """What makes a batch of items for the objective of a configuration."""
    steps = config.job == "prm" and config.prm.objective == "steps"
    return steps_batch if steps else answers_batch


def table(items: Sequence[Item]) -> SampleTable:
    """The samples of items, each item a group."""
    return table_of([item.prompt for item in items], [item.outputs for item in items])


def answers_batch(items: Sequence[Item]) -> ScoredAnswers:
    """Answers and their scores."""
    return ScoredAnswers(table(items), torch.tensor([score for item in items for score in item.scores]))


def steps_batch(items: Sequence[Item]) -> LabelledSteps:
    """Answers and the labels of their steps."""
    rows = table(items)
    labels = np.full(len(rows.tokens), np.nan, np.float32)
    for start, item in zip(rows.starts[:-1], items, strict=True):
        labels[start + item.ends - 1] = item.labels
    return LabelledSteps(rows, torch.from_numpy(labels))

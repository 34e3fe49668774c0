"""Data that the learner has itself: examples to imitate, from the task's worked answers or from a file (job=sft), or
labelled answers (labelled.py).

    role.py ──► LocalSource.next(step) ──► broker: is there such a step? ──► Examples.table(step)

The broker holds the run's last step, its log and its checkpoints for every job; where a job has no groups, its batch of
a step is empty, and what is trained stands here. Invariant: the table of a step is a function of the settings and the
step alone, so that every rank makes the same one and a resumed run trains what the first would have.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from offtrail.core.types import Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.labelled import Labelled
from offtrail.platform.learner.objectives import rows_of_pairs
from offtrail.platform.learner.sources import BrokerSource
from offtrail.platform.model.packing import SampleTable
from offtrail.platform.model.text import Text
from offtrail.tasks.base import Task
from offtrail.tasks.examples import left_out, read_examples, too_long
from offtrail.tasks.files import permutation
from offtrail.tasks.registry import make_task, overlaps_of_examples, policies_of, without_overlaps

log = logging.getLogger("offtrail.learner")

SFT_SEED = 0x5F7
"""Keys the order of the task's problems, with sft.seed: others than those that reinforcement learning begins with."""


class Examples(Protocol):
    """Prompts and answers, to imitate or with labels."""

    def table(self, step: int) -> Any:
        """The examples of one update, as the job's objective takes them."""


class LocalSource:
    """The learner's own batches, one for each step that the broker knows of."""

    def __init__(self, broker: BrokerSource, examples: Examples) -> None:
        self.broker, self.examples = broker, examples

    @property
    def finished(self) -> bool:
        """See BrokerSource."""
        return self.broker.finished

    def next(self, step: int) -> Any:
        """The table of ``step``; None when the run stops, or is ``finished``."""
        return None if self.broker.next(step) is None else self.examples.table(step)


def make_examples(config: Config, text: Text) -> Examples:
    """Those of job=sft: the lines of sft.path, without what task.decontaminate=drop leaves out, or the task's worked
    answers. Of the jobs that train a model to score: labelled answers.
    """
    if config.head is not None:
        return Labelled(config, text)
    sft, max_length = config.sft, config.model.max_length
    if sft.path:
        examples = read_examples(Path(sft.path), sft.prompt_field, sft.answer_field)
        if "drop" in policies_of(config.task):
            overlaps = overlaps_of_examples(make_task(config.task, config.run.seed), examples)
            examples = without_overlaps(examples, overlaps)
        return FileExamples(
            examples, text, batch_size=sft.batch_size, seed=sft.seed, max_length=max_length, drop=sft.long == "drop"
        )
    task = make_task(config.task, sft.seed + SFT_SEED)
    return Traces(task, text, batch_size=sft.batch_size, seed=sft.seed, max_length=max_length)


class Traces:
    """Fresh problems with worked answers at every step, each prompt in the data order once."""

    def __init__(self, task: Task, text: Text, *, batch_size: int, seed: int, max_length: int) -> None:
        self.task, self.text, self.batch_size = task, text, batch_size
        self.seed, self.max_length = seed, max_length

    def table(self, step: int) -> SampleTable:
        """Raises TaskError when the tokenizer does not know a text, and ValueError when a problem and its answer exceed
        model.max_length.
        """
        problems = [self.task.train(step * self.batch_size + i) for i in range(self.batch_size)]
        rng = random.Random(f"sft-{self.seed}-{step}")
        prompts = self.text.encode_all(problems)
        answers = self.text.encode_answers(problems, [self.task.trace(p, rng) for p in problems])
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        if longest > self.max_length:
            raise ValueError(
                f"model.max_length={self.max_length}: a problem of task={self.task.name} with its worked answer takes "
                f"{longest} tokens; raise it, or make the task easier"
            )
        return rows_of_pairs(prompts, answers)


class FileExamples:
    """The examples of a file, a permutation of all of them in each epoch, keyed by (seed, epoch).

    ``drop``: those above ``max_length`` tokens are left out, and ``dropped`` counts them; else they raise TaskError.
    """

    def __init__(
        self, examples: Sequence[Problem], text: Text, *, batch_size: int, seed: int, max_length: int, drop: bool
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        prompts = text.encode_all(examples)
        answers = text.encode_answers(examples, [example.answer for example in examples])
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        long = too_long(examples, lengths, max_length, drop=drop)
        self.dropped = len(long)
        if long:
            log.warning("%s", left_out(examples, long, max_length))
        self.pairs = [pair for *pair, n in zip(prompts, answers, lengths, strict=True) if n <= max_length]

    def table(self, step: int) -> SampleTable:
        """See Examples.table."""
        n = len(self.pairs)
        places = (divmod(step * self.batch_size + i, n) for i in range(self.batch_size))
        prompts, answers = zip(*(self.pairs[permutation(n, self.seed, epoch)[i]] for epoch, i in places), strict=True)
        return rows_of_pairs(prompts, answers)

"""Data that the learner has itself: examples to imitate, from the task's worked answers or from a file (job=sft).

    role.py ──► LocalSource.next(step) ──► broker: is there such a step? ──► Examples.table(step)

The broker holds the run's last step, its log and its checkpoints for every job; where a job has no groups, its batch of
a step is empty, and what is trained stands here. Invariant: the table of a step is a function of the settings and the
step alone, so that every rank makes the same one and a resumed run trains what the first would have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from offtrail.core.types import Int32, Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.objectives import rows_of_pairs
from offtrail.platform.learner.sources import BrokerSource
from offtrail.platform.model.packing import SampleTable
from offtrail.tasks.base import Task
from offtrail.tasks.jsonl import permutation
from offtrail.tasks.registry import make_task
from offtrail.tasks.text import check_known

SFT_SEED = 0x5F7
"""Of the order of the task's problems, beside sft.seed: others than those that reinforcement learning begins with."""

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


class DataError(ValueError):
    """A file of examples cannot be used; one line with file, line and the way out."""


class Examples(Protocol):
    """Prompts and the answers to imitate."""

    def table(self, step: int) -> SampleTable:
        """The examples of one update."""


class LocalSource:
    """The learner's own batches, one for each step that the broker knows of."""

    def __init__(self, broker: BrokerSource, examples: Examples) -> None:
        self.broker, self.examples = broker, examples

    def next(self, step: int) -> SampleTable | None:
        """The table of ``step``; None when the run stops."""
        return None if self.broker.next(step) is None else self.examples.table(step)


def make_examples(config: Config, tokenizer: Any) -> Examples:
    """Those of job=sft: the lines of sft.path, or the task's worked answers."""
    sft = config.sft
    if sft.path:
        return FileExamples(
            read_examples(Path(sft.path), sft.prompt_field, sft.answer_field), tokenizer, batch_size=sft.batch_size,
            seed=sft.seed, max_length=config.model.max_length, drop=sft.long == "drop", path=sft.path,
        )  # fmt: skip
    task = make_task(config.task, sft.seed + SFT_SEED)
    return Traces(task, tokenizer, batch_size=sft.batch_size, seed=sft.seed, max_length=config.model.max_length)


class Traces:
    """Fresh problems with worked answers at every step, each prompt in the data order once."""

    def __init__(self, task: Task, tokenizer: Any, *, batch_size: int, seed: int, max_length: int) -> None:
        self.task, self.tokenizer, self.batch_size = task, tokenizer, batch_size
        self.seed, self.max_length = seed, max_length

    def table(self, step: int) -> SampleTable:
        """Raises TaskError when the tokenizer does not know a text, and ValueError when a problem and its answer exceed
        model.max_length.
        """
        problems = [self.task.train(step * self.batch_size + i) for i in range(self.batch_size)]
        rng = random.Random(f"sft-{self.seed}-{step}")
        prompts = self._encode(problems, [p.prompt for p in problems])
        traces = [self.task.trace(p, rng) for p in problems]
        answers = self._encode(problems, traces, end=[self.tokenizer.eos_token_id])
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        if longest > self.max_length:
            raise ValueError(
                f"model.max_length={self.max_length}: a problem of task={self.task.name} with its worked answer takes "
                f"{longest} tokens; raise it, or make the task easier"
            )
        return rows_of_pairs(prompts, answers)

    def _encode(self, problems: Sequence[Problem], texts: Sequence[str], end: Sequence[int] = ()) -> list[Int32]:
        tokens = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for problem, text, known in zip(problems, texts, tokens, strict=True):
            check_known(self.tokenizer, problem, text, known)
        return [np.array([*t, *end], np.int32) for t in tokens]


@dataclass(frozen=True)
class Example:
    """One line of a file: a text or messages, the answer to imitate, and where it stands."""

    prompt: str | list[Message]
    answer: str
    line: int


class FileExamples:
    """The examples of a file, a permutation of all of them in each epoch, keyed by (seed, epoch).

    ``drop``: those above ``max_length`` tokens are left out, and ``dropped`` counts them; else they raise DataError.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, *, batch_size: int, seed: int, max_length: int, drop: bool,
        path: str,
    ) -> None:  # fmt: skip
        self.batch_size, self.seed = batch_size, seed
        encoded = [(example, *encode_example(tokenizer, example)) for example in examples]
        long = [(e, len(p) + len(a)) for e, p, a in encoded if len(p) + len(a) > max_length]
        if long and not drop:
            example, tokens = long[0]
            raise DataError(
                f"sft.path={path}, line {example.line}: prompt and answer take {tokens} tokens, more than "
                f"model.max_length={max_length} ({len(long)} of {len(encoded)} do); raise it, or set sft.long=drop"
            )
        self.pairs = [(p, a) for _, p, a in encoded if len(p) + len(a) <= max_length]
        self.dropped = len(long)
        if not self.pairs:
            raise DataError(
                f"sft.path={path}: all {self.dropped} examples are longer than model.max_length={max_length}; raise it"
            )

    def table(self, step: int) -> SampleTable:
        """See Examples.table."""
        n = len(self.pairs)
        places = (divmod(step * self.batch_size + i, n) for i in range(self.batch_size))
        chosen = [self.pairs[permutation(n, self.seed, epoch)[place]] for epoch, place in places]
        return rows_of_pairs([p for p, _ in chosen], [a for _, a in chosen])


def encode_example(tokenizer: Any, example: Example) -> tuple[Int32, Int32]:
    """Prompt [P] and answer [A] with the end token: a text as it stands, messages by the model's chat template."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise DataError(
                f"sft.path, line {example.line}: messages need a tokenizer with a chat template, and this model has "
                "none; give the prompt as text, or another model.path"
            )
        prompt = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, example.answer)]
    if not ids[0]:
        raise DataError(f"sft.path, line {example.line}: the prompt has no tokens; fill it, or delete the line")
    for text, known in zip((prompt, example.answer), ids, strict=True):
        check_known(tokenizer, Problem("sft.path", example.line, text, ""), text, known)
    return np.array(ids[0], np.int32), np.array([*ids[1], tokenizer.eos_token_id], np.int32)


def read_examples(path: Path, prompt_field: str, answer_field: str) -> list[Example]:
    """The lines of a JSON-lines file; blank ones are skipped. Raises DataError with file and line.

    A line has a prompt (a text or a list of messages) and an answer; or ``messages`` alone, whose last is the
    assistant's answer.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"sft.path={path}: {error.strerror or error}; name a readable JSON-lines file") from error
    rows = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"sft.path={path}: the file holds no examples; write one JSON object a line")
    return [_example(line, i, f"sft.path={path}, line {i}", prompt_field, answer_field) for i, line in rows]


def _example(line: bytes, number: int, where: str, prompt_field: str, answer_field: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); write one object a line, or delete the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}, not an object; write {{…}}, or delete the line")
    if "messages" in row and prompt_field not in row:
        *before, last = _messages(row["messages"], where)
        if answer_field not in row and last["role"] == "assistant" and before:
            return Example(before, last["content"], number)
        prompt: str | list[Message] = [*before, last]
    elif isinstance(row.get(prompt_field), list):
        prompt = _messages(row[prompt_field], where)
    else:
        prompt = _text(row, prompt_field, "sft.prompt_field", where)
    return Example(prompt, _text(row, answer_field, "sft.answer_field", where), number)


def _messages(value: Any, where: str) -> list[Message]:
    fits = isinstance(value, list) and value and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip
    if not fits:
        raise DataError(
            f'{where}: messages must be a list of {{"role": {" | ".join(ROLES)}, "content": text}}; mend the line'
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _text(row: dict[str, Any], name: str, key: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        known = ", ".join(map(repr, row)) or "none"
        what = "is missing" if value is None else "is empty" if isinstance(value, str) else "is not text"
        raise DataError(f"{where}: field {name!r} {what} (fields: {known}); mend the line, or set {key}")
    return value

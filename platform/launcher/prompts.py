"""Whether prompts fit the model, before anything starts: those of files, which are read anyway, and every task's
held-out ones; and whether examples do, with their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import islice

from offtrail.core.problem import Problem
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.model import characters
from offtrail.platform.model.folder import folder_of
from offtrail.platform.model.lengths import Asked, lengths
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.examples import left_out, too_long
from offtrail.tasks.registry import sets_of

LOOKED_AT = 10_000
"""Prompts of a set that are counted, evenly over it."""

HELD_OUT = "eval.prompts"

Count = Callable[[list[Problem], bool], list[int | str]]
"""Of each problem the tokens of its prompt, with True and of its answer as it is imitated; or why it has none. Empty
where that cannot be told.
"""


def counter(config: Config, handed: Collection[str]) -> Count | None:
    """What counts the tokens of the start model: a process of its own, or here where it is the small one that has a
    token a character; None where no model is there yet. ``handed``: keys that an earlier stage gives another value.
    """
    if "model.path" in handed:
        return None
    if not config.model.path:
        return characters.count
    folder = folder_of(config.model.path)
    return None if folder is None else lambda *asked: lengths(Asked(str(folder), config.prompt, *asked))


def check_prompts(config: Config, task: Task, count: Count, note: Callable[[str], None]) -> None:
    """Raise ConfigError where none of a set's prompts can be answered by the model, or none of the held-out ones, or
    one of these cannot be put to it; ``note`` hears how many of how many cannot.
    """
    few = {where: problems[:: -(-len(problems) // LOOKED_AT)] for where, problems in sets_of(task).items()}
    few[HELD_OUT] = task.held_out(config.eval.prompts)
    counted = iter(count([one for problems in few.values() for one in problems], False))
    for where, problems in few.items():
        tokens = list(islice(counted, len(problems)))
        told, none = told_of(tokens, config)
        if none or (where == HELD_OUT and any(isinstance(n, str) for n in tokens)):
            raise ConfigError(f"{where}: {told}")
        if told:
            becomes = "count as wrong" if where == HELD_OUT else "are refused as failed, and never trained"
            note(f"{where}: {told}; they {becomes}")


def check_examples(config: Config, examples: Sequence[Problem], count: Count, note: Callable[[str], None]) -> None:
    """Raise TaskError where the learner would: an example is too long for the model, or cannot be put to it. Of a large
    file the longest texts are counted. ``note`` hears of what is left out.
    """
    by_text = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].answer))
    looked_at = sorted(by_text[-LOOKED_AT:])
    tokens = [0] * len(examples)
    for place, n in zip(looked_at, count([examples[i] for i in looked_at], True), strict=False):
        if isinstance(n, str):
            raise TaskError(n)
        tokens[place] = n
    longest = config.model.max_length
    if long := too_long(examples, tokens, longest, drop=config.sft.long == "drop"):
        note(left_out(examples, long, longest))


def told_of(counted: Sequence[int | str], config: Config) -> tuple[str, bool]:
    """What is to be said of prompts of these lengths, and whether none of them can be answered."""
    new, longest = config.sampling.longest_at(config.learner.steps), config.model.max_length
    asked = f"sampling.max_new_tokens={config.sampling.max_new_tokens}"
    if new > config.sampling.max_new_tokens:
        asked += f" ({new} from sampling.growth_step={config.sampling.growth_step} on)"
    tokens = [n for n in counted if isinstance(n, int)]
    wrong = [n for n in counted if isinstance(n, str)]
    long = [n for n in tokens if n + new > longest]
    parts = []
    if long:
        parts.append(
            f"{len(long):,} of {len(counted):,} prompts leave no room for {asked} in "
            f"model.max_length={longest} (the longest takes {max(long):,} tokens): raise it, or lower "
            "sampling.max_new_tokens"
        )
    if wrong:
        parts.append(f"{len(wrong):,} of {len(counted):,} prompts cannot be put to the model, the first: {wrong[0]}")
    return "; ".join(parts), bool(counted) and len(long) + len(wrong) == len(counted)

"""Whether the prompts of a set fit the model, before anything starts: those of files, which are read anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.model.lengths import Asked, lengths
from offtrail.tasks.base import Task
from offtrail.tasks.registry import sets_of

LOOKED_AT = 10_000
"""Prompts of a set that are counted, evenly over it."""

HELD_OUT = "eval.prompts"


def check_prompts(config: Config, task: Task, folder: Path, note: Callable[[str], None]) -> None:
    """Raise ConfigError where none of a set's prompts can be answered by the model in ``folder``, or none of the
    held-out ones; ``note`` hears how many of how many cannot.
    """
    if not (sets := sets_of(task)):
        return
    few = {where: problems[:: -(-len(problems) // LOOKED_AT)] for where, problems in sets.items()}
    few[HELD_OUT] = task.held_out(config.eval.prompts)
    counted = iter(lengths(Asked(str(folder), config.prompt, [one for problems in few.values() for one in problems])))
    for where, problems in few.items():
        told, none = told_of(list(islice(counted, len(problems))), config)
        if none:
            raise ConfigError(f"{where}: {told}")
        if told:
            becomes = "count as wrong" if where == HELD_OUT else "are refused as failed, and never trained"
            note(f"{where}: {told}; they {becomes}")


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

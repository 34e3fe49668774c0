"""Whether prompts fit the model, before anything starts: those of files, which are read anyway, and every held-out
set's; and whether examples do, with their answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from offtrail.core.problem import Problem
from offtrail.platform.config.checkpoints import model_folder, run_folder, step_of
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.keys import QUESTIONING
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import sets_of as sets_of_run
from offtrail.platform.model import characters
from offtrail.platform.model.folder import folder_of, has_template
from offtrail.platform.model.lengths import Asked, lengths
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.examples import left_out, too_long
from offtrail.tasks.overlap import question_of
from offtrail.tasks.registry import sets_of
from offtrail.tasks.templates import task_template

LOOKED_AT = 10_000
"""Prompts of a set that are counted, evenly over it."""

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
        return partial(characters.count, more=config.model.characters)
    folder = folder_of(config.model.path)
    return None if folder is None else lambda *asked: lengths(Asked(str(folder), config.prompt, *asked))


def counter_of_checkpoint(config: Config) -> Count | None:
    """The same for the model that job=eval, sample or label asks."""
    if (folder := asked_folder(config)) is None:
        return None
    run = run_folder(str(folder)) or run_folder(config.checkpoint)
    with contextlib.suppress(ConfigError, OSError):  # the run of another offtrail
        made = load_config(run / "config.yaml").model if run is not None else None
        if made is not None and not made.path:
            return partial(characters.count, more=made.characters)
    return lambda *asked: lengths(Asked(str(folder), config.prompt, *asked))


def asked_folder(config: Config) -> Path | None:
    """Where the model of job=eval, sample and label is; None where it is only known to servers, or not made yet."""
    return (model_folder(config.checkpoint) or folder_of(config.checkpoint)) if config.checkpoint else None


def check_asked(config: Config, put: Sequence[Problem], count: Count, note: Callable[[str], None]) -> None:
    """Raise ConfigError where none of the prompts of job=sample, as they are put to the model, can be answered by it;
    ``note`` hears how many cannot.
    """
    told, none = told_of(count(list(put[:: -(-len(put) // LOOKED_AT)]), False), config)
    if none:
        raise ConfigError(f"sample.prompts: {told}")
    if told:
        note(f"sample.prompts: {told}; they are left out")


def checkpoint_chats(config: Config) -> bool:
    """Whether the model that job=eval asks is asked through a chat template."""
    folder = asked_folder(config)
    chats = folder is not None and has_template("checkpoint", config.checkpoint, folder)
    return chats and config.prompt.chat != "never"


def check_prompts(
    config: Config, task: Task, sets: Mapping[str, list[Problem]], count: Count, note: Callable[[str], None]
) -> None:
    """Raise ConfigError where none of a file's training prompts can be answered by the model; and see
    check_held_out.
    """
    training = {where: problems[:: -(-len(problems) // LOOKED_AT)] for where, problems in sets_of(task).items()}
    _check_room(config, training, sets, count, note)


def check_held_out(
    config: Config, sets: Mapping[str, list[Problem]], count: Count, note: Callable[[str], None]
) -> None:
    """Raise ConfigError where none of the held-out prompts of a set (key → problems) can be answered by the model, or
    one of them cannot be put to it; ``note`` hears how many of how many cannot.
    """
    _check_room(config, {}, sets, count, note)


def _check_room(
    config: Config,
    training: Mapping[str, list[Problem]],
    held_out: Mapping[str, list[Problem]],
    count: Count,
    note: Callable[[str], None],
) -> None:
    counted = iter(
        count([one for sets in (training, held_out) for problems in sets.values() for one in problems], False)
    )
    for sets, becomes in (
        (training, "are refused as failed, and never trained"),
        (held_out, "count as wrong"),
    ):
        for where, problems in sets.items():
            tokens = list(islice(counted, len(problems)))
            told, none = told_of(tokens, config)
            if none or (sets is held_out and any(isinstance(n, str) for n in tokens)):
                raise ConfigError(f"{where}: {told}")
            if told:
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


def remarks_on_trained(config: Config, task: Task, sets: Mapping[str, list[Problem]]) -> list[str]:
    """What to say of questions of eval.sets that stand among a file's training problems too, up to blanks and template:
    task.decontaminate_against finds more.
    """
    trained = {bare(problem, config.task) for problems in sets_of(task).values() for problem in problems}
    said = []
    for one in sets_of_run(config)[1:]:
        key = f"eval.sets.{one.label}"
        both = [problem for problem in sets[key] if bare(problem, one.config.task) in trained]
        if both:
            said.append(
                f"{key}: {len(both):,} of its {len(sets[key]):,} questions are training problems, such as "
                f"{bare(both[0], one.config.task)[:60]!r}; take them out of task.path, or see task.decontaminate=drop"
            )
    return said


def bare(problem: Problem, config: TaskConfig) -> str:
    """A prompt without its task's template, and with single blanks."""
    return " ".join(question_of(problem, [task_template(config)]).split())


def told_of(counted: Sequence[int | str], config: Config) -> tuple[str, bool]:
    """What is to be said of prompts of these lengths, and whether none of them can be answered."""
    step = step_of(config.checkpoint) if config.job in QUESTIONING else config.learner.steps
    new, longest = config.sampling.longest_at(step), config.model.max_length
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

"""The held-out sets of a run: its own task's, and those of `eval.sets`, each with its task, its reward and its numbers.

compose ─► with_options (configs/task, configs/reward, paths made absolute) ─► the saved eval.sets ─► sets_of, in every
role. No torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.platform.config.build import build
from offtrail.platform.config.errors import ConfigError, nearest, nearest_text, refuse, renamed
from offtrail.platform.config.families import check_families
from offtrail.platform.config.files import guess
from offtrail.platform.config.keys import all_paths, keys_of, variant_keys
from offtrail.platform.config.schema import Config
from offtrail.platform.config.validate import (
    a_groups_programs_have_time_and_memory,
    code_from_outside_is_here,
    files_of_lines_are_here,
    numbers_are_in_range,
    programs_are_run,
    the_answer_is_looked_for_where_the_template_asks_for_it,
)
from offtrail.tasks import shots
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.registry import from_outside, make_task

LABEL = re.compile(r"[\w-]+", re.ASCII)
OWN = ("name", "prompts", "samples", "reward")
"""Keys of a set beside its task's."""
LOGPROB = "logprob"
"""A vote's weight that every answer has."""
TAKEN = ("behaviour", "samples")
"""Names that metrics have in the place of a set's."""
RULES: tuple[Callable[[Config], None], ...] = (
    numbers_are_in_range,
    files_of_lines_are_here,
    programs_are_run,
    the_answer_is_looked_for_where_the_template_asks_for_it,
    a_groups_programs_have_time_and_memory,
    code_from_outside_is_here,
)
"""Of validate.py, those that a set must keep to as a run does."""

Settings = dict[str, Any]
OptionValues = Callable[[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """What is asked of one set. ``label``: "" for a run's own task while it trains; ``config``: the run's, with the
    set's task and reward; ``prompts`` questions, ``samples`` answers each, after ``shots`` examples, to be compared
    with the set ``beside``, which is asked plainly.
    """

    label: str
    config: Config
    prompts: int
    samples: int
    shots: int = 0
    beside: str = ""

    @property
    def area(self) -> str:
        """What its metrics begin with."""
        return f"eval/{self.label}" if self.label else "eval"

    def problems(self) -> list[Problem]:
        """The questions. Raises TaskError and PluginError."""
        return make_task(self.config.task, self.config.run.seed).held_out(self.prompts)

    def put(self, problems: Sequence[Problem], *, chats: bool) -> list[Problem]:
        """What the model is asked in place of each problem. ``chats``: prompts go through a chat template. Raises
        TaskError where there are not as many examples, beside one that asks the very question, which rows of a file
        may do, and training problems of a task from outside the tree.
        """
        if not self.shots:
            return list(problems)
        held, seed = self.config.eval, self.config.run.seed
        if held.few_shot_path:
            fields, key = (held.few_shot_prompt_field, held.few_shot_answer_field), "eval.few_shot_path"
            given = shots.of_file(Path(held.few_shot_path), self.shots + 1, seed, fields, key)
        else:
            task, key = make_task(self.config.task, seed), f"eval.few_shot={self.shots}"
            given = shots.of_task(task, self.shots + bool(from_outside(task)), seed, self.config.reward)
        return [shots.before(one, shots.others(given, one, self.shots, key), chats=chats) for one in problems]


def sets_of(config: Config) -> list[EvalSet]:
    """job=eval: the sets, or the task where there are none, each followed by itself after eval.few_shot examples; else
    the task's own held-out prompts, then the sets.

    Raises ConfigError that names the set.
    """
    alone = config.job == "eval"
    own = EvalSet(config.task.name if alone else "", config, config.eval.prompts, config.eval.samples)
    sets = [_set(config, label, settings) for label, settings in config.eval.sets.items()]
    return [asked for one in sets or [own] for asked in _twice(one)] if alone else [own, *sets]


def _twice(one: EvalSet) -> list[EvalSet]:
    k = one.config.eval.few_shot
    label = f"{one.label}.{k}shot"  # no set of the user's has a dot in its name
    return [one, *([dataclasses.replace(one, label=label, shots=k, beside=one.label)] if k else [])]


def with_options(sets: Mapping[str, Settings], known: Callable[[str], list[str]], of: OptionValues) -> dict[str, Any]:
    """``eval.sets`` with the options of configs/ put in that a set names, and its files by absolute paths: what is
    saved. ``known``: the options of a group; ``of``: an option's values, its own and those of other sections.
    """
    return {label: _with_option(label, settings, known, of) for label, settings in sets.items()}


def _with_option(label: str, settings: Settings, known: Callable[[str], list[str]], of: OptionValues) -> Settings:
    if not isinstance(settings, dict):
        raise refuse(f"eval.sets.{label}", settings, "must be a mapping of a task's settings, such as {name: chain}")
    name, reward = settings.get("name", label), settings.get("reward", {})
    given = dict(settings)
    if isinstance(name, str) and name in known("task"):
        own, others = of("task", name)
        given = {**_plain(own, "task"), **given, "name": own["task.name"]}
        if beside := _plain(others, "reward"):
            reward = {**beside, **reward} if isinstance(reward, dict) else reward
    if isinstance(reward, str):
        if reward not in known("reward"):
            options = ", ".join(known("reward"))
            raise refuse(f"eval.sets.{label}.reward", reward, f"unknown option; options: {options}, or {{key: value}}")
        reward = _plain(of("reward", reward)[0], "reward")
    if reward:
        given["reward"] = reward
    built = _set(Config(job="eval"), label, given, rules=()).config.task
    files = {
        key.path.removeprefix("task."): key.default
        for key in keys_of(built, "task.").values()
        if key.path_kind == "file" or key.path == "task.settings"  # of a mixture's families
    }
    return given | {name: files[name] for name in files if name in given}


def _plain(values: Mapping[str, Any], section: str) -> Settings:
    inside = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
    return {key: guess(value) for key, value in inside.items()}


def _set(
    config: Config, label: str, settings: Settings, rules: tuple[Callable[[Config], None], ...] = RULES
) -> EvalSet:
    where = f"eval.sets.{label}"
    if not LABEL.fullmatch(label) or label in TAKEN:
        raise ConfigError(
            f"{where}: a set's name is letters, digits, - and _, for files are named by it, and none of "
            f"{', '.join(TAKEN)}"
        )
    given = {"name": label, **settings}
    reward = given.pop("reward", {})
    prompts, samples = (
        _count(where, name, given.pop(name, getattr(config.eval, name))) for name in ("prompts", "samples")
    )
    if not isinstance(given["name"], str):
        raise refuse(f"{where}.name", given["name"], "must be a task, such as chain")
    if not isinstance(reward, dict):
        raise refuse(f"{where}.reward", reward, "must be a mapping of keys of reward, such as {answer: boxed}")
    scored = {**dataclasses.asdict(config.reward), **reward}
    _refuse_unknown(where, given, reward)
    values = {f"task.{name}": value for name, value in given.items()}
    try:
        values |= {f"reward.{name}": value for name, value in scored.items()}
        built = build({"job": "eval", "eval.samples": samples, **values})
        built.reward.check_names(config.scorer.models)
        for rule in rules:
            rule(built)
        if isinstance(built.task, MixtureConfig):
            check_families(built.task, "task.settings", "eval")
    except (ConfigError, ValueError) as error:
        unknown = "name" not in settings and str(error).startswith(f"task.name={label}: ")
        way = "; or say which of them the set is of, as {name: jsonl, …}" if unknown else ""
        told = renamed(renamed(str(error), "task", where), "reward", f"{where}.reward")
        raise ConfigError(f"{told if told.startswith(where) else f'{where}: {told}'}{way}") from None
    return EvalSet(label, dataclasses.replace(config, task=built.task, reward=built.reward), prompts, samples)


def _refuse_unknown(where: str, given: Mapping[str, Any], reward: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that no task of the tree has, or no reward, with the nearest that it may be. One of
    another task `build` calls so, and all of a task from outside.
    """
    task = variant_keys()["task"].get(given["name"], {})
    places = [(where, given, task), (f"{where}.reward", reward, keys_of(Config().reward, "reward."))]
    for place, settings, known in places:
        section = "task" if place == where else "reward"
        for name, value in settings.items():
            if not known or f"{section}.{name}" in all_paths():
                continue
            names = {path.partition(".")[2] for path in known} | set(OWN if place == where else ())
            near = ", ".join(f"{place}.{one}" for one in nearest(name, names))
            raise refuse(f"{place}.{name}", value, f"unknown key{near and f'; nearest: {near}'}")


def _count(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse(f"{where}.{name}", value, "must be a whole number ≥ 1")
    return value


def check_sets(config: Config) -> None:
    """Raise ConfigError where a set would be trained on, or nothing would score it or weigh its votes."""
    for one in sets_of(config) if config.job == "eval" else ():
        weight, known = config.eval.vote_weight, (LOGPROB, *one.config.reward.components)
        if weight not in known:
            raise refuse("eval.vote_weight", weight, f"must be one of {', '.join(known)}{nearest_text(weight, known)}")
    if clash := next((label for label in config.eval.sets if label in config.scorer.models), ""):
        raise ConfigError(f"eval.sets.{clash}: scorer.models has a model of that name, for its scores; rename one")
    for one in sets_of(config)[config.job != "eval" :]:
        for line in _wrong_with(config, one):
            raise ConfigError(f"eval.sets.{one.label}: {line}")


def _wrong_with(config: Config, one: EvalSet) -> Iterator[str]:
    task, reward = one.config.task, one.config.reward
    if not reward.applies(reward.main, task.name):
        yield (
            f"reward.only.{reward.main}.tasks leaves task={task.name} out, and nothing else says how good an answer "
            "is; give the set a reward of its own, as {reward: {weights: {accuracy: 1}}}"
        )
    same = config.job == "rl" and task.name == config.task.name and not getattr(task, "eval_path", "")
    if same and task.held_out_share > config.task.held_out_share and not getattr(task, "path", ""):
        yield (
            f"held_out_share={task.held_out_share} is more than task.held_out_share={config.task.held_out_share}: some "
            "of its prompts would be trained on; give both the same"
        )

"""From settings to a task. A family is found by its name, and by nothing else.

    chain              tasks/chain.py, whose TASK is the family's class
    my_code:Reverse    anybody's own class, in a module outside the tree

A family's class has its settings beside it (`Config = ChainConfig`, a dataclass derived from TaskConfig) and is made by
`ChainTask(config, seed, load=True)`; what it must keep to stands in base.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from offtrail.core.plugins import is_plugin, load
from offtrail.core.problem import Problem
from offtrail.rewards.answer import find_answer
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.tasks.base import Task, TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.overlap import Item, Overlap, question_of
from offtrail.tasks.templates import templates_of

WORKED = 8
"""Training problems whose worked answers are looked at before a run."""
LOOKED_AT = 256
"""Training problems of a family from outside the tree that are compared with the held-out ones before a run."""


class Family(Protocol):
    """A family's class."""

    Config: type[TaskConfig]

    def __call__(self, config: Any, seed: int, *, load: bool = True) -> Task:
        """The task of ``config``; ``load=False`` reads no data and only verifies."""


@runtime_checkable
class Comparing(Protocol):
    """A task that compares what is trained on with evaluation sets, where it is asked (task.decontaminate)."""

    config: Any

    def compared(self, items: Sequence[Item]) -> Overlap | None:
        """What the items share with the task's evaluation sets; None where it is not asked."""


@functools.cache
def families() -> Mapping[str, Family]:
    """Every family of the tree by name: the modules of tasks/ that end with `TASK = …`; the others stay unread."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    names = [source.stem for source in sources if re.search(r"^TASK = ", source.read_text("utf-8"), re.MULTILINE)]
    return {name: importlib.import_module(f"offtrail.tasks.{name}").TASK for name in names}


def family(name: str, key: str = "task") -> Family:
    """The class of a family. ``key`` holds the name. Raises PluginError and TaskError, one line that names the key."""
    if not is_plugin(name):
        if name not in families():
            near = difflib.get_close_matches(name, families(), n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise TaskError(f"{key}={name}: no such task; choose one of {', '.join(families())}, or module:class{hint}")
        return families()[name]
    found = load(name, what=key)
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, TaskConfig) and dataclasses.is_dataclass(config)):
        raise TaskError(
            f"{key}={name}: needs `Config = …` in the class, a dataclass derived from offtrail.tasks.config.TaskConfig"
        )
    return found  # type: ignore[no-any-return]


def make_task(config: TaskConfig, seed: int, *, load: bool = True) -> Task:
    """The task of ``config``, its data order keyed by ``seed``. Files are read and checked here, so that a mistake in
    them shows before anything starts; ``load=False`` reads none and makes a task that only verifies and checks steps.

    Raises TaskError and PluginError.
    """
    return family(config.name)(config, seed, load=load)


def family_config(name: str, settings: Mapping[str, Any], held_out_share: float) -> TaskConfig:
    """A family's settings within a mixture, whose held_out_share holds for all. Raises TaskError and PluginError."""
    kind = family(name, "task.weights").Config
    known = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
    for key in settings:
        if key not in known:
            raise TaskError(f"task.settings.{name}.{key}: no such key; choose one of {', '.join(known)}")
    try:
        return kind(**{"held_out_share": held_out_share, **settings, "name": name})
    except (TypeError, ValueError) as error:
        raise TaskError(f"task.settings.{name}: {error}") from error


def from_outside(task: Task) -> list[Task]:
    """What of a task is from outside the tree: itself, or some of a mixture's families."""
    members: Mapping[str, Task] = getattr(task, "families", {task.name: task})
    return [member for name, member in members.items() if is_plugin(name)]


def remarks_on(task: Task) -> list[str]:
    """What a task (of a mixture each family) has to say of its data before a run."""
    families: Mapping[str, Task] = getattr(task, "families", {})
    within = [f"task.settings.{name}: {said}" for name, one in families.items() for said in getattr(one, "remarks", [])]
    return [*getattr(task, "remarks", []), *within]


def sets_of(task: Task) -> dict[str, list[Problem]]:
    """Key=path → the training problems of each file that a task (of a mixture a family) reads."""
    families: Mapping[str, Task] = getattr(task, "families", {})
    within = {f"task.settings.{name}.": one for name, one in families.items()}
    return {
        f"{where}path={one.config.path}": one.training()  # type: ignore[attr-defined]
        for where, one in ({"task.": task} | within).items()
        if callable(getattr(one, "training", None)) and _path_of(one)
    }


def _path_of(task: Task) -> str:
    """The file of its training problems, where it has one."""
    return str(getattr(getattr(task, "config", None), "path", ""))


def training_problems(task: Task, first: int, n: int) -> list[Problem]:
    """``n`` training problems from place ``first`` of the data order on, none of them twice where they stand in files;
    0 = all that those have left. Raises TaskError where there are fewer, or no end.
    """
    training = getattr(task, "training", None)
    if not callable(training):
        if not n:
            raise TaskError(f"sample.prompts=0: task={task.name} has no last problem; say how many, sample.prompts=N")
        return [task.train(first + i) for i in range(n)]
    size = len(training())
    if first >= size or first + n > size:
        raise TaskError(
            f"sample.prompts={n} from sample.first={first} on: task={task.name} has {size:,} training problems, each "
            "asked once; lower them (sample.prompts=0 takes all that are left), or raise sample.samples"
        )
    return [task.train(first + i) for i in range(n or size - first)]


def overlaps_of(task: Task) -> list[Overlap]:
    """What the training sets of a task (of a mixture its families) share with evaluation sets, where it was asked."""
    families: Mapping[str, Task] = getattr(task, "families", {})
    found = [getattr(one, "overlap", None) for one in (task, *families.values())]
    return [overlap for overlap in found if overlap is not None]


def policies_of(config: TaskConfig) -> set[str]:
    """What is asked of the decontamination of a task, or of a mixture's families: nothing, report, drop."""
    families: Mapping[str, Mapping[str, Any]] = getattr(config, "settings", {})
    within = [one for one in families.values() if isinstance(one, Mapping)]
    asked = [vars(config).get("decontaminate"), *(one.get("decontaminate") for one in within)]
    return {str(policy) for policy in asked if policy not in (None, "off")}


def overlaps_of_examples(task: Task, examples: Sequence[Problem]) -> list[Overlap]:
    """What examples to imitate (tasks/examples.py) share with the evaluation sets of a task (of a mixture its
    families), where it was asked.
    """
    families: Mapping[str, Task] = getattr(task, "families", {})
    members = [one for one in (task, *families.values()) if isinstance(one, Comparing)]
    templates = templates_of(one.config for one in members)
    items = [Item(one.task, one.meta["place"], question_of(one, templates)) for one in examples]
    return [overlap for one in members if (overlap := one.compared(items)) is not None]


def without_overlaps(examples: Sequence[Problem], overlaps: Sequence[Overlap]) -> list[Problem]:
    """The examples that are imitated: without those that task.decontaminate=drop leaves out. Raises TaskError where
    there are none.
    """
    out = {place for overlap in overlaps if overlap.policy == "drop" for place in overlap.places}
    kept = [one for one in examples if one.meta["place"] not in out]
    if examples and not kept:
        raise TaskError(f"task.decontaminate=drop: leaves no example of {examples[0].task}; name another file")
    return kept


def check_worked(task: Task, way: str) -> None:
    """Raise TaskError, which ends with the ``way`` out, where a task (of a mixture a family) has no worked answers to
    imitate: by its first training problems, of which a generator may leave some without.
    """
    members: Mapping[str, Task] = getattr(task, "families", {})
    for name, one in (members or {task.name: task}).items():
        for problem in map(one.train, range(WORKED)):
            try:
                one.trace(problem, random.Random(0))
            except TaskError as error:
                where = f"task.settings.{name}: " if members else ""
                raise TaskError(f"{where}{error}; {way}") from None


def check_answered(task: Task, reward: RewardConfig) -> None:
    """Raise TaskError where worked answers, which a cold start imitates, hold none in the place where it is looked for:
    by the first training problems.
    """
    if reward.answer not in ("boxed", "mark") or not reward.looks_for_answers:
        return
    worked = [task.trace(task.train(i), random.Random(i)) for i in range(WORKED)]
    if not any(find_answer(text, parse(text), True, reward) for text in worked):
        raise TaskError(
            f"reward.answer={reward.answer}: the cold start imitates worked answers of task={task.name}, which have "
            "none there, so that every answer would be wrong; take reward.answer=tags, or a start model in model.path"
        )


def check_promises(task: Task, n: int) -> None:
    """Look at the first problems of a task from outside the tree for what every task promises; not a proof.

    Raises TaskError when a training problem is drawn anew each time, is a held-out prompt, names another task than
    itself or holds what is no JSON; or when held-out prompts repeat or change with their number ``n``.
    """
    held_out, training = task.held_out(n), [task.train(i) for i in range(LOOKED_AT)]
    prompts = {problem.prompt for problem in held_out}
    if len(prompts) < n or (n > 1 and task.held_out(n - 1) != held_out[:-1]):
        raise TaskError(f"task={task.name}: held_out({n}) must be {n} distinct prompts that begin as held_out({n - 1})")
    for index, problem in enumerate(training):
        if problem.prompt in prompts:
            raise TaskError(f"task={task.name}: train({index}) is a held-out prompt, {problem.prompt[:60]!r}")
        if problem != task.train(index):
            raise TaskError(f"task={task.name}: train({index}) changes from call to call; key it by seed and index")
    for problem in (*training, *held_out):
        _check_problem(task.name, problem)


def _check_problem(name: str, problem: Problem) -> None:
    if problem.task != name:
        raise TaskError(f"task={name}: its problems must say so, not task={problem.task}: Problem(self.name, …)")
    try:
        json.dumps(dict(problem.meta))
    except (TypeError, ValueError) as error:
        raise TaskError(f"task={name}: meta of a problem must hold plain JSON values only ({error})") from None

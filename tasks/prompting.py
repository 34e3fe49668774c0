"""How a problem is put to a model that makes data of it (job=sample): plainly, after worked examples, or with a request
to reflect. They are DeepSeek-R1's ways to cold-start data (arXiv:2501.12948, §2.3.1); what is recorded is always the
plain problem.

    plain       the problem as in training
    few_shot    examples with their answers before it (shots.py): as turns where there is a chat, else as text
    reflect     sample.instruction around the question, inside the task's template
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from offtrail.core.problem import Problem
from offtrail.rewards.config import RewardConfig
from offtrail.tasks import shots
from offtrail.tasks.base import Task
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import SampleConfig
from offtrail.tasks.jsonl import as_lines
from offtrail.tasks.registry import training_problems
from offtrail.tasks.shots import Shot
from offtrail.tasks.templates import parts_of, task_template


def questions(
    task: Task, sample: SampleConfig, reward: RewardConfig, seed: int, *, chats: bool
) -> tuple[list[Problem], list[Problem]]:
    """The training problems that are asked, and what is put to the model in place of each. ``chats``: prompts go
    through a chat template. Raises TaskError where there is not enough of them, or of examples.
    """
    problems = training_problems(task, sample.first, sample.prompts)
    return problems, put(problems, sample, task, reward, seed, chats=chats)


def put(
    problems: Sequence[Problem], sample: SampleConfig, task: Task, reward: RewardConfig, seed: int, *, chats: bool
) -> list[Problem]:
    """What is put to the model in place of each problem of ``task``; see ``questions``."""
    if sample.prompting == "reflect":
        return [reflecting(problem, sample.instruction, template_of(problem, task)) for problem in problems]
    if sample.prompting == "few_shot":
        given, key = examples(sample, task, reward, seed), "sample.shots_path" if sample.shots_path else "sample.shots"
        return [shots.before(one, shots.others(given, one, sample.shots, key), chats=chats) for one in problems]
    return list(problems)


def examples(sample: SampleConfig, task: Task, reward: RewardConfig, seed: int) -> list[Shot]:
    """One example more than are shown, for a question may be among them. Raises TaskError where there are fewer."""
    if sample.shots_path:
        fields = (sample.shots_prompt_field, sample.shots_answer_field)
        return shots.of_file(Path(sample.shots_path), sample.shots + 1, seed, fields, "sample.shots_path")
    return shots.of_task(task, sample.shots + 1, seed, reward)


def reflecting(problem: Problem, instruction: str, template: str) -> Problem:
    """A problem with the instruction around its question; around all of it where it is not written by ``template``."""
    whole = problem.messages[-1]["content"] if problem.messages else problem.prompt
    before, question, after_it = parts_of(whole, template)
    told = before + instruction.replace("{prompt}", question) + after_it
    if not problem.messages:
        return dataclasses.replace(problem, prompt=told)
    messages = (*problem.messages[:-1], {**problem.messages[-1], "content": told})
    return dataclasses.replace(problem, prompt=as_lines(messages), messages=messages)


def template_of(problem: Problem, task: Task) -> str:
    """How the problem's family writes its prompts."""
    families: Mapping[str, Task] = getattr(task, "families", {})
    config = getattr(families.get(problem.task, task), "config", None)
    return task_template(config) if isinstance(config, TaskConfig) else "{prompt}"

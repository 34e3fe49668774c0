"""Why a problem cannot be put to a model, in one line: said where it is encoded, and where it is only counted."""

from __future__ import annotations

from offtrail.core.problem import Problem
from offtrail.tasks.base import TaskError


def refused(problem: Problem, what: str) -> TaskError:
    """What is wrong with a problem, under its place."""
    file = "=" in problem.task  # an example, which names its file and row (tasks/examples.py)
    where = f"{problem.task}, {problem.meta['place']}" if file else f"task={problem.task}, problem {problem.index}"
    return TaskError(f"{where}: {what}")


def empty_prompt(problem: Problem) -> TaskError:
    """There is nothing to answer."""
    return refused(problem, "the prompt is empty; mend the data or task.template")


def without_chat(problem: Problem) -> TaskError:
    """It has messages, and the tokenizer no template for them."""
    return refused(
        problem, "its prompt is a list of messages, and no chat template is in use (prompt.chat); choose a "
        "model.path whose tokenizer has one, or take task.prompt_field"
    )  # fmt: skip


def unknown_text(problem: Problem, text: str) -> TaskError:
    """What is trained on must be the text itself."""
    return refused(
        problem, f"the tokenizer does not know all of {text[:60]!r}; choose a model.path whose tokenizer covers the "
        "task's text"
    )  # fmt: skip

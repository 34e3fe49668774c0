"""How a problem is put to the model: task.template, a name of TEMPLATES or a text with {prompt} in it."""

from __future__ import annotations

from collections.abc import Iterable

from offtrail.tasks.config import TaskConfig, check

TEMPLATES = {
    # arXiv:2501.12948, table 1, word for word; the full stop after the prompt is the paper's
    "r1_zero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. "
        "Assistant:"
    ),
    "boxed": "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "tags": (
        "{prompt}\nFirst reason step by step inside <think> </think>, then write only the final answer inside "
        "<answer> </answer>.\n"
    ),
}
"""r1_zero: for a base model (prompt.chat=never). boxed: DeepSeek-R1's advice for mathematics (README of the model), to
go with reward.answer=boxed. tags: asks for the format that the format component checks.
"""


def template_text(template: str) -> str:
    """The text that a name stands for; any other text is its own."""
    return TEMPLATES.get(template, template)


def task_template(config: TaskConfig) -> str:
    """How a task writes its problems: its template, or each as it stands."""
    return template_text(getattr(config, "template", "{prompt}"))


def templates_of(tasks: Iterable[TaskConfig]) -> list[str]:
    """How these tasks may have written a prompt, and the templates that have names; the longest first, for it says the
    most.
    """
    return sorted({*map(task_template, tasks), *TEMPLATES.values()}, key=len, reverse=True)


def parts_of(prompt: str, template: str) -> tuple[str, str, str]:
    """(what stands before the question, the question, what stands after it) in a prompt that a template's text has
    written; the prompt is all question where that has not.
    """
    head, mark, tail = template.partition("{prompt}")
    fits = len(prompt) >= len(head) + len(tail) and prompt.startswith(head) and prompt.endswith(tail)
    if not mark or "{prompt}" in tail or not fits:
        return "", prompt, ""
    return head, prompt[len(head) : len(prompt) - len(tail)], tail


def without_template(prompt: str, templates: Iterable[str]) -> str:
    """The question of a prompt that the first of these templates has written which fits; the prompt where none does."""
    return next((question for one in templates if (question := parts_of(prompt, one)[1]) != prompt), prompt)


def check_template(template: str) -> None:
    """Raise ValueError unless it has a place for the prompt."""
    names = ", ".join(TEMPLATES)
    check(
        "{prompt}" in template_text(template),
        "template",
        repr(template),
        f"{names}, or a text that contains {{prompt}}",
    )

"""How a problem is put to the model: task.template, a name of TEMPLATES or a text with {prompt} in it."""

from __future__ import annotations

from offtrail.tasks.config import check

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


def check_template(template: str) -> None:
    """Raise ValueError unless it has a place for the prompt."""
    names = ", ".join(TEMPLATES)
    check(
        "{prompt}" in template_text(template),
        "template",
        repr(template),
        f"{names}, or a text that contains {{prompt}}",
    )

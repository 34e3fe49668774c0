"""Multiple choice out of a right answer and wrong ones, as GPQA has them: the letter of the right one is the answer.

The order of the options is keyed by the question and the options alone: the same in every run, however the fields are
arranged.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from offtrail.tasks.base import TaskError
from offtrail.tasks.lines import check_text
from offtrail.tasks.split import stream


def wrong_answers(fields: Mapping[str, object], names: Sequence[str], where: str) -> list[str]:
    """The texts of these fields, each a text or a list of texts. Raises TaskError that opens with ``where``."""
    found = list[str]()
    for name in names:
        value = fields.get(name)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            known = ", ".join(map(repr, fields)) or "none"
            raise TaskError(
                f"{where}: field {name!r} must be a text or a list of texts, none empty (fields: {known}); mend the "
                "row, or set task.wrong_fields"
            )
        for text in map(str, texts):
            check_text(text, f"{where}: field {name!r}")
            found.append(text.strip())
    return found


def with_options(question: str, right: str, wrong: Sequence[str], where: str) -> tuple[str, str]:
    """The question with its options, a line each, and the letter of the right one. Raises TaskError."""
    options = sorted([right.strip(), *wrong])
    if len(set(options)) < len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise TaskError(f"{where}: the option {twice[:60]!r} is given twice; mend the row, or delete it")
    if len(options) > len(string.ascii_uppercase):
        raise TaskError(f"{where}: has {len(options)} options, more than there are letters; mend the row")
    stream("choices", question, *options).shuffle(options)
    lines = [f"{letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), "", *lines]), string.ascii_uppercase[options.index(right.strip())]

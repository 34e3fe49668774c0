"""Accuracy (DeepSeek-R1, arXiv:2501.12948, §2.2.2): what the task's verifier says of the answer."""

from __future__ import annotations

from offtrail.rewards.base import Answered


def score(answered: Answered) -> float:
    """From 0 to 1; 0 where no answer is found (reward.answer).

    With tags that is so wherever the text is malformed: accuracy cannot be had around the format. A text that was cut
    off after its closing tag or box has said all it had to say and keeps its accuracy.
    """
    return answered.accuracy

r"""Where the answer of a text is looked for: `reward.answer`. Each way is linear in the length of the text.

    tags          the answer block of a well-formed text (format.py)
    boxed         what the last \boxed{…} or \fbox{…} holds; none where its braces do not close
    mark          the rest of the line after the last `reward.answer_mark`, or the line below where that is empty
    last_number   the last number: 18, -3/4, -$1,800.50, 1e-05, 3 \times 10^5, 2 million, and a time of day whole, 18:00
    text          all of it, cut off or not: what is judged as a whole, such as instructions that are followed

But for tags, what stands before the last `</think>` is no answer, nor is a thought that was never closed; and of a text
that was cut off, mark and last_number give none: what comes last in it is where it was cut.
"""

from __future__ import annotations

import re

from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import Parts

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
LAST_NUMBER = re.compile(
    r"""
    # of a unit or a letter, and no number: cm^2, m3, x^{-1}
    (?: (?<![A-Za-z])(?:[cdkm]?m|ft|in|yd)(?=[23](?!\d)) | \^\s*\{?\s*[-+]? ) \d++
    |
    (?P<number>
        (?: (?<![\w)}])[-+−](?:\\?\$|[€£¥])? )?
        (?:
            \d{1,2}(?::\d\d)++(?![\d:])
            | (?:\d++\s?)?\\[cdt]?frac\s?\{-?\d++\}\{\d++\}
            | (?: \d{1,3}(?:(?:,|\{,\}|,?\\[,!]|[\u2009\u202f])\d{3})++(?!\d) | \d++ | (?<!\w)(?=\.\d) )
              (?:\.\d++)? (?:[eE][-+]?\d{1,2}+(?!\d))? (?:/\d++)?
              (?: (?:\s*(?:\\times|\\cdot|[*×x])\s*10)?\s?\^\s?(?:\{\s?[-+]?\d++\s?\}|[-+]?\d++) )?
              (?: \s*\\text\s?\{\s?(?:SCALE)s?\s?\} | \s?(?:SCALE)s?\b )?
        )
    )
    """.replace("SCALE", "hundred|thousand|million|billion|trillion"),
    re.ASCII | re.VERBOSE,
)

WINDOW, BEHIND = 200, 24
"""Characters before the end of the last digit, and after it, in which the last number is looked for."""


def find_answer(text: str, parts: Parts | None, finished: bool, config: RewardConfig) -> str | None:
    """The answer of ``text``, whose blocks are ``parts``, without blanks around it; None where there is none."""
    if config.answer == "tags":
        return parts.answer if parts is not None else None
    _, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    if config.answer == "text":
        return rest.strip() or None
    if config.answer == "boxed":
        return boxed(rest) or None
    if not finished:
        return None
    if config.answer == "mark":
        _, mark, after = rest.rpartition(config.answer_mark)
        return after.strip().partition("\n")[0].strip() or None if mark else None
    return last_number(rest)


def last_number(text: str) -> str | None:
    """The last number of ``text``, its minus a hyphen; one of more characters than WINDOW is cut to that, which no
    grader reads.
    """
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    found = [match["number"] for match in LAST_NUMBER.finditer(text, max(0, end - WINDOW), end + BEHIND)]
    last = next(filter(None, reversed(found)), None)
    return last and last.replace("−", "-")


def boxed(text: str) -> str | None:
    """What the last box of ``text`` holds; None where there is none, or its braces do not close."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    end = closing(text, begin)
    return None if end is None else text[begin:end].strip()


def closing(text: str, begin: int) -> int | None:
    """The place of the brace that closes the one just before ``begin``; escaped ones do not count."""
    depth = 1
    for brace in BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None

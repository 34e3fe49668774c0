r"""The same mathematics, by math-verify (Kydlíček et al., github.com/huggingface/Math-Verify) where plainer ways end.

    the same text ──► the same words ──► the same number ──► nothing to hang on ──► the same form ──► math-verify

math-verify takes anything that evaluates to the gold answer, so that `12*7+3` answers "what is 12*7+3?". Strict refuses
an operation that the gold answer does without; lenient leaves it to math-verify. Neither ever lets math-verify match
variables by position (its strict=False), which takes `\text{no}` for `\text{yes}`.
"""

from __future__ import annotations

import importlib.util
import logging
import re

from offtrail.rewards.grading.base import Grade
from offtrail.rewards.grading.latex import ASSIGNED, LONGEST, SUPERSCRIPTS, plain, quantity, same, unboxed, without_name

DEEPEST, MOST_DIGITS = 50, 300
DECIMALS = {True: 6, False: 12}
"""Lenient → to how many decimals a float must agree, for math-verify."""
MISSING = "task.compare=math needs math-verify: pip install offtrail[math]"

IN_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm|textrm|operatorname) *\{([^{}]*)\}")
WORDS = re.compile(r"[^\W\d_]{3,}(?:[ ,'-]+[^\W\d_]+)*")
BLANK = re.compile(r" (?!(?<=\d )\d)| (?=\d{3}(?!\d))")
"""Blanks that change nothing: all but those between digits, where they part no thousands."""
BASE = re.compile(r"[0-9A-F]+ *_ *\{? *\d+ *\}?")
TOWER = re.compile(r"(?:\^|\*\*)[ {(]*-?\d+[ )}]*(?:\^|\*\*)|[)}] *(?:\^|\*\*)[ {(]*\d{3}")
HIGH_POWER = re.compile(r"(?:\^|\*\*)[ {(]*[-+]?\d{5}")
FACTORIAL = re.compile(r"(?<!\d)(?:\d{1,3}|[a-z]) *!(?! *[!^])")
KINDS = {
    "a sum": re.compile(r"(?<=[\w)}\]!]) *(?:[-+]|\\pm|\\mp)"),
    "a power or root": re.compile(r"\^|\*\*|\\sqrt|√"),
    "trigonometry": re.compile(r"(?:sin|cos|tan|sec|csc|cot)h?(?![a-z])"),
    "a logarithm": re.compile(r"\\(?:ln|log|lg|exp)(?![a-z])"),
    "an operator": re.compile(r"\\(?:sum|prod|int|lim|[dt]?binom|choose|det|gcd|lcm|max|min|mod|bmod)(?![a-z])|!"),
}
OF_VARIABLES = {"a sum", "a power or root"}
VARIABLE = re.compile(r"(?<!\\)(?<![a-zA-Z])[a-df-hj-zA-Z](?![a-zA-Z])")


def available() -> bool:
    """Whether math-verify is installed; it is not imported."""
    return importlib.util.find_spec("math_verify") is not None


def warm_up() -> None:
    """Import math-verify and its grammar: .7 s of CPU that would else be on the clock of the first answer."""
    _verified("x", "y", False)


def grade(gold: str, answer: str, *, lenient: bool = False) -> Grade:
    """Whether ``answer`` is ``gold``. May take any time within math-verify, whatever the filter keeps from it."""
    if len(answer) > LONGEST:
        return Grade(False, f"more than {LONGEST} characters")
    held = unboxed(answer, lenient=lenient)
    if held is None:
        return Grade(False, "no single box")
    expected, given = plain(unboxed(gold, lenient=True) or gold), plain(held)
    if not given:
        return Grade(False, "empty")
    if BLANK.sub("", given) == BLANK.sub("", expected):
        return Grade(True, "text")
    if IN_TEXT.fullmatch(expected) or WORDS.fullmatch(expected):
        return Grade(_words(given) == _words(expected), "words")
    if BASE.fullmatch(expected) or BASE.fullmatch(given):  # math-verify drops the base
        return Grade(re.sub("[ {}]", "", given) == re.sub("[ {}]", "", expected), "base")
    if bool(ASSIGNED.match(expected)) != bool(ASSIGNED.match(given)):
        expected, given = without_name(expected), without_name(given)
    one, other = quantity(expected), quantity(given, any_unit=True)
    if one is not None and other is not None:
        return Grade(same(one, other, lenient=lenient), "number")
    if one is not None and not lenient:
        return Grade(False, "no plain number")
    if why := hangs(given):
        return Grade(False, why)
    if not lenient and (why := _another_form(expected, given)):
        return Grade(False, why)
    return Grade(_verified(gold, answer.translate(SUPERSCRIPTS) if lenient else given, lenient), "math-verify")


def hangs(text: str) -> str:
    """Why ``text`` is not given to math-verify, which would take it for minutes; empty where nothing is known."""
    if len(text) > LONGEST:
        return f"more than {LONGEST} characters"
    if sum(map(str.isdigit, text)) > MOST_DIGITS:
        return f"more than {MOST_DIGITS} digits"
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        return f"nested more than {DEEPEST} deep"
    if TOWER.search(text) or HIGH_POWER.search(text):
        return "a tower of powers"
    return "a factorial" if text.count("!") > len(FACTORIAL.findall(text)) else ""


def _words(text: str) -> str:
    return " ".join(IN_TEXT.sub(r"\1", text).casefold().strip("() .").split())


def _another_form(gold: str, answer: str) -> str:
    """What ``answer`` holds that ``gold`` does without; empty where nothing."""
    if _outside(gold) != _outside(answer):
        return "other brackets"
    bare, answer = (IN_TEXT.sub("", text).replace("^{\\circ}", "") for text in (gold, answer))
    allowed = {kind for kind, pattern in KINDS.items() if pattern.search(bare)}
    if VARIABLE.search(re.sub(r"\\[a-zA-Z]+", " ", bare)):
        allowed |= OF_VARIABLES
    more = [kind for kind, pattern in KINDS.items() if kind not in allowed and pattern.search(answer)]
    return f"not worked out: {more[0]}" if more else ""


def _outside(text: str) -> str:
    """The brackets around a list, such as `[)`; those around one thing, and none, are empty."""
    text = text.replace("\\{", "{").replace("\\}", "}").strip()
    if "," not in text or text[:1] not in "([{" or text[-1:] not in ")]}":
        return ""
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and place < len(text) - 1:
            return ""  # several
    return "" if text[0] == "{" else text[0] + text[-1]


def _verified(gold: str, answer: str, lenient: bool) -> bool:
    from math_verify import parse, verify  # half a second of CPU

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody but the pool keeps the time
    whole = gold if _has_formula(gold) else f"${gold}$"
    given = answer if lenient and _has_formula(answer) else f"${answer}$"
    expected, found = (parse(text, fallback_mode="no_fallback", parsing_timeout=None) for text in (whole, given))
    same = verify(expected, found, DECIMALS[lenient], timeout_seconds=None, allow_set_relation_comp=lenient)
    return bool(same)


def _has_formula(text: str) -> bool:
    return "$" in text or "\\(" in text or "\\[" in text

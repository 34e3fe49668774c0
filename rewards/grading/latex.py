r"""Answers in LaTeX or Markdown as plainly as they can be written, and the numbers among them. Nothing is evaluated.

\dfrac{1}{2}  →  \frac{1}{2}      \left( 1,\! 000 \right)  →  ( 1,000 )      90°  →  90^{\circ}      = **18**.  →  18
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from offtrail.rewards.answer import closing
from offtrail.rewards.grading.numeric import number

REWRITTEN = (
    (re.compile(r"(?<![\w)}\]*`])(\*\*|__|`)(?=\S)([^*_`]+?)(?<=\S)\1(?![\w({\[*_`])"), r"\2"),
    (re.compile(r"\\(?:textbf|textit|mathbf|boldsymbol|bm|emph) *\{([^{}A-Za-z]*)\}"), r"\1"),
    (re.compile("[−–‐‑]"), "-"),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle)(?![a-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r",\\! *"), ","),
    (re.compile(r"\\[,;:!]|\\ |~|\\q?quad(?![a-z])"), " "),
    (re.compile(r"\^ *(?:\\circ(?![a-z])|\{ *\\circ *\})|°|\\degree(?![a-z])"), r"^{\\circ}"),
    (re.compile(r"\\[($]|\\\)|\\\[|\\\]|\$"), " "),
    (re.compile(r"\\frac *(\d) *(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac *(\d) *\{"), r"\\frac{\1}{"),
)
SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3"})
BOX = re.compile(r"\\(?:boxed|fbox) *\{")
UNITS = (
    r"mm|cm|k?m */ *h|k?m|m?g|kg|m?s|ml|(?-i:L)|sec|second|min(?:ute)?|hour|hr|day|week|month|year|deg(?:ree)?|inche?|"
    r"feet|foot|ft|yard|mile|mph|dollar|cent|unit|square|cubic|lit(?:er|re)|met(?:er|re)|gram|rad(?:ian)?|point|oz|ounce|"
    r"lb|pound"
)
PERCENT = re.compile(r" *(?:\\?%|(?:\\text *\{ *)?(?:per ?cent(?:age points?)?|pct)\.? *\}?)$", re.IGNORECASE)
DEGREES = re.compile(r"\^\{\\circ\}(?: *(?:[CF]|\\(?:text|mathrm) *\{ *[CF] *\}))?$")
TEXT = re.compile(r" *\\(?:text|mbox|mathrm|textrm) *\{([^{}]*)\}(?: *\^ *\{? *\d *\}?)?$")
WORDS = re.compile(rf"(?<=[\d}})]) *((?:(?:{UNITS})s?(?:[23]\b|\b)[ /.]*(?:\^ *\{{? *\d *\}}?)?)+)$", re.IGNORECASE)
NOUN = re.compile(
    r"(?:(?<=[\d}]) +(?=[^\W\d_]{3})|(?<=\d)(?=[\u3040-\u9fff\uac00-\ud7af]))((?:[^\W\d_]++[.'’/ -]*+){1,5})$"
)
"""Up to five words after a number."""
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty",
    "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
NO_UNIT = frozenset((
    *NUMBERS,
    *(number.removesuffix("y") + ending for number in NUMBERS for ending in ("th", "ths", "ieth", "ieths")),
    "half", "halves", "third", "thirds", "quarter", "quarters", "fifth", "fifths", "eighth", "eighths", "ninth",
    "ninths", "twelfth", "twelfths", "hundredth", "hundredths", "thousandth", "thousandths", "millionth",
    "millionths", "lakh", "lakhs", "crore", "crores", "or", "and", "but", "nor", "to", "by", "of", "over", "plus",
    "minus", "times", "divided", "multiplied", "add", "added", "subtract", "subtracted", "than", "not", "is",
    "negative", "point", "remainder", "base", "squared", "cubed", "halved", "doubled", "tripled", "factorial",
    "mod", "modulo", "choose", "root", "below", "sin", "cos", "tan", "log", "exp", "sqrt", "pi", "i", "e", "oder",
    "und", "et", "ou",
))  # fmt: skip
"""Words that make another number of the one before them, or leave it open."""
ANOTHER = re.compile(r"(?<!\^)(?<!\^\{)\d|%|\bper ?cent|[十百千万萬億亿兆割半一二三四五六七八九]")
"""The same in figures, signs and Chinese characters; an exponent belongs to its unit."""
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(
    rf"(?<=[\d}}])( *(?:\\(?:text|mbox|mathrm|textrm) *\{{ *)?)({'|'.join(SCALES)})s?(?![^\W\d_])", re.IGNORECASE
)
CURRENCY = re.compile(r"^([-+]?) *[€£¥₹₩] *| *[€£¥₹₩]$")
MIXED = re.compile(r"(?<=\d) +(\d+) */ *(\d+)$")
FRACTION = re.compile(r"(?P<sign>[-+]?) *(?P<whole>\d*) *\\frac *\{ *(?P<above>-?\d+) *\} *\{ *(?P<below>-?\d+) *\}")
POWER = re.compile(r"(?:(?P<times>[-+]?[\d.]+) *(?:\\times|\\cdot|\*|×|x) *)?10 *\^ *\{? *(?P<power>[-+]?\d{1,2}) *\}?")
GROUPED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
ASSIGNED = re.compile(r"(?:[A-Za-z](?:_\{?\w\}?)?|[a-zA-Z]\([a-z]\)|\([a-z](?:, ?[a-z])*\)) *(?:=|\\in(?![a-z])) *")
LONGEST = 2000
"""Characters of an answer that is read at all."""


class Quantity(NamedTuple):
    """A number as it is written, the ``factor`` that its percent sign (1/100) or words such as `million` stand for, and
    the unit beside it, empty for none.
    """

    value: Fraction
    factor: Fraction = Fraction(1)
    unit: str = ""


def boxes(text: str) -> list[str] | None:
    """What each box of ``text`` holds, outermost ones; None where the braces of one do not close."""
    found, at = list[str](), 0
    while box := BOX.search(text, at):
        end = closing(text, box.end())
        if end is None:
            return None
        found.append(text[box.end() : end])
        at = end + 1
    return found


def one_box(text: str) -> str | None:
    """``text`` without the box around all of it; None where there are several, or something stands beside one."""
    held = boxes(text)
    if not held:
        return text if held is not None else None
    rest = text[: BOX.search(text).start()] + text[text.rindex("}") + 1 :]  # type: ignore[union-attr]
    return one_box(held[0]) if len(held) == 1 and not plain(rest).strip(" .*_`") else None


def unboxed(text: str, *, lenient: bool) -> str | None:
    """`one_box`, or lenient what all boxes hold, as a list; None where there is no such."""
    if not lenient:
        return one_box(text)
    held = boxes(text)
    return None if held is None else ", ".join(held) or text


def without_name(text: str) -> str:
    """A plain text without the `x =` that it begins with, or the `x` that lies in a set."""
    return text[match.end() :] if (match := ASSIGNED.match(text)) else text


def plain(text: str) -> str:
    """``text`` with one spelling for what looks the same: without dollars, sizes and spaces of LaTeX, bold type, an
    equals sign before all and a full stop after it.
    """
    text = text.translate(SUPERSCRIPTS)
    for pattern, instead in REWRITTEN:
        text = pattern.sub(instead, text)
    return " ".join(text.split()).removesuffix(".").lstrip("= ").rstrip()


def split_unit(text: str) -> tuple[str, str]:
    """A plain text without the unit at its end, and that unit in lower case and the singular; empty for none."""
    for pattern in (DEGREES, TEXT, WORDS):
        if (match := pattern.search(text)) and match.start() and (pattern is not TEXT or _is_unit(match[1])):
            unit = re.sub(r"\\(?:text|mbox|mathrm|textrm)|[^a-z0-9/]", "", match[0].lower().replace("\\circ", "degree"))
            return text[: match.start()].strip(), unit.removesuffix("s")
    return text, ""


def _is_unit(words: str) -> bool:
    """Whether words behind a number leave it what it is."""
    listed = re.findall(r"[^\W\d_]+", words.lower())
    return NO_UNIT.isdisjoint(listed) and not ANOTHER.search(words.lower())


def said(answer: str, *, lenient: bool) -> Quantity | None:
    """The number that an answer is, however it is dressed; None where it is none, or more than one."""
    held = unboxed(answer, lenient=lenient) if len(answer) <= LONGEST else None
    return None if held is None else quantity(without_name(plain(held)), any_unit=True)


def quantity(text: str, *, any_unit: bool = False) -> Quantity | None:
    r"""A plain text as a number: `1,000`, `1 000`, `-\frac{3}{4}`, `1\frac{1}{4}`, `3 \times 10^{5}`, `2 million`, each
    with a unit or a percent sign; None for anything else, such as `2+2` or `\sqrt{4}`. ``any_unit``: up to five words
    after it are one, such as `fewer apples`.
    """
    if len(text) > 300:
        return None
    factor = Fraction(1)
    while match := SCALE.search(text):
        text, factor = SCALE.sub(r"\1", text, count=1), factor * 10 ** SCALES[match[2].lower()]
    bare = PERCENT.sub("", text)
    if bare != text:
        rest, unit, factor = bare, "", factor / 100
    else:
        rest, unit = split_unit(text)
        if not unit and any_unit and (match := NOUN.search(rest)) and _is_unit(match[1]):
            rest, unit = rest[: match.start()], "".join(match[1].lower().split()).removesuffix("s")
    value = _value(CURRENCY.sub(r"\1", rest.strip()))
    return None if value is None else Quantity(value, factor, unit)


def same(gold: Quantity, answer: Quantity, *, lenient: bool) -> bool:
    """Whether two are the same number of the same thing, where both name one; lenient: of anything, up to rounding, and
    with a percent sign or a `million` that only one of them has.
    """
    one, other = (q.value * q.factor for q in (gold, answer))
    if one == other:
        return lenient or not (gold.unit and answer.unit) or gold.unit == answer.unit
    if not lenient:
        return False
    if gold.value == answer.value and 1 in (gold.factor, answer.factor):
        return True
    close: bool = abs(one - other) <= min(Fraction(1, 2_000_000), abs(one) / 1_000_000)
    return close


def _value(text: str) -> Fraction | None:
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if GROUPED.fullmatch(text):
        text = text.replace(" ", "")
    text = MIXED.sub(r"\\frac{\1}{\2}", text)
    if (value := number(text)) is not None:
        return value
    if (match := FRACTION.fullmatch(text)) and int(match["below"]) and not (match["whole"] and "-" in match["above"]):
        part = Fraction(int(match["above"]), int(match["below"])) + int(match["whole"] or 0)
        return -part if match["sign"] == "-" else part
    if match := POWER.fullmatch(text):
        times = number(match["times"] or "1")
        return None if times is None else times * Fraction(10) ** int(match["power"])
    return None

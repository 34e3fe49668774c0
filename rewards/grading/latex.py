r"""Answers in LaTeX as plainly as they can be written, and the numbers among them. Nothing here is evaluated.

\dfrac{1}{2}  →  \frac{1}{2}        \left( 1,\! 000 \right)  →  ( 1,000 )        90°  →  90^{\circ}
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from offtrail.rewards.answer import closing
from offtrail.rewards.grading.numeric import number

REWRITTEN = (
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
BOX = re.compile(r"\\(?:boxed|fbox) *\{")
UNITS = (
    r"mm|cm|k?m|m?g|kg|m?s|ml|sec|second|min(?:ute)?|hour|hr|day|week|month|year|deg(?:ree)?|inche?|feet|foot|ft|yard|mile|"
    r"mph|dollar|cent|unit|square|cubic|lit(?:er|re)|met(?:er|re)|gram|rad(?:ian)?|point"
)
PERCENT = re.compile(r" *(?:\\?%|(?:\\text *\{ *)?(?:percent|pct)\.? *\}?)$", re.IGNORECASE)
DEGREES = re.compile(r"\^\{\\circ\}$")
TEXT = re.compile(r" *\\(?:text|mbox|mathrm|textrm) *\{[^{}]*\}(?: *\^ *\{? *\d *\}?)?$")
WORDS = re.compile(rf"(?<=[\d}})]) *\b((?:(?:{UNITS})s?\b[ /.]*(?:\^ *\{{? *\d *\}}?)?)+)$", re.IGNORECASE)
FRACTION = re.compile(r"(?P<sign>[-+]?) *(?P<whole>\d*) *\\frac *\{ *(?P<above>-?\d+) *\} *\{ *(?P<below>-?\d+) *\}")
POWER = re.compile(r"(?:(?P<times>[-+]?[\d.]+) *(?:\\times|\\cdot|\*|×|x) *)?10 *\^ *\{? *(?P<power>[-+]?\d{1,2}) *\}?")
GROUPED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")


class Quantity(NamedTuple):
    """A number, a percentage where ``percent`` (its value is not divided), and the unit beside it, empty for none."""

    value: Fraction
    percent: bool
    unit: str


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
    return one_box(held[0]) if len(held) == 1 and not plain(rest).strip(" .") else None


def plain(text: str) -> str:
    """``text`` with one spelling for what looks the same, without dollars, sizes and spaces of LaTeX."""
    for pattern, instead in REWRITTEN:
        text = pattern.sub(instead, text)
    return " ".join(text.split()).removesuffix(".").strip()


def split_unit(text: str) -> tuple[str, str]:
    """A plain text without the unit at its end, and that unit in lower case and the singular; empty for none."""
    for pattern in (DEGREES, TEXT, WORDS):
        if (match := pattern.search(text)) and match.start():
            unit = re.sub(r"\\(?:text|mbox|mathrm|textrm)|[^a-z0-9/]", "", match[0].lower().replace("\\circ", "degree"))
            return text[: match.start()].strip(), unit.removesuffix("s")
    return text, ""


def quantity(text: str) -> Quantity | None:
    r"""A plain text as a number: `1,000`, `1 000`, `-\frac{3}{4}`, `1\frac{1}{4}`, `3 \times 10^{5}`, each with a unit
    or a percent sign; None for anything else, such as `2+2` or `\sqrt{4}`.
    """
    if len(text) > 300:
        return None
    bare = PERCENT.sub("", text)
    percent = bare != text
    rest, unit = (bare, "") if percent else split_unit(text)
    value = _value(rest.strip())
    return None if value is None else Quantity(value, percent, unit)


def _value(text: str) -> Fraction | None:
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if GROUPED.fullmatch(text):
        text = text.replace(" ", "")
    if (value := number(text)) is not None:
        return value
    if (match := FRACTION.fullmatch(text)) and int(match["below"]) and not (match["whole"] and "-" in match["above"]):
        part = Fraction(int(match["above"]), int(match["below"])) + int(match["whole"] or 0)
        return -part if match["sign"] == "-" else part
    if match := POWER.fullmatch(text):
        times = number(match["times"] or "1")
        return None if times is None else times * Fraction(10) ** int(match["power"])
    return None

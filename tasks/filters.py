r"""What makes an answer unfit to be imitated: pure functions of its text, each `NAME(text, settings) → why`, empty
where the text is fine.

DeepSeek-R1 keeps a sample when it is right and can be read: chains of thought of mixed languages, with long paragraphs
or with code blocks are left out (arXiv:2501.12948, §2.3.3). Each of these has a function here; what they are asked with
and in which order stands in rejection.py.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from offtrail.rewards.components.repetition import WORD, repeated_grams
from offtrail.tasks.lines import fault_of
from offtrail.tasks.overlap import words_of

FENCE = re.compile(r"^[ \t>*-]*(?:```|~~~)", re.MULTILINE)
BLANK_LINES = re.compile(r"\n[ \t\r]*\n")
ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([^{}\n]*)\}")
BRACE = re.compile(r"[{}]")
ESCAPED = re.compile(r"\\[\\{}$]")
CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)
MONEY = re.compile(r"\$(?=\d[\d,.]*(?:\s|[.,;:?!)]|$))")
"""A dollar sign before a plain number: a price as often as the beginning of a formula."""


def mixed_language(text: str, share: Callable[[str], float], least: float) -> str:
    """``share``: which part of the words is of the language that is wanted (rewards/components/language.py)."""
    found = share(text)
    return f"{found:.2f} of its words are of the language, less than {least:g}" if found < least else ""


def long_paragraph(text: str, longest: int) -> str:
    """A paragraph ends at a blank line."""
    found = max((len(part.strip()) for part in BLANK_LINES.split(text)), default=0)
    return f"a paragraph of {found:,} characters, more than {longest:,}" if found > longest else ""


def code_block(text: str) -> str:
    """A fence of three backquotes or tildes at the beginning of a line; code within a line is none."""
    found = FENCE.search(text)
    return f"a code block in line {text.count(chr(10), 0, found.start()) + 1}" if found else ""


def unbalanced(text: str) -> str:
    r"""Braces, \(…\), \[…\], $$…$$ and \begin{…}…\end{…} that do not pair; what stands in code does not count.

    A single `$` before a number may be a price or begin a formula; there must be one reading in which all others pair.
    """
    text = CODE.sub(" ", text) if "`" in text or "~~~" in text else text
    for opens, closes in (("\\(", "\\)"), ("\\[", "\\]")):
        if (n := _count(text, opens)) != (m := _count(text, closes)):
            return f"{n} {opens} and {m} {closes}"
    stack = list[str]()
    for found in ENVIRONMENT.finditer(text):
        if found[1] == "begin":
            stack.append(found[2])
        elif not stack or stack.pop() != found[2]:
            return f"\\end{{{found[2]}}} closes nothing"
    if stack:
        return f"\\begin{{{stack[-1]}}} is not closed"
    bare = ESCAPED.sub(" ", text)
    depth = 0
    for brace in BRACE.findall(bare):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return "a brace closes nothing"
    if depth:
        return f"{depth} braces are not closed"
    if bare.count("$$") % 2:
        return "a $$ is not closed"
    return "" if _dollars_pair(bare.replace("$$", " ")) else "a $ is not closed"


def _dollars_pair(text: str) -> bool:
    """Whether there is a reading in which every single `$` is a price or pairs with another; all of them are tried.

    A formula that begins like a price, such as $5 + 3$, ends at a mark right after a character that is no blank.
    """
    readings = {"outside"}
    for found in re.finditer(r"\$", text):
        at = found.start()
        price, tight = MONEY.match(text, at) is not None, at > 0 and not text[at - 1].isspace()
        after = set[str]()
        for state in readings:
            if price:
                after |= {"outside": {"outside", "number"}, "formula": {"formula"}, "number": set()}[state]
            elif state != "number" or tight:
                after.add("formula" if state == "outside" else "outside")
        readings = after
    return "outside" in readings


def _count(text: str, mark: str) -> int:
    r"""Of ``\(`` and its like; the second backslash of ``\\`` (a LaTeX line break, as in ``\\[2pt]``) begins none."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*" + re.escape(mark), text)) if mark in text else 0


def garbled(text: str, most: float) -> str:
    """Control and private characters and half surrogates, at all; or more than ``most`` of the visible characters
    neither letters nor digits, nor such as formulas and prose are made of.
    """
    if fault := fault_of(text):
        return fault.partition(",")[0].partition(";")[0]
    found = {c: n for c, n in Counter(text).items() if c not in " \t\n\r\f\v"}
    if bad := next((c for c in found if kind_of(c) == "bad"), None):
        return f"the character U+{ord(bad):04X}"
    odd = sum(n for c, n in found.items() if kind_of(c) == "odd")
    share = odd / sum(found.values()) if found else 0.0
    return f"{share:.2f} of its characters are neither letters, digits nor usual marks" if share > most else ""


@cache
def kind_of(character: str) -> Literal["bad", "odd", "fine"]:
    """Of a character that is no blank."""
    category = unicodedata.category(character)
    if category in ("Cc", "Co", "Cn") or character == "\ufffd":
        return "bad"
    return "fine" if category[0] in "LNMZ" or character in PLAIN else "odd"


PLAIN = frozenset(string.punctuation + "–—‘’“”…·×÷±−≤≥≠≈√∞∑∏∫∂∈∉⊂⊆∪∩∀∃→⇒↔⇔°′″，。！？；：、（）《》「」")
"""Marks of prose, code and formulas."""


def repetitive(text: str, most: float, n: int) -> str:
    """More than ``most`` of its n-grams of words stood before (rewards/components/repetition.py)."""
    share = repeated_grams(WORD.findall(text), n)
    return f"{share:.2f} of its {n}-grams stood before, more than {most:g}" if share > most else ""


def short(text: str, least: int) -> str:
    """Fewer characters than ``least``."""
    return f"{len(text):,} characters, fewer than {least:,}" if len(text) < least else ""


def long(text: str, most: int) -> str:
    """More characters than ``most``."""
    return f"{len(text):,} characters, more than {most:,}" if len(text) > most else ""


def same_text(text: str) -> str:
    """What two answers have in common that are the same: the text in composed characters (NFC), runs of blanks one."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def shingles(text: str, n: int) -> frozenset[int]:
    """The hashes of each n words in a row, of a shorter text of all of it; words as overlap.py has them, marks too
    where there are no words. Trap: another in each process, so that none may be kept.
    """
    words: Sequence[str] = words_of(text) or text.split()
    return frozenset(hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1)))


def similarity(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard's: what both have over what either has, from 0 to 1."""
    both = len(one & other)
    either = len(one) + len(other) - both
    return both / either if either else 1.0


def most_similar(one: frozenset[int], other: frozenset[int]) -> float:
    """What ``similarity`` can be at most, by the sizes alone: answers of other lengths need not be compared."""
    short, long = sorted((len(one), len(other)))
    return short / long if long else 1.0

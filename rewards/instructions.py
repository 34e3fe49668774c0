"""Instructions that a program can check, by the names and arguments of IFEval (Zhou et al. 2023, arXiv:2311.07911).

    (name, arguments, response) ─► followed: strict, or loosely: any of eight readings of it

Every checker is a pure function of the response and its arguments. What counts as a word, a sentence or a paragraph is
said at each, as IFEval's own code has it (docs/evaluation.md: where not). A name without a checker is
not supported (`complaint`), and nobody may take it for followed: `language:response_language` needs a detector.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

WORD = re.compile(r"\w+")
APART = re.compile(r"[\s;@#$%&?!*\[\](){}<>\"“”«»„‘’`]+|--+|\.{2,}|\.(?!\w)|[:,](?!\d)")
ENDING = re.compile(
    r"(?<=[^'])(?='(?:s|m|d|ll|re|ve)$)|(?<=[^'])(?=n't$)"
    r"|(?<=\bcan)(?=not\b)|(?<=\b[gw][oa]n)(?=na\b)|(?<=\bgot)(?=ta\b)|(?<=\b(?:gim|lem))(?=me\b)",
    re.IGNORECASE,
)
"""Where a word ends for the Penn Treebank: at marks, and before what is contracted."""
MARKS = re.compile(r"(?<![.!?])[.!?]++(?=[\s)\";}\]*:@'({\[]|$)")
OPENING = re.compile(r"[\s\"'“‘(\[{*]")
BETWEEN = re.compile(r"[\s\"'“‘(\[{*_-]*")
SAYS = re.compile(r"[^\s\"')\]}.!?]")
ABBREVIATION = re.compile(
    r"mr|mrs|ms|messrs|dr|prof|rev|gen|sen|rep|gov|jr|sr|st|vs|co|corp|inc|ltd|bros|jan|feb|aug|sept?|oct|nov|dec|"
    r"[ap]\.m|u\.[skn]|u\.s\.a|d\.c|n\.y|ph\.d|[^\W\d_]",
    re.IGNORECASE,
)
"""Initials, too."""
STARTER = re.compile(
    r"(?:The|It|Its|This|That|These|Those|He|She|We|You|They|I|An?|And|But|So|If|In|On|At|For|As|There|Here|When|"
    r"While|What|Who|How|Why|Because|Although|Though|However|Instead|Once|After|Before|With|Your|My|Our|His|Her|Their|"
    r"Some|Most|Many|To)(?![^\W_])"
)
"""What begins a sentence behind an abbreviation."""
AT_LEAST, LESS_THAN = "at least", "less than"
RELATIONS = (AT_LEAST, LESS_THAN)
YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Arguments = Mapping[str, Any]


def compared(found: int, relation: str, wanted: int) -> bool:
    """``found`` is `at least` or `less than` the ``wanted`` number."""
    return found >= wanted if relation == AT_LEAST else found < wanted


def sentences(text: str) -> int:
    """How many sentences: what ends in . ! ? before a blank, a bracket or a quotation mark, or with the text, and holds
    more than marks. The number of a list (1.) is one by itself, where no small letter follows: Punkt (Kiss and Strunk
    2006) counts so, which IFEval takes with nltk's English model.
    """
    count, begin = 0, 0
    for marks in MARKS.finditer(text):
        if _ends(text, marks.start(), marks.end()):
            count += bool(SAYS.search(text, begin, marks.end()))
            begin = marks.end()
    return count + bool(SAYS.search(text, begin))


def _ends(text: str, start: int, stop: int) -> bool:
    """Whether the marks from ``start`` to ``stop`` end a sentence."""
    marks, behind = text[start:stop], BETWEEN.match(text, stop).end()  # type: ignore[union-attr]
    if marks.strip("."):
        return True
    before = OPENING.split(text[max(0, start - 12) : start])[-1]
    if marks == "." and ABBREVIATION.fullmatch(before):
        return STARTER.match(text, behind) is not None
    return not (text[behind : behind + 1].islower() and (len(marks) > 1 or before[-1:].isdigit()))


def existence(text: str, *, keywords: list[str]) -> bool:
    """Every keyword stands in it, in any case, in a longer word too."""
    return all(word.lower() in text.lower() for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """So many times the keyword, in any case, in longer words too."""
    return compared(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words stands in it as a word of its own, in any case."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """So many times the letter (or another character), in any case."""
    return compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    return compared(sentences(text), relation, num_sentences)


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    r"""So many words, runs of \w."""
    return compared(len(WORD.findall(text)), relation, num_words)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, parted by ***; none of them empty, but before the first mark or after the last."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    parts = parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]
    return len(parts) == num_paragraphs and all(parts)


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, parted by two line ends; the nth part begins with the word, in any case, up to one of
    the marks . , ? ! and quotation marks. Blank parts are no paragraphs, and yet count where the nth is looked for.
    """
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    begins = [*parts[nth_paragraph - 1].split(), ""][0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", begins)[0].lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets, such as [address]; [] is one."""
    return sum(_pairs(line) for line in text.split("\n")) >= num_placeholders


def _pairs(line: str) -> int:
    count = end = 0
    while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1):
        count += 1
    return count


def postscript(text: str, *, postscript_marker: str) -> bool:
    """The marker stands somewhere in it, in any case; blanks may stand between the letters of P.S. and P.P.S."""
    marker = postscript_marker.strip()
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, text.lower()) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with one * or with -, a rule of dashes included."""
    return (
        sum(len(re.findall(bullet, text, re.MULTILINE)) for bullet in (r"^[^\S\n]*\*[^*].*", r"^[^\S\n]*-"))
        == num_bullets
    )


def constrained_response(text: str) -> bool:
    """One of "My answer is yes.", "My answer is no.", "My answer is maybe." stands in it."""
    return any(answer in text for answer in YES_NO_MAYBE)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many parts between * or ** within a line, each with something in it; ***so*** is both."""
    parts = [*re.findall(r"\*([^\n*]*)\*", text), *re.findall(r"\*\*([^\n*]*)\*\*", text)]
    return sum(bool(part.strip()) for part in parts) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many times the word and a number, such as SECTION 1."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """All of it is one JSON value, in a ``` fence or not."""
    bare = text.strip().removesuffix("```")
    for fence in ("```json", "```Json", "```JSON", "```"):
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A title in double angular brackets, such as <<poem of joy>>."""
    lines = (line[line.find("<<") : line.rfind(">>") + 2] for line in text.split("\n") if "<<" in line)
    return any(len(found) > 4 and found.lstrip("<").rstrip(">").strip() for found in lines)


def two_responses(text: str) -> bool:
    """Two different responses parted by ******."""
    parts = [part.strip() for part in text.split("******")]
    parts = parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the prompt, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """It ends with the phrase, in any case, but for a quotation mark."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """All of it stands within double quotation marks."""
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words all in capital letters, those of one letter included, as the Penn Treebank cuts them: WELL-KNOWN
    is one, IT'S and CANNOT are two, I'm has one.
    """
    words = (part for word in APART.split(text) for part in ENDING.split(word) if part)
    return compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """Every letter is a capital one, and a Latin one: that it is English is not looked at."""
    return text.isupper() and _latin(text)


def english_lowercase(text: str) -> bool:
    """No letter is a capital one, and all are Latin ones: that it is English is not looked at."""
    return text.islower() and _latin(text)


def no_comma(text: str) -> bool:
    """No comma anywhere."""
    return "," not in text


def _latin(text: str) -> bool:
    return not re.search(r"[^\W\d_A-Za-zÀ-ɏ]", text)


CHECKERS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""IFEval's name → checker. Its arguments have IFEval's names, misspelt ones too."""


def complaint(name: str, arguments: Arguments) -> str:
    """What is wrong with the arguments of an instruction that has a checker; empty where all is well."""
    wanted = inspect.signature(CHECKERS[name]).parameters
    wanted = {key: parameter for key, parameter in wanted.items() if parameter.kind is parameter.KEYWORD_ONLY}  # type: ignore[assignment]
    if missing := [key for key in wanted if key not in arguments]:
        return f"{name} needs {missing[0]}"
    for key, value in arguments.items():
        if key not in wanted:
            return f"{name} takes no {key}, but {', '.join(wanted) or 'nothing'}"
        if key.endswith("relation") and value not in RELATIONS:
            return f"{name}: {key}={value!r} must be one of {', '.join(RELATIONS)}"
        kind = str(wanted[key].annotation)
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            "str": isinstance(value, str) and bool(value),
            "list[str]": isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value),
        }
        if not fits[kind]:
            return f"{name}: {key}={value!r} must be {kind}"
    return ""


def followed(text: str, name: str, arguments: Arguments) -> bool:
    """Strict: the response, as it is, says something and follows the instruction."""
    return bool(text.strip()) and CHECKERS[name](text, **arguments)


def followed_loosely(text: str, name: str, arguments: Arguments) -> bool:
    """Any of eight readings follows it: as it is, without the first line, the last or both, and each without asterisks.

    What goes before and after an answer ("Sure, here it is:") and its markup do not count against it (arXiv:2311.07911,
    section 2.2): fewer false negatives, and some false positives.
    """
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(followed(one, name, arguments) for one in (*cut, *(part.replace("*", "") for part in cut)))

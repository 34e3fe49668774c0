"""Instructions that a program can check, by the names and arguments of IFEval (Zhou et al. 2023, arXiv:2311.07911).

    (name, arguments, response) ─► followed: strict, or loosely: any of eight readings of it

Every checker is a pure function of the response and its arguments. What counts as a word, a sentence or a paragraph is
said at each; sentences are split by a rule of our own, since IFEval's splitter is a download. A name without a checker
is not supported (`complaint`), and nobody may take it for followed: `language:response_language` needs a detector.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

WORD = re.compile(r"\w+")
CAPITAL_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SENTENCE_END = re.compile(r"(?!(?<=\b[Nn]o)\.\s+\d)[.!?…]+[\"'”’)\]*_]*(?=\s|$)")
NO_END = re.compile(
    r"(?:^|[\s(\"'“])(?:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|fig|approx|inc|ltd|[a-z](?:\.[a-z])*)\.$"
    r"|(?:^|\n)[ \t]*\d{1,3}\.$",
    re.IGNORECASE,
)
"""Dots after titles, abbreviations, initials and a number that begins a line end no sentence."""
AT_LEAST, LESS_THAN = "at least", "less than"
RELATIONS = (AT_LEAST, LESS_THAN)
YES_NO_MAYBE = ("my answer is yes.", "my answer is no.", "my answer is maybe.")

Arguments = Mapping[str, Any]


def compared(found: int, relation: str, wanted: int) -> bool:
    """``found`` is `at least` or `less than` the ``wanted`` number."""
    return found >= wanted if relation == AT_LEAST else found < wanted


def sentences(text: str) -> int:
    """How many sentences: stretches with a word in them that end in . ! ? … before a blank, or with the text."""
    count, begin = 0, 0
    for end in SENTENCE_END.finditer(text):
        if end[0] == "." and NO_END.search(text[max(0, end.start() - 40) : end.start() + 1]):
            continue
        count += bool(WORD.search(text, begin, end.end()))
        begin = end.end()
    return count + bool(WORD.search(text, begin))


def existence(text: str, *, keywords: list[str]) -> bool:
    """Every keyword stands in it, in any case, in a longer word too."""
    return all(word.lower() in text.lower() for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """So many times the keyword, in any case, in longer words too."""
    return compared(text.lower().count(keyword.lower()), relation, frequency)


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
    """Exactly so many paragraphs, parted by empty lines, of which the nth begins with the word, in any case."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    begins = parts[nth_paragraph - 1].split()[0].strip("\"'“”‘’([{*_").rstrip(".,;:!?\"'“”‘’)]}*_")
    return begins.lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets, such as [address]."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A line begins with the marker (P.S. or P.P.S, blanks between its letters allowed), or it stands after a blank,
    and something follows it.
    """
    letters = [re.escape(letter) for letter in re.sub(r"[.\s]", "", postscript_marker)]
    dotted = "." in postscript_marker
    marker = r"\.\s?".join(letters) + r"\.?" if dotted else re.escape(postscript_marker)
    before = r"(?<!p\.)(?<!p\.\s)" if postscript_marker.lower().startswith("p.s") else ""
    return re.search(rf"(?:^|\s){before}{marker}:?\s*\S", text, re.IGNORECASE | re.MULTILINE) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with * or -."""
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!--))[ \t]*\S", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """One of "My answer is yes.", "My answer is no.", "My answer is maybe." stands in it."""
    return any(answer in text.lower() for answer in YES_NO_MAYBE)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many parts between * or ** within a line, each with something in it."""
    doubles = re.findall(r"\*\*([^\n*]+)\*\*", text)
    singles = re.findall(r"(?<!\*)\*(?!\*)([^\n*]+)\*(?!\*)", text)
    return sum(bool(part.strip()) for part in (*doubles, *singles)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections that begin with the word and a number, such as SECTION 1."""
    return len(re.findall(rf"\b{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """All of it is one JSON value, in a ``` fence or not."""
    bare = re.sub(r"\A```(?:json)?|```\Z", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A title in double angular brackets, such as <<poem of joy>>."""
    return any(re.search(r"\w", found) for found in re.findall(r"<<([^\n]+?)>>", text))


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
    """So many words all in capital letters, one-letter words included."""
    found = sum(word.isupper() for word in CAPITAL_WORD.findall(text))
    return compared(found, capital_relation, capital_frequency)


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

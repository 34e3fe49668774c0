"""Steps: where they end, for every kind of mark, and however a tokenizer cuts the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from fakes.text import byte_name
from offtrail.platform.model.tiny import build_tokenizer as build_tiny
from offtrail.rewards.steps import Pieces, Steps, aggregate, answer_from, token_ends

THOUGHT = "<think>Add 3.\nCarry 1.</think><answer>12</answer>"


def bytes_tokenizer(words: Sequence[bytes]) -> Tokenizer:
    """Byte level: all 256 bytes, and ``words`` of several, which need not be whole characters."""
    names = ["<eos>", *(byte_name(byte) for byte in range(256)), *("".join(map(byte_name, word)) for word in words)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(dict.fromkeys(names))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's: ▁ for a blank, which is dropped at the very beginning, and bytes for what is in no token."""
    names = [
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Add",
        "Add",
        ".",
        "▁one",
        "</think>",
        "3",
        "√",
    ]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


WORDS = [b"ab", b".\n", b"\n\nb", b" c", "é".encode(), b"x\xc3", b"\xa9y", b"\x82\xac\xe2", b"</think>", "。".encode()]
BYTES, PIECES, TINY = bytes_tokenizer(WORDS), sentencepiece(), build_tiny().backend_tokenizer
TOKENIZERS = {"bytes": BYTES, "sentencepiece": PIECES, "tiny": TINY}
MARKS: list[dict[str, Any]] = [
    {"by": "newline"}, {"by": "sentence"}, {"by": "separator", "separator": "b"}, {"by": "separator", "separator": "é"},
    {"by": "tokens", "tokens": 3}, {"by": "newline", "within": "thought"}, {"by": "newline", "rest": "none"},
]  # fmt: skip


def pieces_by(tokenizer: Tokenizer) -> Pieces:
    return Pieces(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False), silent=[0])


def letters(text: str) -> list[str]:
    return list(text)


def ends(text: str, opened: str = "", **given: Any) -> list[int]:
    """With a token a character."""
    return Steps.of(given).ends(letters(text), opened).tolist()


def cut(text: str, opened: str = "", **given: Any) -> list[str]:
    """The steps as texts; what follows the last is left out."""
    return [text[a:b] for a, b in itertools.pairwise([0, *ends(text, opened, **given)])]


# --- the marks ---


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\ntwo\nthree", ["one\n", "two\n", "three"]),
        ("one\n\n\ntwo\n", ["one\n", "\n\ntwo\n"]),  # a blank line is no step
        ("\n \none", ["\n \none"]),
        ("one  \n  ", ["one  \n"]),  # nothing to read behind the mark
        ("<think>\none\n</think>", ["<think>\none\n"]),  # a tag is nothing to read
        ("one", ["one"]),
        ("one \t", ["one"]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_lines_are_steps(text: str, steps: list[str]) -> None:
    assert cut(text, by="newline") == steps


def test_of_what_follows_the_last_mark_rest_decides() -> None:
    assert cut("one\ntwo", by="newline", rest="none") == ["one\n"]
    assert cut("one", by="newline", rest="none") == []


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Add 3.5 to 1. Then stop!", ["Add 3.5 to 1.", " Then stop!"]),
        ('He said "No." Why?\nSo', ['He said "No."', " Why?", "\nSo"]),
        ("1. Add, i.e. sum.\n2. Stop.", ["1. Add, i.e. sum.", "\n2. Stop."]),
        ("加三。再加一！对", ["加三。", "再加一！", "对"]),
        ("Wait... no", ["Wait...", " no"]),
        ("a. b. c", ["a. b.", " c"]),  # items of a list
        ("half a sentence", ["half a sentence"]),
    ],
)
def test_sentences_are_steps(text: str, steps: list[str]) -> None:
    assert cut(text, by="sentence") == steps


def test_a_separator_ends_a_step_and_an_empty_step_is_none() -> None:
    assert cut("a##b####c", by="separator", separator="##") == ["a##", "b##", "##c"]
    assert cut("########", by="separator", separator="##") == []


def test_a_closing_tag_ends_a_step() -> None:
    text = "<think><step>a</step><step> </step><step>b</step>ok</think>"
    assert cut(text, by="tag") == ["<think><step>a</step>", "<step> </step><step>b</step>", "ok</think>"]
    assert cut("<idea>a</idea>", by="tag", tag="idea") == ["<idea>a</idea>"]


def test_a_number_of_tokens_is_a_step() -> None:
    assert ends("abcdefgh", by="tokens", tokens=3) == [3, 6, 8]
    assert ends("abcdefgh", by="tokens", tokens=4) == [4, 8]
    assert ends("abcdefgh", by="tokens", tokens=3, rest="none") == [3, 6]
    assert ends("ab  ", by="tokens", tokens=3) == [2]
    assert ends("", by="tokens", tokens=3) == []


def test_within_the_thought_nothing_behind_it_is_a_step() -> None:
    steps = ["<think>Add 3.\n", "Carry 1."]
    assert cut(THOUGHT, by="newline", within="thought") == steps
    assert cut(THOUGHT, by="newline") == [steps[0], "Carry 1.</think><answer>12</answer>"]
    assert cut("a\nb", opened="<think>\n", by="newline", within="thought") == ["a\n", "b"]
    assert cut("a\nb", opened="<think>\n\n</think>\n", by="newline", within="thought") == []
    assert ends("a\nb", by="tokens", within="thought") == []


def test_where_the_answer_begins() -> None:
    assert answer_from(letters(THOUGHT)) == THOUGHT.index("<answer>")
    assert answer_from(letters("12")) == 0
    assert answer_from(letters("<think>12")) == 9
    assert answer_from(letters("12"), "<think>\n") == 2
    assert answer_from(["a</", "think>b", "c"], "<think>") == 2
    assert answer_from([]) == 0


def test_a_step_ends_with_the_token_that_completes_its_mark() -> None:
    newline, double = Steps(), Steps(by="separator")
    assert newline.ends(["one", "\n", "\n", "two", ".\n", "three", " "]).tolist() == [2, 5, 6]
    assert newline.ends(["one", "\ntwo", "\n"]).tolist() == [2, 3]  # it has begun the next one
    assert newline.ends(["a\nb\nc"]).tolist() == [1]  # and here it holds three
    assert double.ends(["one\n", "\ntwo", "\n\n"]).tolist() == [2, 3]
    assert double.ends(["one\n", "two"]).tolist() == [2]


def test_a_stop_token_is_of_no_step_but_its_text_elsewhere_is() -> None:
    eos, tokens = 0, [TINY.token_to_id(c) for c in "ab"]
    pieces = pieces_by(TINY)
    stop = Pieces(lambda ids: TINY.decode(list(ids), skip_special_tokens=False), silent=[TINY.token_to_id("<eos>")])
    assert stop.of([*tokens, TINY.token_to_id("<eos>")]) == ["a", "b", ""]
    assert Steps().ends(stop.of([*tokens, TINY.token_to_id("<eos>")])).tolist() == [2]
    assert pieces.of([eos, *tokens])[1:] == ["a", "b"]


# --- the text of tokens ---


def test_a_blank_that_the_tokenizer_drops_at_the_beginning_is_no_text() -> None:
    blank, add, one = (PIECES.token_to_id(t) for t in ("▁", "▁Add", "▁one"))
    assert pieces_by(PIECES).of([add, add, one]) == ["Add", " Add", " one"]
    assert pieces_by(PIECES).of([blank, blank, add]) == ["", " ", " Add"]


def test_a_character_is_of_the_token_that_completes_it() -> None:
    byte = {b: i + 1 for i, b in enumerate(range(256))}
    euro = [byte[b] for b in "€".encode()]
    assert pieces_by(BYTES).of(euro) == ["", "", "€"]
    assert pieces_by(BYTES).of([*euro[:2], byte[ord("a")]]) == ["", "\ufffd", "a"]
    assert pieces_by(BYTES).of([BYTES.token_to_id("xÃ"), BYTES.token_to_id("©y")]) == ["x", "éy"]
    assert pieces_by(BYTES).of(euro[:2]) == ["", "\ufffd"]
    fallback = [PIECES.token_to_id(f"<0x{b:02X}>") for b in "€".encode()]
    assert pieces_by(PIECES).of(fallback) == ["", "", "€"]


@pytest.mark.parametrize("offset", [1, 2])
def test_a_long_text_whose_tokens_all_end_inside_characters_is_read_whole(offset: int) -> None:
    raw = "€".encode() * 40
    chunks = [raw[:offset], *(raw[i : i + 3] for i in range(offset, len(raw), 3))]
    tokenizer = bytes_tokenizer([chunk for chunk in dict.fromkeys(chunks) if len(chunk) > 1])
    tokens = [tokenizer.token_to_id("".join(map(byte_name, chunk))) for chunk in chunks]
    assert pieces_by(tokenizer).of(tokens) == ["", *["€"] * 40]


def tokens_of(name: str) -> st.SearchStrategy[list[int]]:
    size = TOKENIZERS[name].get_vocab_size()
    return st.lists(st.integers(1, size - 1), max_size=40)


@given(tokens_of("bytes"))
@settings(max_examples=300, deadline=None)
def test_pieces_of_bytes_joined_are_the_text(tokens: list[int]) -> None:
    pieces = pieces_by(BYTES).of(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == BYTES.decode(tokens, skip_special_tokens=False)


@given(st.text(st.sampled_from("Ad.3√é€\n 字"), max_size=30), st.integers(0, 90))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_sentencepiece_text_joined_are_the_text(text: str, kept: int) -> None:
    """With bytes for what it has no token of; and those of a truncated one are the same, but for its last character.
    The decoder itself turns all bytes side by side into U+FFFD where they end in the middle of a character.
    """
    tokens: list[int] = []
    for character in text.replace(" ", "▁"):
        token = PIECES.token_to_id(character)
        tokens += [PIECES.token_to_id(f"<0x{b:02X}>") for b in character.encode()] if token is None else [token]
    pieces = pieces_by(PIECES).of(tokens)
    assert "".join(pieces) == PIECES.decode(tokens, skip_special_tokens=False)
    assert [p.rstrip("\ufffd") for p in pieces_by(PIECES).of(tokens[:kept])] == pieces[:kept]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_hold_for_random_tokens(name: str) -> None:
    """Ascending, inside the answer, each at the first token whose text so far reaches the mark; a truncated answer has
    the same steps, but perhaps for its last one.
    """
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(7)
    pieces_of = pieces_by(tokenizer)
    checked = 0
    for given_steps, _ in itertools.product(MARKS, range(30)):
        steps = Steps.of(given_steps)
        size = int(rng.integers(0, 40))
        alphabet = rng.integers(1, tokenizer.get_vocab_size(), 12)
        newline = tokenizer.token_to_id(byte_name(10)) or tokenizer.token_to_id("\n") or tokenizer.token_to_id("<0x0A>")
        tokens = rng.choice([*alphabet, newline, newline], size).astype(np.int32)
        pieces = pieces_of.of(tokens)
        found = steps.ends(pieces).tolist()
        assert len(pieces) == size
        assert found == sorted(set(found))
        assert all(0 < end <= size for end in found)
        if steps.by != "tokens":
            assert found == brute(pieces, steps.cut("".join(pieces)))
        for short in range(size):
            part = pieces_of.of(tokens[:short])
            if part != pieces[:short]:  # its last character is not whole
                continue
            less = steps.ends(part).tolist()
            if steps.within == "response":
                sure = less[:-1] if steps.rest == "step" else less
                assert sure == found[: len(sure)]
                checked += bool(sure)
    assert checked > 1000


def brute(pieces: Sequence[str], characters: Sequence[int]) -> list[int]:
    lengths = list(itertools.accumulate(map(len, pieces)))
    return sorted({next(i for i, n in enumerate(lengths) if n >= end) + 1 for end in characters})


def test_token_ends_of_characters() -> None:
    assert token_ends(["ab", "", "c"], [1, 2, 3]).tolist() == [1, 3]
    assert token_ends(["", "a"], [1]).tolist() == [2]
    assert token_ends([], []).tolist() == []


# --- numbers, settings ---


def test_aggregates_by_hand() -> None:
    scores = [0.5, 0.2, 0.9]
    found = {how: aggregate(scores, how) for how in ("min", "mean", "product", "last", "sum")}  # type: ignore[arg-type]
    assert found == pytest.approx({"min": 0.2, "mean": 1.6 / 3, "product": 0.09, "last": 0.9, "sum": 1.6})
    assert math.isnan(aggregate([], "sum"))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"by": "line"}, "scorer.models.rm.steps.by=line: must be one of newline, sentence, separator, tag, tokens"),
        (
            {"buy": "x"},
            "scorer.models.rm.steps.buy=x: unknown; must be one of by, separator, tag, tokens, within, rest",
        ),
        ({"by": "tokens", "tokens": 0}, "scorer.models.rm.steps.tokens=0: must be a whole number ≥ 1"),
        ({"by": "separator", "separator": ""}, "scorer.models.rm.steps.separator='': must be a text that answers"),
        (
            {"separator": "##"},
            "scorer.models.rm.steps.separator='##': is read with scorer.models.rm.steps.by=",
        ),
        ({"rest": "some"}, "scorer.models.rm.steps.rest=some: must be one of step, none"),
    ],
)
def test_wrong_settings_are_named_in_one_line(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match="scorer") as caught:
        Steps.of(wrong, "scorer.models.rm.steps")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_text_has_no_tokens() -> None:
    with pytest.raises(ValueError, match="by=tokens: a text has no tokens"):
        Steps(by="tokens").cut("a")

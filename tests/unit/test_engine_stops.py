"""Stop strings: found at the token that completes them, however the model cuts its text; and in the local engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from fakes.client import VOCAB, build
from fakes.text import build_tokenizer, first_with, save_tokenizer
from offtrail.core.protocols import Completion, Request
from offtrail.core.types import Sampling
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.stops import StopStrings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build(0).save_pretrained(folder)
    save_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(VOCAB)


def loaded(folder: Path) -> StopStrings:
    stops = StopStrings(folder)
    stops.load()
    return stops


def found_at(stops: StopStrings, tokens: list[int], strings: tuple[str, ...]) -> tuple[int, str]:
    """Token by token, as an engine does it."""
    for count in range(1, len(tokens) + 1):
        if string := stops.completed(tokens[:count], strings):
            return count, string
    return len(tokens), ""


def named(tokenizer: Tokenizer, *names: str) -> list[int]:
    return [tokenizer.token_to_id(name) for name in names]


def test_the_tokenizer_of_these_tests_cuts_two_letters_into_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("abc").tokens == ["ab", "c"]
    assert tokenizer.encode("é").ids == [98, 99]


@pytest.mark.parametrize(
    ("names", "stop", "expected"),
    [
        (("<", "/", "a", ">", "x"), ("</a>",), (4, "</a>")),  # several tokens
        (("x", "a", "b", "x"), ("ab",), (3, "ab")),  # cut otherwise than the tokenizer would
        (("x", "ab", "x"), ("xa",), (2, "xa")),  # ends in the middle of a token
        (("x", "ab", "cd"), ("bc",), (3, "bc")),  # and begins in the middle of one
        (("ab", "Ġ", "x"), ("b ",), (2, "b ")),  # ends with a blank
        (("Ã", "©", "x"), ("é",), (2, "é")),  # a character of two tokens
        (("â", "Ĥ", "¬", "x"), ("€x",), (4, "€x")),  # of three, and one more
        (("x", "Ã", "x", "y"), ("xy",), (4, "xy")),  # after half a character
        (("x", "ab"), ("b", "xab"), (2, "b")),  # two at once: the first that was asked for
        (("a", "<eos>", "b"), ("ab",), (3, "")),  # a special token's text lies between
        (("a", "<eos>", "b"), ("os>b",), (3, "os>b")),
        (("a", "b"), ("abc",), (2, "")),
    ],
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(
    folder: Path, tokenizer: Tokenizer, names: tuple[str, ...], stop: tuple[str, ...], expected: tuple[int, str]
) -> None:
    tokens = named(tokenizer, *names)
    assert None not in tokens
    assert found_at(loaded(folder), tokens, stop) == expected


def test_ids_beyond_the_tokenizer_have_no_text_and_do_not_hide_a_string(folder: Path, tokenizer: Tokenizer) -> None:
    """A model's table is often longer than its tokenizer."""
    a, b = named(tokenizer, "a", "b")
    assert found_at(loaded(folder), [a, *[VOCAB + 7] * 50, b, a], ("ab",)) == (52, "ab")


def test_token_by_token_finds_what_decoding_everything_finds(folder: Path, tokenizer: Tokenizer) -> None:
    rng, stops, stopped = np.random.default_rng(0), loaded(folder), 0
    for _ in range(300):
        tokens = rng.integers(0, 140, 40).tolist()  # mostly letters, blanks, signs and halves of characters
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        start, length = int(rng.integers(0, len(text) - 8)), int(rng.integers(1, 8))
        strings = tuple(s for s in ("never", text[start : start + length]) if "\ufffd" not in s)
        expected = first_with(tokenizer, tokens, strings)
        assert found_at(stops, tokens, strings) == expected
        stopped += bool(expected[1])
    assert stopped > 100


def test_a_blank_that_a_tokenizer_drops_at_the_beginning_is_there_everywhere_else(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "▁b": 1, "c": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stops = loaded(tmp_path)
    assert found_at(stops, [0, 2, 1], (" b",)) == (3, " b")
    assert found_at(stops, [0, 2, 2, 2, 2, 1], (" b",)) == (6, " b")
    assert found_at(stops, [1, 2, 2], (" b",)) == (3, "")  # its text is "bcc"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    build(0).save_pretrained(tmp_path)
    engine = local(tmp_path)
    with pytest.raises(ValueError, match=r"no .*tokenizer\.json; use stop_token_ids"):
        engine.generate([Request(0, prompt(0), 1, Sampling(5, stop=("a",)))])
    assert engine.unfinished == 0


# In the local engine


def local(folder: Path, max_running: int = 5) -> LocalEngine:
    return LocalEngine(folder, LocalConfig(max_running=max_running), max_length=256, threads=1)


def prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, 8).astype(np.int32)


def run(engine: LocalEngine, requests: list[Request]) -> dict[tuple[int, int], Completion]:
    done: dict[tuple[int, int], Completion] = {}
    engine.generate(requests)
    while engine.unfinished:
        done |= {(c.request, c.index): c for c in engine.step()}
    return done


def test_a_sample_ends_with_the_token_that_completes_a_stop_string_and_keeps_it_whole(
    folder: Path, tokenizer: Tokenizer
) -> None:
    """Beside samples that have other strings, or none, in rows that move; a string in the prompt stops nobody."""
    stop = ("zz", "a", "x ", "qe")
    sampling = {
        0: Sampling(120, seed=1),
        1: Sampling(120, seed=1, stop=stop),
        2: Sampling(120, seed=1, stop=("never",)),
    }
    begun = np.array(tokenizer.encode("aqe").ids, np.int32)
    plain = run(local(folder), [Request(i, begun, 4, Sampling(120, seed=1)) for i in range(3)])
    done = run(local(folder), [Request(i, begun, 4, sampling[i]) for i in range(3)])
    for (request, index), c in done.items():
        whole = plain[request, index].tokens.tolist()
        count, string = first_with(tokenizer, whole, sampling[request].stop)
        assert c.tokens.tolist() == whole[:count]
        assert len(c.logprobs) == len(c.versions) == count
        assert c.stopped_by == string
        assert c.finish == ("stop" if string else "length")
    assert all(done[1, index].stopped_by for index in range(4))
    assert any(
        not tokenizer.decode(c.tokens.tolist(), skip_special_tokens=False).endswith(c.stopped_by)
        for c in (done[1, index] for index in range(4))
    ), "one string ends in the middle of its token"


def test_a_stop_string_counts_before_a_stop_token_and_before_the_limit(folder: Path, tokenizer: Tokenizer) -> None:
    greedy = Sampling(6, temperature=0.0)
    last = run(local(folder), [Request(0, prompt(1), 1, greedy)])[0, 0].tokens.tolist()
    text = tokenizer.decode(last[-1:], skip_special_tokens=False)
    assert "\ufffd" not in text
    stops = Sampling(6, temperature=0.0, stop=(text,), stop_token_ids=(last[-1],))
    c = run(local(folder), [Request(0, prompt(1), 1, stops)])[0, 0]
    assert (c.finish, c.stopped_by) == ("stop", text)
    only_token = run(
        local(folder), [Request(0, prompt(1), 1, Sampling(6, temperature=0.0, stop_token_ids=(last[-1],)))]
    )
    assert (only_token[0, 0].finish, only_token[0, 0].stopped_by) == ("stop", "")


@pytest.mark.parametrize("stop", [("",), ("a", "b\ufffd"), tuple(str(i) for i in range(33))])
def test_stop_strings_that_no_engine_honours_are_refused(folder: Path, stop: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"request 4: stop=.*at most 32 strings, none empty"):
        local(folder).generate([Request(4, prompt(0), 1, Sampling(5, stop=stop))])

"""What job=serve lets through to its server, field by field."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from offtrail.platform.launcher.api_request import Bounds, InvalidError, answers_of, read_request

BOUNDS = Bounds(positions=100, vocabulary=50, answers=4)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def refused(path: str, body: bytes | dict[str, Any]) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode(), path, BOUNDS)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "1+1"},
        {"prompt": [0, 49], "max_tokens": 100, "temperature": 0, "n": 4, "stop": "\n", "logprobs": 20, "stream": True},
        {"prompt": ["a", "b"], "n": 2, "best_of": 2, "stop": ["a"] * 16, "stop_token_ids": [3], "seed": -1},
        {"prompt": [[1], [2], [3], [4]], "logit_bias": {"49": -100}, "top_k": -1, "top_p": 1, "min_p": 0.5},
        {"prompt": "é" * 1600, "n": None, "stop": None, "user": "me", "stream_options": {"include_usage": True}},
    ],
)
def test_what_a_completion_may_ask_passes_as_it_is(body: dict[str, Any]) -> None:
    assert read_request(json.dumps(body).encode(), COMPLETIONS, BOUNDS) == body


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HELLO, "logprobs": True, "top_logprobs": 5, "max_completion_tokens": 7},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *HELLO], "n": 4},
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False, "style": "plain"}},
        {"messages": HELLO, "response_format": {"type": "text"}},
    ],
)
def test_what_a_chat_may_ask_passes_as_it_is(body: dict[str, Any]) -> None:
    assert read_request(json.dumps(body).encode(), CHAT, BOUNDS) == body


WRONG: list[tuple[str, Any, str]] = [
    ("prompt", [50], "a list whose items are each a whole number from 0 to 49"),
    ("prompt", [1_000_000_000], "a list whose items are each a whole number from 0 to 49"),
    ("prompt", [-1], "a list whose items are each a whole number from 0 to 49"),
    ("prompt", [True], "a list"),
    ("prompt", [1, "a"], "a list whose items are each a whole number"),
    ("prompt", ["a", 1], "a list whose items are each a text"),
    ("prompt", [[[1]]], "a list whose items are each a list whose items are each a whole number"),
    ("prompt", [[1], []], "a list whose items are each a list of 1 to 99 items"),
    ("prompt", [], "a text, a list of token ids, or a list of such"),
    ("prompt", "", "a text of 1 to 1,600 characters"),
    ("prompt", "a" * 1601, "a text of 1 to 1,600 characters"),
    ("prompt", "\ud800", "a text of 1 to"),
    ("prompt", [1] * 100, "a list of 1 to 99 items"),
    ("prompt", ["a"] * 5, "a list of 1 to 4 items"),
    ("prompt", {"a": 1}, "a text, a list of token ids"),
    ("n", 5, "a whole number from 1 to 4"),
    ("n", 0, "a whole number from 1 to 4"),
    ("n", 10_000, "a whole number from 1 to 4"),
    ("n", 1.5, "a whole number from 1 to 4"),
    ("n", True, "a whole number from 1 to 4"),
    ("n", 10**400, "a whole number from 1 to 4"),
    ("max_tokens", -1, "a whole number from 1 to 100"),
    ("max_tokens", 101, "a whole number from 1 to 100"),
    ("temperature", -0.1, "a number from 0 to 100"),
    ("temperature", 1e300, "a number from 0 to 100"),
    ("temperature", "hot", "a number from 0 to 100"),
    ("top_p", 0, "a number from 1e-06 to 1"),
    ("top_k", 51, "a whole number from -1 to 50"),
    ("stop", ["a"] * 17, "a list of 1 to 16 items"),
    ("stop", [""], "a list whose items are each a text of 1 to 256"),
    ("stop", "a" * 257, "a list whose items are each a text of 1 to 256"),
    ("stop", [["a"]], "a list whose items are each a text"),
    ("stop_token_ids", [50], "a list whose items are each a whole number from 0 to 49"),
    ("logprobs", 21, "a whole number from 0 to 20"),
    ("logprobs", True, "a whole number from 0 to 20"),
    ("logit_bias", {"50": 1}, "an object whose names are token ids of the model"),
    ("logit_bias", {"-1": 1}, "an object whose names are token ids"),
    ("logit_bias", {"٣": 1}, "an object whose names are token ids"),
    ("logit_bias", {"1": 101}, "an object whose values are each a number from -100 to 100"),
    ("logit_bias", {str(i): 1 for i in range(301)}, "an object of at most 300 token ids"),
    ("seed", 2**63, "a whole number from -9223372036854775808"),
    ("stream", "yes", "true or false"),
    ("stream_options", {"include_usage": 1}, "an object such as"),
    ("response_format", {"type": "json_object"}, 'no other than {"type": "text"}'),
    ("model", "", "a text of 1 to 256"),
]


@pytest.mark.parametrize(("field", "value", "why"), WRONG)
def test_a_value_out_of_bounds_is_refused_by_its_field(field: str, value: Any, why: str) -> None:
    error = refused(COMPLETIONS, {"prompt": "a", field: value})
    assert (error.field, error.status) == (field, 400)
    assert str(error).startswith(f"{field} must be {why}")


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "a list of 1 to 1,024 items"),
        ("hi", "a list of 1 to 1,024 items"),
        ([{"role": "robot", "content": "a"}], 'a list whose items are each {"role": system | developer'),
        ([{"role": "user", "content": 3}], "a list whose items are each of text content alone"),
        ([{"role": "user", "content": []}], "a list whose items are each of text content alone"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "http://a"}]}],
            "a list whose items are each of",
        ),
        ([{"role": "user", "content": "a", "tool_calls": []}], "a list whose items are each {"),
        ([{"role": "user", "content": "a" * 801}] * 2, "at most 1,600 characters in all, not 1,602"),
    ],
)
def test_messages_are_texts_that_could_fit(messages: Any, why: str) -> None:
    error = refused(CHAT, {"messages": messages})
    assert error.field == "messages"
    assert str(error).startswith(f"messages must be {why}")


@pytest.mark.parametrize(
    ("path", "body", "begins", "field"),
    [
        (COMPLETIONS, b"", "the body is not valid JSON", ""),
        (COMPLETIONS, b"[" * 100_000, "the body is not valid JSON", ""),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "the body is not valid JSON (NaN is no number", ""),
        (COMPLETIONS, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "the body is not valid JSON", ""),
        (COMPLETIONS, b"\xff", "the body is not valid JSON", ""),
        (COMPLETIONS, b"[1]", "the body must be a JSON object", ""),
        (COMPLETIONS, b"{}", "prompt is needed", "prompt"),
        (CHAT, b'{"prompt": "a"}', "unknown field: prompt; known are model, n", "prompt"),
        (CHAT, b'{"messages": null}', "messages is needed", "messages"),
        (COMPLETIONS, b'{"prompt": "a", "regex": "(a+)+$"}', "unknown field: regex; known are", "regex"),
        (COMPLETIONS, b'{"prompt": ["a", "b"], "n": 3}', "n times prompts is 6, and one request may ask for 4", "n"),
        (COMPLETIONS, b'{"prompt": ["a", "b"], "best_of": 3}', "n times prompts is 6", "n"),
    ],
)
def test_a_request_that_is_none_is_refused(path: str, body: bytes, begins: str, field: str) -> None:
    error = refused(path, body)
    assert str(error).startswith(begins)
    assert error.field == field


def test_whatever_passes_is_within_the_bounds() -> None:
    """Requests of hostile values: each is refused, or asks for what the server can give."""
    rng = random.Random(0)
    values = [value for _, value, _ in WRONG] + [None, 1, 0.5, "a", [1], [[1, 2], [3]], ["a", "b"], {}, {"3": 1}, True]
    fields = ["prompt", "n", "best_of", "max_tokens", "temperature", "stop", "logprobs", "logit_bias", "seed", "top_k"]
    passed = 0
    for _ in range(20_000):
        body = {"prompt": rng.choice(["a", [1, 2], ["a", "b"]])}
        body |= {rng.choice(fields): rng.choice(values) for _ in range(rng.randrange(4))}
        try:
            request = read_request(json.dumps(body).encode(), COMPLETIONS, BOUNDS)
        except InvalidError:
            continue
        passed += 1
        assert 1 <= answers_of(request) <= 4
        assert 1 <= (request.get("max_tokens") or 1) <= 100
        prompt = request["prompt"]
        ids = [token for part in prompt if isinstance(part, list) for token in part] if isinstance(prompt, list) else []
        assert all(0 <= token < 50 for token in [*ids, *(p for p in prompt if isinstance(p, int))])
    assert passed > 1000

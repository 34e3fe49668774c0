"""What a request to job=serve may ask for: every field of OpenAI's completions and chat that is served, with its range.

Invariant: what passes can neither end the server (a token id that its model does not have does) nor occupy it beyond
what Bounds allow; what does not is an InvalidError that names the field, in the words of OpenAI's API.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

CHARACTERS_PER_TOKEN = 16
"""A text of more characters a token than this is taken to be too long for the model; English has four or five."""
BYTES_PER_TOKEN = 8
"""Of a body: an id of six digits with its comma, or a text's five characters."""
MOST_STOPS = 16
MOST_MESSAGES = 1024
MOST_BIASES = 300
MOST_LIKELIEST = 20
LONGEST_NAME = 256
ROLES = ("system", "developer", "user", "assistant", "tool")

Check = Callable[[Any], str]
"""Why a field's value cannot be, to follow "must be"; empty where it can."""


class InvalidError(ValueError):
    """A request that is refused: ``status`` and the field, empty where it is none's."""

    def __init__(self, message: str, field: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


@dataclass(frozen=True, slots=True)
class Bounds:
    """``positions``: the most tokens of prompt + answer; ``vocabulary``: token ids are below it; ``answers``: the most
    of one request, its prompts times n.
    """

    positions: int
    vocabulary: int
    answers: int

    @property
    def characters(self) -> int:
        """Of a prompt, or of all messages."""
        return CHARACTERS_PER_TOKEN * self.positions

    @property
    def body_bytes(self) -> int:
        """Of a request."""
        return 65_536 + self.answers * self.positions * BYTES_PER_TOKEN


def read_request(body: bytes, path: str, bounds: Bounds) -> dict[str, Any]:
    """The checked fields of a request to ``path``, one of PATHS. Raises InvalidError."""
    try:
        request = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"the body is not valid JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(request, dict):
        raise InvalidError("the body must be a JSON object")
    checks = PATHS[path](bounds)
    for field, value in request.items():
        if field not in checks:
            raise InvalidError(f"unknown field: {field[:LONGEST_NAME]}; known are {', '.join(checks)}", field[:64])
        if value is not None and (wrong := checks[field](value)):
            raise InvalidError(f"{field} must be {wrong}", field)
    needed = "prompt" if "prompt" in checks else "messages"
    if request.get(needed) is None:
        raise InvalidError(f"{needed} is needed", needed)
    asked = answers_of(request)
    if asked > bounds.answers:
        raise InvalidError(f"n times prompts is {asked}, and one request may ask for {bounds.answers} answers", "n")
    return request


def answers_of(request: Mapping[str, Any]) -> int:
    """How many answers a checked request asks for: n, or what best_of chooses from, of each prompt."""
    prompt = request.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return prompts * max(request.get("n") or 1, request.get("best_of") or 1)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


# Fields


def completion_fields(bounds: Bounds) -> dict[str, Check]:
    """Of /v1/completions."""
    return common_fields(bounds) | {
        "prompt": lambda value: _prompt(value, bounds),
        "best_of": whole(1, bounds.answers),
        "echo": flag,
        "logprobs": whole(0, MOST_LIKELIEST),
    }


def chat_fields(bounds: Bounds) -> dict[str, Check]:
    """Of /v1/chat/completions."""
    return common_fields(bounds) | {
        "messages": lambda value: _messages(value, bounds),
        "max_completion_tokens": whole(1, bounds.positions),
        "logprobs": flag,
        "top_logprobs": whole(0, MOST_LIKELIEST),
        "chat_template_kwargs": _template_kwargs,
        "continue_final_message": flag,
    }


def common_fields(bounds: Bounds) -> dict[str, Check]:
    """Of both."""
    token = whole(0, bounds.vocabulary - 1)
    return {
        "model": text(LONGEST_NAME),
        "n": whole(1, bounds.answers),
        "max_tokens": whole(1, bounds.positions),
        "min_tokens": whole(0, bounds.positions),
        "temperature": number(0, 100),
        "top_p": number(1e-6, 1),
        "top_k": whole(-1, bounds.vocabulary),
        "min_p": number(0, 1),
        "frequency_penalty": number(-2, 2),
        "presence_penalty": number(-2, 2),
        "repetition_penalty": number(0.01, 10),
        "logit_bias": lambda value: _logit_bias(value, token),
        "stop": lambda value: several(text(LONGEST_NAME), MOST_STOPS)([value] if isinstance(value, str) else value),
        "stop_token_ids": several(token, MOST_STOPS),
        "seed": whole(-(2**63), 2**63 - 1),
        "stream": flag,
        "stream_options": _stream_options,
        "user": text(LONGEST_NAME),
        "ignore_eos": flag,
        "skip_special_tokens": flag,
        "no_stop_trim": flag,
        "response_format": lambda value: "" if value == {"type": "text"} else 'no other than {"type": "text"}',
    }


PATHS: dict[str, Callable[[Bounds], dict[str, Check]]] = {
    "/v1/completions": completion_fields,
    "/v1/chat/completions": chat_fields,
}


def flag(value: Any) -> str:
    """True or false."""
    return "" if isinstance(value, bool) else "true or false"


def whole(low: int, high: int) -> Check:
    """A whole number from ``low`` to ``high``; true and false are none."""
    wrong = f"a whole number from {low} to {high}"
    return lambda value: "" if type(value) is int and low <= value <= high else wrong


def number(low: float, high: float) -> Check:
    """A finite number from ``low`` to ``high``."""
    wrong = f"a number from {low:g} to {high:g}"
    return lambda value: "" if type(value) in (int, float) and low <= value <= high and math.isfinite(value) else wrong


def text(longest: int) -> Check:
    """A text of 1 to ``longest`` characters that is UTF-8."""
    wrong = f"a text of 1 to {longest:,} characters"
    return lambda value: "" if isinstance(value, str) and 0 < len(value) <= longest and _is_utf8(value) else wrong


def several(check: Check, most: int) -> Check:
    """A list of 1 to ``most`` items that each pass."""

    def checked(value: Any) -> str:
        if not isinstance(value, list) or not 0 < len(value) <= most:
            return f"a list of 1 to {most:,} items"
        wrong = next(filter(None, map(check, value)), "")
        return f"a list whose items are each {wrong}" if wrong else ""

    return checked


def _is_utf8(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _prompt(value: Any, bounds: Bounds) -> str:
    """A text, token ids, or a list of either."""
    ids = several(whole(0, bounds.vocabulary - 1), bounds.positions - 1)
    if isinstance(value, str):
        return text(bounds.characters)(value)
    if not isinstance(value, list) or not value:
        return "a text, a list of token ids, or a list of such"
    if type(value[0]) is int:
        return ids(value)
    if isinstance(value[0], str):
        return several(text(bounds.characters), bounds.answers)(value)
    return several(ids, bounds.answers)(value)


def _messages(value: Any, bounds: Bounds) -> str:
    if wrong := several(_message, MOST_MESSAGES)(value):
        return wrong
    said = sum(len(part) for message in value for part in _said(message))
    return f"at most {bounds.characters:,} characters in all, not {said:,}" if said > bounds.characters else ""


def _message(value: Any) -> str:
    if not isinstance(value, dict) or not value.keys() <= {"role", "content", "name"} or value.get("role") not in ROLES:
        return f'{{"role": {" | ".join(ROLES)}, "content": text}}'
    parts = _said(value)
    return "" if parts and all(isinstance(part, str) and _is_utf8(part) for part in parts) else "of text content alone"


def _said(message: Mapping[str, Any]) -> list[Any]:
    """The texts of a message; something else where it holds something else."""
    content = message.get("content")
    if not isinstance(content, list):
        return [content, *([message["name"]] if "name" in message else [])]
    return [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]


def _logit_bias(value: Any, token: Check) -> str:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        return f"an object of at most {MOST_BIASES} token ids"
    for name, bias in value.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10) or (wrong := token(int(name))):
            return "an object whose names are token ids of the model"
        if wrong := number(-100, 100)(bias):
            return f"an object whose values are each {wrong}"
    return ""


def _stream_options(value: Any) -> str:
    right = isinstance(value, dict) and value.keys() <= {"include_usage"} and all(map(_is_flag, value.values()))
    return "" if right else 'an object such as {"include_usage": true}'


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _template_kwargs(value: Any) -> str:
    if not isinstance(value, dict) or len(value) > MOST_STOPS:
        return f"an object of at most {MOST_STOPS} names"
    plain = all(isinstance(item, (bool, int)) or not text(LONGEST_NAME)(item) for item in value.values())
    return "" if plain and all(map(str.isidentifier, value)) else "an object of names with plain values"

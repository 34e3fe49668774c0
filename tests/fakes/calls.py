"""A /generate call as SGLang reads it: one item a prompt, its sampling parameters, and the scheduler's request."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

Json = dict[str, Any]

HEALTH_RID = "HEALTH_CHECK"
DEFAULTS: Json = {
    "max_new_tokens": 128,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "stop_token_ids": None,
    "ignore_eos": False,
    "n": 1,
    "sampling_seed": None,
    "stream_interval": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "stop": None,
}
NULLABLE = ("max_new_tokens", "stop", "stop_token_ids", "sampling_seed", "stream_interval")
UNSUPPORTED: Json = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop_regex": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "beam_width": None,
    "custom_params": None,
}


class RefusedError(Exception):
    """A call that the server refuses: 400 with ``{"error": {"message": …}}``, or that in a stream."""


class InvalidError(Exception):
    """A body that does not fit the endpoint's schema: 400 with FastAPI's words."""


@dataclass(slots=True)
class Item:
    """One request of a call, before it is checked."""

    rid: str
    ids: list[int]
    params: Json
    return_logprob: bool
    start: int
    extra_key: str
    stream: bool
    top: int = 0


@dataclass(slots=True)
class Call:
    """``single``: answered by one object, not by a list. Each item is sampled ``samples`` times."""

    items: list[Item]
    single: bool
    samples: int


@dataclass(slots=True, eq=False)
class Req:
    """One request at the scheduler. ``sent`` output tokens are known to the manager."""

    rid: str
    prompt: list[int]
    sampling: Json
    limit: int
    stops: frozenset[int]
    stream: bool
    interval: int
    return_logprob: bool
    start: int
    extra_key: str = ""
    strings: tuple[str, ...] = ()
    window: int = 0
    key: int = -1
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[list[Any]]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    inputs: list[list[Any]] | None = None
    to_finish: Json | None = None
    finish: Json | None = None
    sent: int = 0
    cached: int = 0
    retractions: int = 0


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3])


def read_call(body: Json, encode: Callable[[str], list[int]]) -> Call:
    """The items of a /generate body; RefusedError or InvalidError."""
    ids, text = body.get("input_ids"), body.get("text")
    if ids is None and text is None:
        raise RefusedError("Either text, input_ids or input_embeds should be provided.")
    if text is not None:
        single = isinstance(text, str)
        prompts = [encode(text)] if single else [encode(part) for part in text]
    else:
        prompts, single = _prompts(ids)
    params = body.get("sampling_params") or {}
    samples = int((params if isinstance(params, dict) else params[0]).get("n") or 1)
    single = single and samples == 1

    def each(value: Any, default: Any) -> list[Any]:
        return value if isinstance(value, list) else [default if value is None else value] * len(prompts)

    rows = zip(
        read_rids(body.get("rid"), len(prompts), single),
        prompts,
        each(params, {}),
        each(body.get("return_logprob"), False),
        each(body.get("logprob_start_len"), -1),
        each(body.get("extra_key"), ""),
        each(bool(body.get("stream")), False),
        each(body.get("top_logprobs_num"), 0),
        strict=True,
    )
    return Call([Item(*row) for row in rows], single, samples)


def _prompts(ids: Any) -> tuple[list[list[int]], bool]:
    """Prompts, and whether there is one that is not in a list."""
    if not isinstance(ids, list):
        raise InvalidError(f"input_ids: expected a list, got {type(ids).__name__}")
    if not ids:
        raise RefusedError("input_ids cannot be empty.")
    single = not isinstance(ids[0], list)
    prompts = [ids] if single else ids
    for token in (token for prompt in prompts for token in prompt):
        if type(token) is not int:
            raise InvalidError(f"Value error, elements must be int or list; got {type(token).__name__}")
    return prompts, single


def read_rids(given: Any, count: int, single: bool) -> list[str]:
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if single:
        return [given]
    rids = [f"{given}_{i}" for i in range(count)] if isinstance(given, str) else list(given)
    if len(rids) != count:
        raise RefusedError("The specified rids length mismatch with the batch_size for batch processing.")
    if twice := [rid for rid in dict.fromkeys(rids) if rids.count(rid) > 1]:
        raise RefusedError(f"Duplicate request IDs detected within the request: {twice}")
    return rids


def sampling_params(given: Json) -> Json:
    """SGLang's SamplingParams, checked; greedy is temperature 0 and no top-k is 0, as LocalEngine has them.

    ``sampling_seed`` has no effect, as on a real server without deterministic inference.
    """
    if unknown := sorted(given.keys() - DEFAULTS.keys() - UNSUPPORTED.keys()):
        raise TypeError(f"Unexpected keyword argument {unknown[0]!r}")  # 500 there too
    for name, default in UNSUPPORTED.items():
        if given.get(name) not in (default, None, "", []):
            raise RefusedError(f"the fake server has no {name}")
    params = DEFAULTS | {k: v for k, v in given.items() if k in DEFAULTS and (v is not None or k in NULLABLE)}
    temperature, top_p, top_k, limit = (params[k] for k in ("temperature", "top_p", "top_k", "max_new_tokens"))
    if not 0 <= temperature < float("inf"):
        raise RefusedError(f"temperature must be a non-negative finite number, got {temperature}.")
    if not 0 < top_p <= 1:
        raise RefusedError(f"top_p must be in (0, 1], got {top_p}.")
    if top_k < 1 and top_k != -1:
        raise RefusedError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    if limit is not None and limit < 0:
        raise RefusedError(f"max_new_tokens must be at least 0, got {limit}.")
    return params | {"top_k": max(0, top_k), "temperature": temperature if temperature >= 1e-6 else 0.0}


def stop_strings(params: Json, encode: Callable[[str], list[int]] | None) -> tuple[tuple[str, ...], int]:
    """The strings, and how many of the last tokens SGLang looks for them in: as many as it would cut the longest into,
    and one. Trap: of a string that the model has cut otherwise it may see a part only.
    """
    given = params["stop"] or []
    strings = (given,) if isinstance(given, str) else tuple(given)
    if strings and encode is None:
        raise RefusedError(
            f"stop={list(strings)!r} is unavailable when skip_tokenizer_init=True (requires tokenizer to decode tokens "
            f"to text for matching)."
        )
    if len(strings) > 32:
        raise RefusedError(f"at most 32 stop strings are allowed, got {len(strings)}")
    if strings and not params["no_stop_trim"]:
        raise RefusedError("the fake server does not trim stop strings off the text")
    return strings, 1 + max((len(encode(string)) for string in strings if encode), default=0)


def checked(item: Item, options: argparse.Namespace, encode: Callable[[str], list[int]] | None) -> Req:
    """The scheduler's request. RefusedError where SGLang's manager refuses it; where its scheduler does, a request
    that ends as aborted.
    """
    context, length = options.context_length, len(item.ids)
    longest = min(context, options.max_total_tokens) - 1
    _check_length(length, item.params.get("max_new_tokens"), context)
    params = sampling_params(item.params)
    limit = 1 << 30 if params["max_new_tokens"] is None else params["max_new_tokens"]
    req = Req(
        item.rid,
        item.ids,
        {name: params[name] for name in ("temperature", "top_p", "top_k")} | {"alternatives": item.top},
        # Two tokens of the context are never made; where it was made longer than the model, nor are those beyond that.
        max(0, min(limit, min(longest - 1, options.positions) - length)),
        frozenset() if params["ignore_eos"] else frozenset(params["stop_token_ids"] or ()) | options.eos,
        item.stream,
        params["stream_interval"] or options.stream_interval,
        item.return_logprob,
        length if item.start == -1 else item.start,
        item.extra_key,
        *stop_strings(params, encode),
    )
    if refused := _refused(req, longest - 5):
        req.prompt, req.return_logprob, req.start = [0], False, 1
        code = int(HTTPStatus.BAD_REQUEST)
        req.to_finish = {"type": "abort", "message": refused, "status_code": code, "err_type": "BadRequestError"}
    return req


def _check_length(length: int, asked: int | None, context: int) -> None:
    if length >= context:
        raise RefusedError(f"The input ({length} tokens) is longer than the model's context length ({context} tokens).")
    if asked is not None and asked + length > context:
        raise RefusedError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {asked + length} tokens: {length} tokens from the input messages and {asked} tokens for the "
            f"completion. Please reduce the number of tokens in the input messages or the completion to fit within "
            f"the limit."
        )


def _refused(req: Req, longest: int) -> str:
    length = len(req.prompt)
    if length >= longest:
        return (
            f"Input length ({length} tokens) exceeds the maximum allowed length ({longest} tokens). "
            f"Use a shorter input or enable --allow-auto-truncate."
        )
    if req.start > length:
        return (
            f"req.logprob_start_len={req.start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={length}. Please use a smaller logprob_start_len."
        )
    return ""

"""What a request may ask of any engine. A token id outside the vocabulary kills an SGLang server, and misleads ours."""

from __future__ import annotations

import numpy as np

from offtrail.core.protocols import Request
from offtrail.core.types import Int32

MOST_STOP_STRINGS = 32
"""What an SGLang server takes."""
MOST_LOST = 20
"""How often its holder asks anew what a server has lost."""


def check_request(request: Request, *, vocab_size: int, max_length: int) -> None:
    """Raise ValueError, one line with the request, the value and what is allowed."""
    sampling, what = request.sampling, f"request {request.id}"
    if request.samples < 1 or sampling.max_new_tokens < 1:
        raise ValueError(f"{what}: samples={request.samples}, max_new_tokens={sampling.max_new_tokens}; both are ≥ 1")
    prompt = request.prompt_tokens
    length = len(prompt) + sampling.max_new_tokens
    check_tokens(what, prompt, prompt, length, vocab_size=vocab_size, max_length=max_length)
    if not (0 <= sampling.temperature < float("inf")):
        raise ValueError(f"{what}: temperature={sampling.temperature}; it is ≥ 0 (0 = greedy)")
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise ValueError(f"{what}: top_p={sampling.top_p}, top_k={sampling.top_k}; 0 < top_p ≤ 1 and top_k ≥ 0")
    if not 0 <= sampling.alternatives <= vocab_size:
        raise ValueError(
            f"{what}: alternatives={sampling.alternatives}; 0 ≤ alternatives ≤ {vocab_size}, the vocabulary"
        )
    if len(sampling.stop) > MOST_STOP_STRINGS or any(not string or "\ufffd" in string for string in sampling.stop):
        raise ValueError(
            f"{what}: stop={sampling.stop}; at most {MOST_STOP_STRINGS} strings, none empty, none with U+FFFD, which "
            f"stands for bytes that are no text"
        )
    if any(not 0 <= token < vocab_size for token in sampling.stop_token_ids):
        raise ValueError(f"{what}: stop_token_ids={sampling.stop_token_ids}, but the vocabulary is {vocab_size}")


def check_tokens(what: str, prompt: Int32, tokens: Int32, length: int, *, vocab_size: int, max_length: int) -> None:
    """``tokens`` are looked at one by one; ``length`` is what they may grow to, the prompt among it."""
    if len(prompt) == 0:
        raise ValueError(f"{what}: the prompt is empty; give it at least one token")
    if length > max_length:
        raise ValueError(
            f"{what}: {len(prompt)} prompt tokens and {length - len(prompt)} new ones are {length}, "
            f"above model.max_length={max_length}; raise it or lower sampling.max_new_tokens"
        )
    lowest, highest = int(np.min(tokens)), int(np.max(tokens))
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"{what}: token ids {lowest}…{highest}, but the vocabulary is {vocab_size}")

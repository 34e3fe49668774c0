"""Stop strings: the token of an answer whose text completes one. The same for every engine.

An answer's text is what the tokenizer makes of the answer's tokens alone, special tokens among them, as verifiers see
it. A stop string may be several tokens, however the model cuts them, begin or end in the middle of a token, and hold
characters of several tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from offtrail.core.types import Int32


class StopStrings:
    """Looks for stop strings with the tokenizer of ``model_dir``, which is read at the first use."""

    def __init__(self, model_dir: Path) -> None:
        self._file = model_dir / "tokenizer.json"
        self._tokenizer: Any = None
        self._known = 0

    def load(self) -> None:
        """Read the tokenizer. ValueError where the folder has none."""
        if self._tokenizer is not None:
            return
        if not self._file.is_file():
            raise ValueError(f"stop strings need a tokenizer, but there is no {self._file}; use stop_token_ids")
        from tokenizers import Tokenizer  # only who stops at strings pays for it

        self._tokenizer = Tokenizer.from_file(str(self._file))
        self._known = 1 + max(self._tokenizer.get_vocab().values())

    def completed(self, tokens: Sequence[int] | Int32, stop: tuple[str, ...]) -> str:
        """The first of ``stop`` that is in the text of the answer ``tokens`` [T], whose beginnings, up to T − 1, hold
        none of them; empty where none is.

        A token that the tokenizer knows has a byte of text or more, so that the last B tokens hold a string of B bytes
        that the newest completes. One more goes before them, since tokenizers may drop a blank at the very beginning.
        A character that is cut there becomes U+FFFD, which is in no stop string.
        """
        known = (int(token) for token in reversed(tokens) if token < self._known)
        window = list(islice(known, 1 + longest(stop)))[::-1]
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        return next((string for string in stop if string in text), "")


@cache
def longest(stop: tuple[str, ...]) -> int:
    """Bytes of the longest, in UTF-8."""
    return max(len(string.encode()) for string in stop)

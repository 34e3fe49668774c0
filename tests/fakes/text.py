"""A tokenizer for models of random weights: letters alone and in pairs, and the bytes of characters outside ASCII."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>")
SINGLES = 3 + 95 + 5
"""Tokens before the pairs: specials, ASCII from blank to tilde, and the five bytes of é and €."""


def byte_name(byte: int) -> str:
    """How a byte-level tokenizer writes a byte: printable ones as themselves, a blank as Ġ."""
    shifted = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + shifted.index(byte)) if byte in shifted else chr(byte)


def build_tokenizer(size: int) -> Tokenizer:
    """``size`` tokens; `ab` is one of them, but `a`, `b` is two."""
    names = [byte_name(byte) for byte in [*range(32, 127), *"é€".encode()]]
    pairs = list(itertools.islice(itertools.product(string.ascii_lowercase, repeat=2), size - SINGLES))
    tokens = [*SPECIALS, *names, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(folder: Path, size: int) -> None:
    """Into a model's folder, as transformers does."""
    pad, bos, eos = SPECIALS
    saved = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(size), pad_token=pad, bos_token=bos, eos_token=eos)
    saved.save_pretrained(folder)


def first_with(tokenizer: Tokenizer, tokens: list[int], strings: tuple[str, ...]) -> tuple[int, str]:
    """The fewest tokens whose text holds one of the strings, and which: by decoding all of them again each time."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        for candidate in strings:
            if candidate in text:
                return count, candidate
    return len(tokens), ""


def strings_of(folder: Path, tokens: list[int]) -> list[str]:
    """Pieces of the tokens' text: of 2 to 6 characters, so that they begin and end anywhere in tokens."""
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=False)
    pieces = [text[i : i + length] for i, length in zip(range(0, len(text), 7), itertools.cycle(range(2, 7)))]
    return [piece for piece in pieces if piece and "\ufffd" not in piece]

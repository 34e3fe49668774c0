"""Between text and tokens, at the edge of an engine: inside the platform only tokens travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offtrail.core.types import Int32, Problem
from offtrail.tasks.text import encode_prompt


class Text:
    """The tokenizer of a Hugging Face directory and the token ids that end an answer.

    The stop ids are generation_config.json's eos_token_id (one or several), else the tokenizer's own.
    """

    def __init__(self, model_dir: Path, *, chat: bool = False) -> None:
        from transformers import AutoTokenizer  # slow to import: only roles that hold text pay for it

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.chat = chat
        self.stop_token_ids = self._stop_ids(model_dir)

    def _stop_ids(self, model_dir: Path) -> tuple[int, ...]:
        file = model_dir / "generation_config.json"
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise ValueError(
                f"model.path={model_dir}: neither generation_config.json nor the tokenizer names an eos token"
            )
        return tuple(eos) if isinstance(eos, list) else (int(eos),)

    def encode(self, problem: Problem) -> Int32:
        """Prompt tokens [P]."""
        return encode_prompt(self.tokenizer, problem, chat=self.chat)

    def decode(self, tokens: Int32) -> str:
        """An answer's text without its stop token. Trap: tags such as <think> may be special tokens and must stay."""
        ids = tokens.tolist()
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

"""Small random models that score, on the tokenizer of the model that offtrail makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification, Qwen3ForTokenClassification

from offtrail.platform.model.tiny import build_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


def made(folder: Path, kind: str, *, seed: int = 5, labels: int = 1) -> Path:
    """``kind``: outcome or steps. Its scores differ from text to text."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    classes: dict[str, Any] = {"outcome": Qwen3ForSequenceClassification, "steps": Qwen3ForTokenClassification}
    model = classes[kind](Qwen3Config(vocab_size=len(tokenizer), num_labels=labels, **SIZES))
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""A model from nothing: a character-level tokenizer and a small Qwen3-architecture model, in Hugging Face format.

Nothing downstream knows that they are home-made: the directory that ``save_start`` writes opens with AutoTokenizer and
AutoModelForCausalLM, like any other ``model.path``. Its cold start is a
run of job=sft on worked answers, and the launcher keeps the result (start.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from offtrail.platform.config.schema import ModelConfig
from offtrail.platform.model.characters import ALPHABET, SPECIALS, TAGS


def build_tokenizer(max_length: int = 256, more: str = "") -> PreTrainedTokenizerFast:
    """One token a character, and one for each of SPECIALS and TAGS: 61 in all, and ``more`` (model.characters).

    decode(encode(x)) == x for every x over ALPHABET and ``more``, tags included: nothing is added, joined or cleaned
    up. Any other character becomes <unk>. Tags are ordinary tokens (skip_special_tokens keeps them): the verifiers
    read them.
    """
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*SPECIALS, *TAGS, *ALPHABET, *more)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(config: ModelConfig, vocab: int, seed: int) -> Qwen3ForCausalLM:
    """Random weights, a function of ``seed`` alone; torch's own random state is left as it was. float32, tied head.

    Raises:
        ValueError: sizes that do not divide.
    """
    if config.hidden_size % config.heads or config.heads % config.kv_heads:
        raise ValueError(
            f"model.heads={config.heads}: must divide model.hidden_size={config.hidden_size} "
            f"and be a multiple of model.kv_heads={config.kv_heads}"
        )
    shape = Qwen3Config(
        vocab_size=vocab,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden_size // config.heads,
        intermediate_size=config.mlp_size,
        initializer_range=config.init_std,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=True,
        pad_token_id=SPECIALS.index("<pad>"),
        eos_token_id=SPECIALS.index("<eos>"),
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(shape)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, pad_token_id=shape.pad_token_id, eos_token_id=shape.eos_token_id
    )
    return model


def save_start(folder: Path, config: ModelConfig, seed: int) -> None:
    """Write model and tokenizer to ``folder`` in Hugging Face format, whole or not at all.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    tokenizer = build_tokenizer(config.max_length, config.characters)
    save_pretrained(folder, build_model(config, len(tokenizer), seed), tokenizer)


def save_pretrained(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write both under another name and rename it to ``folder``. FileExistsError if that exists and is not empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and is not empty")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

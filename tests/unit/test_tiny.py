"""The model from nothing opens like any Hugging Face checkpoint, and its tokenizer loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from offtrail.platform.config.schema import ModelConfig
from offtrail.platform.model.characters import ALPHABET, SPECIALS, TAGS
from offtrail.platform.model.tiny import build_model, build_tokenizer, save_start

TOKENIZER = build_tokenizer()
TEXTS = st.lists(st.sampled_from([*ALPHABET, *TAGS, *SPECIALS])).map("".join)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "below" / "model"
    save_start(folder, ModelConfig(), seed=3)
    return folder


def test_vocabulary():
    assert len(TOKENIZER) == 3 + 4 + 10 + 26 + 2 + 16 == 61
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (0, 1, 2)
    text = "<think>1+2 = 3\n</think><answer>3</answer><eos>"
    assert len(TOKENIZER(text).input_ids) == 1 + 7 + 1 + 1 + 1 + 1 + 1 + 1
    assert TOKENIZER.tokenize("a <") == ["a", " ", "<"]
    assert TOKENIZER("A").input_ids == [TOKENIZER.unk_token_id]


@given(TEXTS)
def test_decoding_gives_back_every_character(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.lists(st.integers(0, 60)))
def test_every_token_decodes_to_its_own_text(ids):
    assert TOKENIZER.decode(ids) == "".join(TOKENIZER.convert_ids_to_tokens(ids))


def test_skipping_specials_keeps_the_tags():
    ids = TOKENIZER("<think>1</think><answer>2</answer><eos><pad>").input_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>1</think><answer>2</answer>"


def test_tokenizer_comes_back_from_its_directory(start):
    loaded = AutoTokenizer.from_pretrained(start)
    text = " ".join([*ALPHABET, *TAGS, *SPECIALS, "  \n\n a , . ? n : ;s"])
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded.model_max_length == 256


def test_further_characters_are_tokens_of_their_own_behind_the_others(tmp_path):
    more = build_tokenizer(more="故a")  # a is known already
    assert len(more) == 62
    assert more("7故5").input_ids == [*TOKENIZER("7").input_ids, 61, *TOKENIZER("5").input_ids]
    save_start(tmp_path / "more", ModelConfig(characters="故"), 0)
    assert AutoTokenizer.from_pretrained(tmp_path / "more").decode([61]) == "故"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "more").config.vocab_size == 62


def test_model_comes_back_from_its_directory(start):
    loaded = AutoModelForCausalLM.from_pretrained(start)
    built = build_model(ModelConfig(), len(TOKENIZER), seed=3)
    assert type(loaded) is Qwen3ForCausalLM
    assert loaded.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), built.parameters(), strict=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.float32
    assert GenerationConfig.from_pretrained(start).eos_token_id == 1
    ids = torch.tensor([TOKENIZER("1+2=").input_ids])
    assert torch.equal(loaded(ids).logits, built(ids).logits)


def test_shape_and_scale():
    model = build_model(ModelConfig(), 61, seed=0)
    # embedding 61·64; a layer: q 64·64, k and v 64·32 each, o 64·64, mlp 3·64·192, norms 2·64 + 2·16; last norm 64
    assert sum(p.numel() for p in model.parameters()) == 61 * 64 + 3 * (4096 * 2 + 2048 * 2 + 36864 + 160) + 64
    assert model.config.head_dim == 16
    assert model.config.max_position_embeddings == 256
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(1).item()
    torch.manual_seed(1)
    one = build_model(ModelConfig(), 61, seed=0)
    assert torch.rand(1).item() == expected
    same, other = (build_model(ModelConfig(), 61, seed=s).model.embed_tokens.weight for s in (0, 1))
    assert torch.equal(one.model.embed_tokens.weight, same)
    assert not torch.equal(same, other)


def test_an_existing_directory_is_not_overwritten(start):
    before = sorted(p.name for p in start.iterdir())
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_start(start, ModelConfig(), seed=4)
    assert sorted(p.name for p in start.iterdir()) == before
    assert [p.name for p in start.parent.iterdir()] == ["model"]


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"model\.heads=5"):
        build_model(ModelConfig(heads=5), 61, seed=0)
    with pytest.raises(ValueError, match=r"model\.kv_heads=3"):
        build_model(ModelConfig(kv_heads=3), 61, seed=0)

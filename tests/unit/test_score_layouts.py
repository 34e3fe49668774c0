"""Score models in the layouts that they are published in, as small random copies: what is read of them is what their
own plain forward says; and which heads are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
)

from fakes.text import build_tokenizer
from offtrail.core.types import Int32
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.model import scores
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.scalar import load_scalar, only_asked
from offtrail.platform.model.scores import ScoreSpec, spec_of

H, V = 32, 220
SIZES = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
CHAT = "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}<eos>!{% endfor %}"
"""Something stands behind the token that ends a turn, as in Qwen's template a newline does."""


def tokenizer(folder: Path, template: str = "") -> PreTrainedTokenizerFast:
    saved = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(V - 1), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    saved.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    saved.chat_template = template or None
    saved.save_pretrained(folder)
    return saved


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


def published(folder: Path, architecture: str, head: dict[str, Tensor], **more: Any) -> None:
    """A Qwen2 language model with further tensors in its file, and a config.json that names code of its own."""
    torch.manual_seed(7)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": f"modeling_own.{architecture}"}
    config |= {"architectures": [architecture], "auto_map": code} | more
    (folder / "config.json").write_text(json.dumps(config))


def states(folder: Path, ids: Any) -> Tensor:
    """The decoder's own hidden states of one text."""
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden: Tensor = decoder(input_ids=torch.tensor([list(map(int, ids))])).last_hidden_state[0]
    return hidden


def questions() -> list[Question]:
    """Two prompts with ragged outputs, cut into steps."""
    rng = np.random.default_rng(3)
    draw = lambda n: rng.integers(3, 200, n).astype(np.int32)  # noqa: E731
    return [
        Question(draw(5), [draw(9), draw(4)], [np.array([2, 6, 9]), np.array([4])]),
        Question(draw(3), [draw(7)], [np.array([1, 5])]),
    ]


def whole(question: Question, place: int) -> Int32:
    return np.concatenate([question.prompt, question.outputs[place]])


def squashed(numbers: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-numbers))


def test_qwens_process_reward_model_is_read_at_the_token_that_it_has_for_that(tmp_path: Path) -> None:
    head = {
        "score.0.weight": drawn(1, H, H), "score.0.bias": drawn(2, H),
        "score.2.weight": drawn(3, 2, H), "score.2.bias": drawn(4, 2),
    }  # fmt: skip
    published(tmp_path, "Qwen2ForProcessRewardModel", head)
    extra = tokenizer(tmp_path).convert_tokens_to_ids("<extra_0>")
    spec = spec_of(tmp_path, "scorer.models.prm.path", "prm")
    assert (spec.reads, spec.of, spec.squash, spec.insert) == ("steps", "response", "sigmoid", "<extra_0>")
    reader, asked = Reader.open(tmp_path, longest=64), questions()
    found = reader.ask(asked, 1000)
    two = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 2))
    two.load_state_dict({name.removeprefix("score."): value for name, value in head.items()})
    for question, numbers in zip(asked, found, strict=True):
        for place, output in enumerate(question.outputs):
            parts = np.split(output, question.ends[place])
            ids = [*question.prompt]
            for part in parts[:-1]:
                ids += [*part, extra]
            ids += [*parts[-1]]
            with torch.no_grad():
                probabilities = torch.softmax(two(states(tmp_path, ids)), -1)
            expected = probabilities[torch.tensor(ids) == extra, 1].numpy()
            assert np.abs(squashed(numbers[place]) - expected).max() < 1e-5
            assert len(expected) == len(question.ends[place])


def test_qwens_outcome_reward_model_has_one_class_and_a_template_behind_the_answer(tmp_path: Path) -> None:
    head = {
        "score.0.weight": drawn(1, H, H), "score.0.bias": drawn(2, H),
        "score.2.weight": drawn(3, 1, H), "score.2.bias": drawn(4, 1),
    }  # fmt: skip
    published(tmp_path, "Qwen2ForRewardModel", head)
    known = tokenizer(tmp_path, CHAT)
    behind = known.encode("!", add_special_tokens=False)[0]
    [first, _], reader = questions(), Reader.open(tmp_path, longest=64)
    assert (reader.spec.reads, reader.spec.insert, reader.spec.squash) == ("outcome", "", "none")
    ended = Question(first.prompt, [first.outputs[0], np.append(first.outputs[0], 2).astype(np.int32)])
    cut, closed = reader.ask([ended], 1000)[0]
    one = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 1))
    one.load_state_dict({name.removeprefix("score."): value for name, value in head.items()})
    with torch.no_grad():
        expected = one(states(tmp_path, [*whole(ended, 1), behind]))[-1].item()
    assert abs(closed.item() - expected) < 1e-5
    assert abs(cut.item() - expected) < 1e-5  # an answer that was cut off is closed as the template would


def test_skyworks_process_reward_model_has_a_value_head(tmp_path: Path) -> None:
    head = {"v_head.summary.weight": drawn(1, 1, H), "v_head.summary.bias": drawn(2, 1)}
    published(tmp_path, "Qwen2ForPrmModel", head)
    spec = spec_of(tmp_path, "path", "prm")
    assert (spec.reads, spec.steps, spec.squash, spec.insert) == ("steps", {"by": "newline"}, "sigmoid", "")
    reader, asked = Reader.open(tmp_path, longest=64), questions()
    for question, numbers in zip(asked, reader.ask(asked, 1000), strict=True):
        for place, ends in enumerate(question.ends):
            hidden = states(tmp_path, whole(question, place))[len(question.prompt) - 1 + torch.from_numpy(ends)]
            expected = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
            assert np.abs(numbers[place] - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_skyworks_reward_models_are_transformers_own_classifiers(tmp_path: Path, family: str) -> None:
    kind: Any = {"Llama": LlamaForSequenceClassification, "Qwen3": Qwen3ForSequenceClassification}[family]
    config: Any = {"Llama": LlamaConfig, "Qwen3": Qwen3Config}[family]
    torch.manual_seed(1)
    model = kind(config(**SIZES, num_labels=1, **({"head_dim": 8} if family == "Qwen3" else {})))
    nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    known = tokenizer(tmp_path, CHAT)
    reader, conversation = Reader.open(tmp_path, longest=64), [{"role": "user", "content": "a+b"}]
    prompt = known.apply_chat_template(conversation, tokenize=True, return_dict=False)
    told = known.apply_chat_template([*conversation, {"role": "assistant", "content": "xyz"}], tokenize=False)
    ids = known(told, add_special_tokens=False)["input_ids"]
    output = np.array(ids[len(prompt) : -1], np.int32)  # up to the stop token; the template's ! comes behind it
    assert output[-1] == 2
    [[said]] = reader.ask([Question(np.array(prompt, np.int32), [output])], 1000)
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert abs(said.item() - expected) < 1e-5
    assert not only_asked(reader.module.model, "end")


def test_two_classes_are_one_number_and_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Qwen3ForTokenClassification(Qwen3Config(**SIZES, head_dim=8, num_labels=2))
    nn.init.normal_(model.score.weight)
    nn.init.normal_(model.score.bias)
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    reader, asked = Reader.open(tmp_path, longest=64), questions()
    assert (reader.spec.reads, reader.spec.squash) == ("steps", "sigmoid")
    ids = torch.from_numpy(whole(asked[0], 0).astype(np.int64))[None]
    with torch.no_grad():
        expected = torch.softmax(model.eval()(input_ids=ids).logits[0], -1)[4 + torch.from_numpy(asked[0].ends[0]), 1]
    assert np.abs(squashed(reader.ask(asked, 1000)[0][0]) - expected.numpy()).max() < 1e-5
    assert not only_asked(load_scalar(tmp_path, "after"), "after")
    assert load_scalar(tmp_path, "after").config.num_labels == 1


def test_an_implicit_process_reward_is_the_log_ratio_of_two_language_models(tmp_path: Path) -> None:
    folders = []
    for name, seed in (("one", 1), ("other", 2)):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name)
        folders.append(tmp_path / name)
    given = ScoreSpec("steps", steps={"by": "newline"}, beta=0.05, reference=str(folders[1]))
    scores.write(folders[0], given)
    assert spec_of(folders[0], "path", "x") == given
    asked, spec = questions(), given
    logprobs = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.from_numpy(whole(asked[0], 0).astype(np.int64))
        with torch.no_grad():
            log = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        logprobs.append(log[4:-1].gather(1, ids[5:, None])[:, 0])
    ratio = (0.05 * (logprobs[0] - logprobs[1])).numpy()
    expected = np.array([ratio[:2].sum(), ratio[2:6].sum(), ratio[6:].sum()])
    steps = Reader.open(folders[0], longest=64).ask(asked, 1000)[0][0]
    tokens = Reader.open(folders[0], ScoreSpec("tokens", beta=0.05, reference=spec.reference), longest=64)
    outcome = Reader.open(folders[0], ScoreSpec("outcome", beta=0.05, reference=spec.reference), longest=64)
    assert np.abs(steps - expected).max() < 1e-6
    assert np.abs(tokens.ask(asked, 1000)[0][0] - ratio).max() < 1e-6
    assert abs(outcome.ask(asked, 1000)[0][0].item() - ratio.sum()) < 1e-6


def test_who_is_asked_together_does_not_matter(tmp_path: Path) -> None:
    published(tmp_path, "X", {"v_head.summary.weight": drawn(1, 1, H), "v_head.summary.bias": drawn(2, 1)})
    reader, asked = Reader.open(tmp_path, longest=64), questions()
    together = [n for group in reader.ask(asked, 1000) for n in group]
    apart = [n for group in reader.ask(asked, 1) for n in group]
    assert all(np.abs(a - b).max() < 1e-6 for a, b in zip(together, apart, strict=True))
    empty = Question(asked[0].prompt, [np.zeros(0, np.int32), asked[0].outputs[0]], [np.zeros(0, int), np.array([9])])
    nothing, something = reader.ask([empty], 1000)[0]
    assert (len(nothing), len(something)) == (0, 1)


# --- what is refused, or read of a file


def test_scores_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = ScoreSpec("steps", "response", {"by": "separator", "separator": ";"}, "sigmoid")
    scores.write(tmp_path, spec)
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told == {
        "reads": "steps", "of": "response", "steps": {"by": "separator", "separator": ";"}, "squash": "sigmoid"
    }  # fmt: skip
    assert spec_of(tmp_path, "path", "x") == spec


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("{", "its scores.json cannot be read"),
        ("[]", "its scores.json holds no JSON object"),
        ('{"read": "steps"}', "has 'read', which nothing reads; there are reads, of, steps"),
        ('{"reads": "step"}', "has reads='step': must be one of outcome, steps, tokens"),
        ('{"steps": "newline"}', "has steps='newline': must be of type dict"),
    ],
)
def test_a_damaged_scores_json_is_named(tmp_path: Path, told: str, complaint: str) -> None:
    (tmp_path / "scores.json").write_text(told)
    with pytest.raises(ConfigError, match=r"^scorer\.path=x: ") as caught:
        spec_of(tmp_path, "scorer.path", "x")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_of_the_wrong_shape_and_a_model_without_one_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(2)
    three = tmp_path / "three"
    Qwen3ForTokenClassification(Qwen3Config(**SIZES, head_dim=8, num_labels=3)).save_pretrained(three)
    wrong = (
        r"^path=x: its score head is of the wrong shape: score\.weight is \[3, 32\], must be \[1, 32\] .* or \[2, 32\]"
    )
    with pytest.raises(ConfigError, match=wrong):
        spec_of(three, "path", "x")
    with pytest.raises(ConfigError, match=r"score\.weight is \[3, 32\]"):
        load_scalar(three, "after")
    published(tmp_path / "wide", "X", {"v_head.summary.weight": drawn(1, 1, H + 1)})
    with pytest.raises(ConfigError, match=r"v_head\.summary\.weight is \[1, 33\], must be \[1, 32\]"):
        spec_of(tmp_path / "wide", "path", "x")
    published(tmp_path / "none", "Qwen2ForCausalLM", {})
    with pytest.raises(ConfigError, match=r"^path=x: Qwen2ForCausalLM has no score head .*job=reward_model or job=prm"):
        spec_of(tmp_path / "none", "path", "x")
    published(tmp_path / "half", "X", {"score.2.weight": drawn(1, 2, H)})
    with pytest.raises(ValueError, match=r"its score head \(score\.…\) is not whole"):
        load_scalar(tmp_path / "half", "after")


def test_a_tokenizer_without_the_token_behind_steps_is_refused(tmp_path: Path, start_dir: Path) -> None:
    head = {
        "score.0.weight": drawn(1, H, H), "score.0.bias": drawn(2, H),
        "score.2.weight": drawn(3, 2, H), "score.2.bias": drawn(4, 2),
    }  # fmt: skip
    published(tmp_path, "Qwen2ForProcessRewardModel", head)
    AutoTokenizer.from_pretrained(start_dir).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its tokenizer lacks '<extra_0>', which stands behind each step"):
        Reader.open(tmp_path, longest=64)


def test_heads_of_their_own_are_only_asked(tmp_path: Path) -> None:
    published(tmp_path / "a", "X", {"v_head.summary.weight": drawn(1, 1, H), "v_head.summary.bias": drawn(2, 1)})
    assert only_asked(load_scalar(tmp_path / "a", "end"), "end")
    assert not only_asked(load_scalar(tmp_path / "a", "after"), "after")
    assert isinstance(load_scalar(tmp_path / "a", "after").config, PreTrainedConfig)

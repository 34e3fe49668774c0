"""A model that no role could read or train is refused before anything starts, with the path that the user gave."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.launcher.command import main, require_inputs, require_models
from offtrail.platform.model.policy import load_model
from offtrail.platform.model.scalar import load_scalar
from offtrail.platform.model.text import Text

Change = Callable[[Path], Any]


@pytest.fixture
def model(start_dir: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(start_dir, tmp_path / "model"))


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sets(name: str, **settings: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | settings))

    return change


def half_of_the_shards(folder: Path) -> None:
    sets("model.safetensors.index.json", weight_map={"a": "model-1.safetensors", "b": "model-2.safetensors"})(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


UP = "model.layers.1.mlp.up_proj.weight"


def other_weights(*, drops: str = "", **changed: torch.Tensor) -> Change:
    def change(folder: Path) -> None:
        weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != drops}
        save_file(weights | changed, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def with_tokens(number: int, *, special: bool = False, added: bool = True) -> Change:
    """More tokens than the model's 61."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        for i in range(61, 61 + number):
            if added:
                likeness = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
                tokenizer["added_tokens"].append({"id": i, "content": f"<{i}>", "special": special, **likeness})
            else:
                tokenizer["model"]["vocab"][f"<{i}>"] = i
        file.write_text(json.dumps(tokenizer))

    return change


TOO_MANY = "model.path={}: its tokenizer has 64 tokens, the model 61 (vocab_size in config.json); give it the"
REFUSED: dict[str, tuple[Change, list[str], str]] = {
    "pytorch_model.bin only": (to_bin, [], "model.path={}: has its weights in pytorch_model.bin, but every role reads"),
    "no weights": (without("model.safetensors"), [], "model.path={}: holds no weights, but every role reads model.s"),
    "a shard is missing": (
        half_of_the_shards, [], "model.path={}: model.safetensors.index.json names model-2.safetensors, not there"
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"), [], "model.path={}: holds no tokenizer (tokenizer.json)"
    ),
    "a cut config": (
        lambda folder: (folder / "config.json").write_text("{"), [], "model.path={}: its config.json cannot be read"
    ),
    "no kind": (sets("config.json", model_type=None), [], "model.path={}: its config.json names no model_type"),
    "quantized": (
        sets("config.json", quantization_config={"quant_method": "fp8"}), [],
        "model.path={}: its weights are quantized (quantization_config in config.json), which cannot be trained",
    ),
    "a tensor is missing": (
        other_weights(drops=UP), [],
        f"model.path={{}}: its weights do not fit this qwen3 model: missing ['{UP}']; download or save it again",
    ),
    "a tensor is missing in sft": (
        other_weights(drops=UP), ["job=sft"],
        f"model.path={{}}: its weights do not fit this qwen3 model: missing ['{UP}']; download or save it again",
    ),
    "a head is missing": (
        sets("config.json", tie_word_embeddings=False), [],
        "model.path={}: its weights do not fit this qwen3 model: missing ['lm_head.weight']; download or save",
    ),
    "a tensor too many": (
        other_weights(drops="", more=torch.ones(1)), [],
        "model.path={}: its weights do not fit this qwen3 model: unknown ['more']; download or save",
    ),
    "a tensor of another shape": (
        sets("config.json", intermediate_size=40), [],
        "model.path={}: its weights do not fit this qwen3 model: model.layers.0.mlp.gate_proj.weight is (48, 32), not",
    ),
    "cut weights": (cut, [], "model.path={}: its model.safetensors cannot be read ("),
    "a larger vocabulary": (with_tokens(3, added=False), [], TOO_MANY),
    "a larger vocabulary in sft": (with_tokens(3, added=False), ["job=sft"], TOO_MANY),
    "a larger vocabulary of Unigram": (
        sets("tokenizer.json", model={"type": "Unigram", "vocab": [[str(i), 0.0] for i in range(64)]}), [], TOO_MANY
    ),
    "added tokens of text": (with_tokens(3), ["job=sft"], TOO_MANY),
    "no tokenizer.json's form": (
        sets("tokenizer.json", model=[1]), [], "model.path={}: its tokenizer.json holds no tokenizer; mend it"
    ),
    "another architecture": (
        sets("config.json", model_type="granite"), [],
        "model.path={}: model_type=granite is not supported by the local engine; supported: llama, qwen2, qwen3; or ta",
    ),
    "too few positions": (
        sets("config.json", max_position_embeddings=128), [],
        "model.max_length=256 is above the model's 128 positions; lower it",
    ),
    "a template that is not there": (
        lambda _: None, ["prompt.chat=always"], "prompt.chat=always: the tokenizer of {} has no chat template; take"
    ),
    "a system prompt": (lambda _: None, ["prompt.system=be good"], "prompt.system=be good: the tokenizer of {} has no"),
    "keywords": (
        lambda _: None, ["prompt.template_kwargs={a: 1}"], "prompt.template_kwargs={{'a': 1}}: the tokenizer of {} has"
    ),
    "a BOS": (lambda _: None, ["prompt.bos=always"], "prompt.bos=always: the tokenizer of {} has no BOS token; take"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_start_with_the_users_path(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, settings, words = REFUSED[name]
    change(model)
    assert main([f"model.path={model}", f"run.dir={tmp_path / 'runs'}", *settings]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"offtrail: error: {words.format(model)}")
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_critic_and_what_is_served_are_looked_at_too(model: Path) -> None:
    require_models(compose(["algo=ppo", f"algo.critic.path={model}"]))
    to_bin(model)
    with pytest.raises(ConfigError, match=rf"^algo\.critic\.path={model}: has its weights in pytorch_model\.bin"):
        require_models(compose(["algo=ppo", f"algo.critic.path={model}"]))
    with pytest.raises(ConfigError, match=rf"^checkpoint={model}: has its weights in pytorch_model\.bin"):
        require_models(compose(["job=chat", f"checkpoint={model}"]))


@pytest.mark.parametrize(
    ("head", "shape", "words"),
    [
        ("score.weight", (1, 32), ""),
        ("score.weight", (2, 32), ""),
        ("score.weight", (3, 32), "its score head is of the wrong shape: score.weight is [3, 32], must be [1, 32]"),
        ("score.weight", (1, 64), "its score head is of the wrong shape: score.weight is [1, 64]"),
        ("score.2.weight", (1, 32), "its score head (two layers) can be asked, but not trained"),
        ("v_head.summary.weight", (1, 32), "its score head (value) can be asked, but not trained"),
    ],
)
def test_a_score_head_is_trained_on_where_it_is_linear(
    head: str, shape: tuple[int, ...], words: str, model: Path, tmp_path: Path
) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | {head: torch.ones(shape)}, file, metadata={"format": "pt"})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b", "labels": [1]}')
    config = compose(["job=prm", f"prm.path={tmp_path / 'rows.jsonl'}", f"model.path={model}"])
    if not words:
        require_models(config)
        return
    with pytest.raises(ConfigError) as refused:
        require_models(config)
    assert str(refused.value).startswith(f"model.path={model}: {words}")


def test_other_engines_compute_other_architectures(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets("config.json", model_type="granite")(model)
    require_models(compose(["job=sft", f"model.path={model}"]))
    monkeypatch.setattr("offtrail.platform.engines.sglang.flags.find_spec", lambda name: object())
    monkeypatch.setattr("offtrail.platform.engines.sglang.versions.installed", lambda: "0.5.21")
    require_models(compose(["engine=sglang", f"model.path={model}"]))
    with pytest.raises(ConfigError, match="model_type=granite is not supported by the local engine"):
        require_models(compose(["engine=sglang", "eval.engine=local", f"model.path={model}"]))


def test_a_name_in_the_cache_is_the_users_word(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "models--org--small"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("b" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = compose(["model.path=org/small"])
    require_models(config)
    to_bin(home / "snapshots" / ("a" * 40))  # not the one that is used
    require_models(config)
    sets("config.json", model_type="granite")(home / "snapshots" / ("b" * 40))
    with pytest.raises(ConfigError, match=r"^model\.path=org/small: model_type=granite"):
        require_models(config)


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        (
            sets("tokenizer_config.json", chat_template="{{ messages }}"),
            ["prompt.chat=always", "prompt.system=be good"],
        ),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), ["prompt.chat=always"]),
        (sets("tokenizer_config.json", bos_token="<eos>"), ["prompt.bos=always"]),
    ],
)
def test_what_the_files_allow_the_loaded_tokenizer_can_do(change: Change, prompt: list[str], model: Path) -> None:
    change(model)
    config = compose([f"model.path={model}", *prompt])
    require_models(config)
    Text(model, config.prompt)


LACKS = [
    (other_weights(drops=UP), rf"its weights lack {UP}, which would be random numbers; download or save it again"),
    (
        sets("config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"its weights lack model\.layers\.2\.input_layernorm\.weight and 10 more, which would be random",
    ),
    (
        sets("config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        r"its weights hold model\.layers\.1\.input_layernorm\.weight and 10 more, which its config\.json has no place",
    ),
    (
        other_weights(**{UP: torch.ones(47, 32)}),
        rf"{UP} is \[47, 32\] in its weights, but \[48, 32\] by its config\.json; give the",
    ),
]


@pytest.mark.parametrize(("change", "words"), LACKS)
def test_weights_that_would_be_random_are_not_trained(change: Change, words: str, model: Path) -> None:
    change(model)
    with pytest.raises(ValueError, match=rf"^model\.path={model}: {words}"):
        load_model(model)
    with pytest.raises(ValueError, match=rf"^model\.path=org/small: {words}"):
        load_model(model, given="org/small")
    with pytest.raises(ValueError, match=rf"^algo\.critic\.path={model}: {words}"):
        load_scalar(model, "before")


def test_a_head_that_is_its_own_is_not_drawn_at_random(model: Path) -> None:
    sets("config.json", tie_word_embeddings=False)(model)
    with pytest.raises(ValueError, match=rf"^model\.path={model}: its weights lack lm_head\.weight, which"):
        load_model(model)
    assert not load_scalar(model, "before").score.weight.any()  # which needs none
    other_weights(**{"lm_head.weight": torch.ones(61, 32)})(model)
    assert bool((load_model(model).lm_head.weight == 1).all())
    require_models(compose([f"model.path={model}"]))


def test_tensors_that_no_model_holds_any_more_are_no_others(model: Path) -> None:
    other_weights(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(model)
    require_models(compose([f"model.path={model}"]))
    load_model(model)


def test_what_the_model_needs_not_have(model: Path) -> None:
    """Special tokens without a row are left out, and rows without a token stand for nothing."""
    with_tokens(3, special=True)(model)
    config = compose([f"model.path={model}"])
    require_models(config)
    Text(model, config.prompt)
    other_weights(**{"model.embed_tokens.weight": torch.ones(80, 32)})(model)
    sets("config.json", vocab_size=80)(model)
    with_tokens(3)(model)
    require_models(config)


def test_a_loaded_tokenizer_is_looked_at_too(model: Path) -> None:
    with_tokens(3, added=False)(model)
    with pytest.raises(ValueError, match=f"^{re.escape(TOO_MANY.format(model))}"):
        Text(model)


def test_the_models_of_every_stage_are_looked_at_but_for_those_that_are_handed_on(model: Path, tmp_path: Path) -> None:
    """Before the first stage has run for hours."""
    other_weights(drops=UP)(model)
    own = f"recipe.stages={{a: {{job: sft}}, b: {{job: rl, model: {{path: {model}}}}}}}"
    words = rf"^recipe\.stages\.b: model\.path={model}: its weights do not fit this qwen3 model: missing \['{UP}'\]"
    with pytest.raises(ConfigError, match=words):
        require_inputs(compose([own]))
    require_inputs(compose([own.replace("job: rl", "job: rl, start_from: a")]))


def test_the_data_of_every_stage_is_looked_at_but_for_what_is_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "\\ud83d"}\n')
    own = f"recipe.stages={{a: {{job: rl}}, b: {{job: sft, sft: {{path: {path}}}}}}}"
    words = rf"^recipe\.stages\.b: sft\.path={path}, line 2: field 'answer' holds half a surrogate pair"
    with pytest.raises(ConfigError, match=words):
        require_inputs(compose([own]))
    require_inputs(compose([own.replace("job: sft", "job: sft, data_from: a")]))

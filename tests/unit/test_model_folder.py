"""A model that no role could read or train is refused before anything starts, with the path that the user gave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.launcher.command import main, require_models
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

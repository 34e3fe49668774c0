"""Whether a Hugging Face folder holds what the roles read of it: looked at before any role starts. No torch.

The launcher calls ``check_model`` for each key that names a model, with what the user typed; text.py says the same of a
tokenizer that it has loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import PromptConfig
from offtrail.platform.config.validate import hub_cache

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""One of them is there where there is a tokenizer."""
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that have no special tokens but those that the files name."""


def folder_of(given: str) -> Path | None:
    """The folder that a path or a name in the Hugging Face cache means; None where there is none."""
    if Path(given).is_dir():
        return Path(given)
    home = hub_cache() / f"models--{given.replace('/', '--')}"
    main = home / "refs" / "main"
    named = [home / "snapshots" / main.read_text().strip()] if main.is_file() else []
    return next((folder for folder in [*named, *home.glob("snapshots/*")] if folder.is_dir()), None)


def check_model(key: str, given: str, folder: Path, *, trained: bool = True) -> None:
    """Raise ConfigError, naming ``key`` and what the user gave, where no role could read the model in ``folder``, or
    train it.
    """
    config = _read(key, given, folder, "config.json")
    if not config.get("model_type"):
        raise refuse(key, given, "its config.json names no model_type; give the folder of a language model")
    if trained and config.get("quantization_config"):
        raise refuse(
            key, given, "its weights are quantized (quantization_config in config.json), which cannot be trained; take "
            "the model that they were made from"
        )  # fmt: skip
    if "vocab_size" not in config and "text_config" in config:
        raise refuse(
            key, given, f"model_type={config['model_type']} is more than a language model (text_config in config.json);"
            " save its text model alone, or take another"
        )  # fmt: skip
    if (folder / INDEX).is_file():
        shards = sorted(set(_read(key, given, folder, INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            others = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise refuse(key, given, f"{INDEX} names {missing[0]}{others}, not there; download or copy it again")
    elif not (folder / WEIGHTS).is_file():
        old = next((path.name for kind in ("*.bin", "*.pt", "*.gguf") for path in sorted(folder.glob(kind))), None)
        found = f"has its weights in {old}" if old else "holds no weights"
        raise refuse(
            key, given, f"{found}, but every role reads {WEIGHTS}; load it with transformers, and save_pretrained it"
        )  # fmt: skip


def tensors_of(key: str, given: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that check_model has found files for, from their headers. Raises ConfigError where
    one cannot be read.
    """
    _read(key, given, folder, INDEX)  # named, where it is damaged
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files_of(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise refuse(key, given, f"its {path.name} cannot be read ({error}); download or copy it again") from None
    return shapes


def files_of(folder: Path) -> list[Path]:
    """The files that hold a model's tensors, in order."""
    index = folder / INDEX
    named = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}) if index.is_file() else {}
    return [folder / name for name in sorted(set(named.values())) or [WEIGHTS]]


def check_tokenizer(key: str, given: str, folder: Path, prompt: PromptConfig) -> None:
    """Raise ConfigError where there is no tokenizer, or none that can do what ``prompt`` says, as its files tell."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise refuse(key, given, "holds no tokenizer (tokenizer.json); copy it from the model that it was made from")
    rows = _read(key, given, folder, "config.json").get("vocab_size") or 0
    try:
        tokens = _tokens(_read(key, given, folder, "tokenizer.json"))
    except (AttributeError, KeyError, TypeError):
        raise refuse(key, given, "its tokenizer.json holds no tokenizer; mend it, or download it again") from None
    if rows and tokens > rows:
        raise ConfigError(without_rows(f"{key}={given}", tokens, rows))
    settings = _read(key, given, folder, "tokenizer_config.json")
    chats = has_template(key, given, folder)
    if not chats and (reason := without_template(prompt, given)):
        raise ConfigError(reason)
    special = _read(key, given, folder, "special_tokens_map.json") | settings
    nameless = "bos_token" in special or special.get("tokenizer_class") in PLAIN
    if prompt.bos == "always" and not (chats and prompt.chat != "never") and nameless and not special.get("bos_token"):
        raise ConfigError(without_bos(given))


def has_template(key: str, given: str, folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` has a chat template."""
    settings = _read(key, given, folder, "tokenizer_config.json")
    return bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()


def without_template(prompt: PromptConfig, model: object) -> str:
    """What ``prompt`` asks of a tokenizer that has no chat template, with the way out; empty where it asks nothing."""
    if prompt.chat == "never":
        return ""
    if prompt.chat == "always":
        return f"prompt.chat=always: the tokenizer of {model} has no chat template; take prompt.chat=never"
    for key, value in (("system", prompt.system), ("template_kwargs", prompt.template_kwargs)):
        if value:
            return (
                f"prompt.{key}={value}: the tokenizer of {model} has no chat template to put it into; leave it out, or "
                "write it into task.template"
            )
    return ""


def without_rows(model: str, tokens: int, rows: int) -> str:
    """What is said to a tokenizer that makes tokens of a text which the model does not have."""
    return (
        f"{model}: its tokenizer has {tokens} tokens, the model {rows} (vocab_size in config.json); give it the "
        "tokenizer that it was trained with, or resize its embedding"
    )


def without_bos(model: object) -> str:
    """What is said to prompt.bos=always."""
    return f"prompt.bos=always: the tokenizer of {model} has no BOS token; take prompt.bos=auto"


def _tokens(tokenizer: dict[str, Any]) -> int:
    """From this id on, no token of a tokenizer.json stands for text; 0 where there is none. Special tokens do not
    count: text.py leaves out those that the model has no row for, or refuses a chat template that writes them.
    """
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    added = {token["id"]: bool(token["special"]) for token in tokenizer.get("added_tokens") or ()}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # Unigram: [[token, score]]
    return max((i + 1 for i in [*ids, *added] if not added.get(i)), default=0)


def _read(key: str, given: str, folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder; empty where it is not there."""
    file = folder / name
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(key, given, f"its {name} cannot be read ({error}); mend it, or download it again") from None
    if not isinstance(found, dict):
        raise refuse(key, given, f"its {name} holds no JSON object; mend it, or download it again")
    return found

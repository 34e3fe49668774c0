"""From the raw values of keys to a Config, with errors that name the key: called by compose.py.

Types, paths and texts are checked here, rules between fields in validate.py.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from offtrail.core.plugins import is_plugin
from offtrail.core.settings import PathKind
from offtrail.platform.config.errors import ConfigError, nearest_text, refuse, show
from offtrail.platform.config.files import Raw, as_text, guess, read_text, yaml_problem
from offtrail.platform.config.keys import (
    GROUPS,
    VARIANTS,
    Key,
    all_paths,
    keys_of,
    variant_keys,
    variant_of,
)
from offtrail.platform.config.paths import path_problem
from offtrail.platform.config.schema import Config
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.registry import family

IMPLIED: dict[str, dict[str, Raw]] = {
    "serve": {"engine.name": "sglang"},
    "reward_model": {"learner.checkpoint_every": 100},
    "prm": {"learner.checkpoint_every": 100},
}
"""Job → what it takes in place of a default, unless a layer says otherwise: a model that scores is measured on held-out
answers at every checkpoint.
"""


MIX = "reject.mix"
PATHS_OF_ENTRIES: dict[str, PathKind] = {MIX: "file", "scorer.models": "model"}
"""Mapping whose entries have a `path` → its kind."""


def build(values: Mapping[str, Raw]) -> Config:
    """The Config of raw values, types checked, `__post_init__` run; cross-field rules are not checked here."""
    base = Config()
    job = values.get("job")
    values = {**(IMPLIED.get(job, {}) if isinstance(job, str) else {}), **values}
    for group, variants in VARIANTS.items():
        name = values.get(f"{group}.name", getattr(base, group).name)
        if group == "task" and isinstance(name, str) and is_plugin(name):
            base.task = _task_from_outside(name)
            continue
        variant = variant_of(group, name)
        if variant is None:
            near = nearest_text(str(name), variants)
            raise refuse(f"{group}.name", name, f"must be one of {', '.join(variants)}{near}")
        setattr(base, group, variant())
    keys = keys_of(base)
    tree = _tree(base)
    for path, value in _with_entries(values, keys).items():
        if path not in keys:
            raise _unknown(path, value, keys, base)
        _assign(tree, keys[path], value)
    try:
        return cast(Config, OmegaConf.to_object(tree))
    except (ValueError, OmegaConfBaseException) as error:  # a __post_init__ speaks in our form already
        raise ConfigError(str(error).split("\n", maxsplit=1)[0]) from None


_TREES: dict[tuple[Any, ...], bytes] = {}
"""By the variant of each group, pickled: to make one takes longer than all else here, to copy one half as long."""


def _tree(base: Config) -> DictConfig:
    """The keys of ``base``, whose values are all defaults, as OmegaConf holds them."""
    if is_plugin(base.task.name):  # a pickle knows classes by their names, and a name may be another file's by now
        return cast(DictConfig, OmegaConf.structured(base))
    chosen = (*(type(getattr(base, group)) for group in VARIANTS), base.task.name)
    if chosen not in _TREES:
        _TREES[chosen] = pickle.dumps(OmegaConf.structured(base))
    return cast(DictConfig, pickle.loads(_TREES[chosen]))


def _task_from_outside(name: str) -> TaskConfig:
    """The defaults of `task=module:class`: its keys are keys of this run like any other's."""
    try:
        return family(name).Config(name=name)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _with_entries(values: Mapping[str, Raw], keys: Mapping[str, Key]) -> dict[str, Raw]:
    """`task.weights.chain=1` put into the mapping task.weights: the given one, or the default."""
    whole = {path: _structure(path, value, keys.get(path)) for path, value in values.items()}
    for path in [path for path in whole if path not in keys]:
        owner = next((key for key in keys.values() if key.is_mapping and path.startswith(f"{key.path}.")), None)
        if owner is not None:
            names = _names_of(path.removeprefix(f"{owner.path}."))
            whole[owner.path] = _with_entry(whole.get(owner.path, owner.default), names, whole.pop(path))
    return whole


def _names_of(entry: str) -> list[str]:
    """`chain.noise` → [chain, noise]; the dots of a module in `my.code:brevity.longest` part nothing."""
    module, colon, rest = entry.rpartition(":")
    first, *others = rest.split(".")
    return [module + colon + first, *others]


def _with_entry(mapping: Raw, names: list[str], value: Raw) -> dict[str, Raw]:
    inner = mapping if isinstance(mapping, dict) else {}
    return inner | {names[0]: _with_entry(inner.get(names[0]), names[1:], value) if names[1:] else value}


def _structure(path: str, value: Raw, key: Key | None) -> Raw:
    """`[…]` and `{…}` of the command line as lists and mappings of texts, unless the key holds a text anyway."""
    if isinstance(value, str) and value[:1] in ("[", "{") and not (key and key.is_text):
        try:
            return read_text(value)
        except yaml.YAMLError as error:
            raise refuse(path, value, f"malformed: {yaml_problem(error)}") from None
    return value


def _assign(tree: DictConfig, key: Key, value: Raw) -> None:
    """Set one key; OmegaConf turns texts into numbers by the declared type."""
    _check_texts(key.path, value)
    value = _path_or_paths(key.path, key.path_kind, value)
    if key.type_text == "{name: value}":  # no declared type to go by
        value = guess(value)
    if key.type_text == "{name: {name: value}}":
        value = _paths_within(key, guess(value))
    if isinstance(value, str) and key.default is not None and value == as_text(key.default):
        return  # it is there: so is most of a saved configuration
    try:
        OmegaConf.update(tree, key.path, _literal(value), merge=False)
    except OmegaConfBaseException:
        raise _wrong_type(key, value) from None


def _check_texts(key: str, value: Raw) -> None:
    """What no file, no process and no message can hold is refused in every text, wherever it stands."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(key, name)
            _check_texts(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            _check_texts(key, item)
    elif isinstance(value, str) and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise refuse(key, value, "must be UTF-8 text")
    elif isinstance(value, str) and "\0" in value:
        raise refuse(key, value, "must not hold NUL")


def _path(key: str, kind: PathKind, value: str) -> str:
    """`~` expanded, and absolute: a saved configuration means the same from every directory. A folder for what is to be
    made stays as it is typed, and a model's name in the Hugging Face cache is no path.
    """
    if kind in ("", "name") or not value:
        return value
    if problem := path_problem(value):
        raise refuse(key, value, problem)
    path = os.path.expanduser(value)
    if kind == "file" or (kind == "model" and os.path.isdir(path)) or (kind == "either" and os.path.exists(path)):
        return str(Path(path).absolute())
    return path


def _paths_within(key: Key, value: Raw) -> Raw:
    """The same for task.settings={jsonl: {path: …}}, which holds keys of other variants of its section; and for the
    `path` of each entry of PATHS_OF_ENTRIES.
    """
    if not isinstance(value, dict):
        return value
    if (kind := PATHS_OF_ENTRIES.get(key.path)) is not None:
        return {name: _of_entry(f"{key.path}.{name}.path", kind, entry) for name, entry in value.items()}
    variants = variant_keys().get(key.path.partition(".")[0], {})
    return {
        family: {
            name: _path_or_paths(f"{key.path}.{family}.{name}", _kind_of(variants.get(family, {}), name), item)
            for name, item in entries.items()
        }
        if isinstance(entries, dict)
        else entries
        for family, entries in value.items()
    }


def _of_entry(key: str, kind: PathKind, entry: Raw) -> Raw:
    if not isinstance(entry, dict) or "path" not in entry:
        return entry
    return {**entry, "path": _path_or_paths(key, kind, entry["path"])}


def _path_or_paths(key: str, kind: PathKind, value: Raw) -> Raw:
    """`_path` of a text, and of each in a list."""
    if isinstance(value, list):
        return [_path_or_paths(key, kind, item) for item in value]
    return _path(key, kind, value) if isinstance(value, str) else value


def _kind_of(keys: Mapping[str, Key], name: str) -> PathKind:
    return next((key.path_kind for key in keys.values() if key.path.rpartition(".")[2] == name), "")


def _literal(value: Raw) -> Raw:
    """The value with `${` escaped: OmegaConf would read it as an interpolation, but LaTeX writes it too."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    return value


def _wrong_type(key: Key, value: Raw) -> ConfigError:
    """Names the entry of a mapping that is wrong, where it is one entry."""
    if key.type_text == "{name: float}" and isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, str) and not isinstance(guess(item), int | float) and name and item:
                return refuse(f"{key.path}.{name}", item, "must be a number")
    near = nearest_text(value, key.type_text.split("|")) if isinstance(value, str) and "|" in key.type_text else ""
    return refuse(key.path, value, f"must be {_expected(key)}{near}")


def _expected(key: Key) -> str:
    if key.type is int:
        return "a whole number"
    if key.type is float:
        return "a number"
    if key.type is bool:
        return "true or false"
    if key.is_mapping:
        return f"a mapping {key.type_text}, such as {key.path}={show(key.default)}, or {key.path}.NAME=NUMBER"
    if key.type_text.endswith(", …]"):
        return f"a list {key.type_text}, such as {key.path}=[A, B]"
    if isinstance(key.default, tuple):
        return f"{key.type_text}, such as {key.path}={show(key.default)}"
    return f"one of {key.type_text.replace('|', ', ')}" if "|" in key.type_text else "one text"


def _unknown(path: str, value: Raw, keys: Mapping[str, Key], base: Config) -> ConfigError:
    inside = [known for known in keys if known.startswith(f"{path}.")]
    if inside:
        return refuse(path, value, f"is a section; its keys: {', '.join(inside)}")
    group = path.partition(".")[0]
    owners = [name for name, known in variant_keys().get(group, {}).items() if path in known]
    if owners:
        chosen = getattr(base, group).name
        return refuse(path, value, f"not a key of {group}.name={chosen}, but of {group}.name={'|'.join(owners)}")
    near = nearest_text(path, set(keys) | set(GROUPS)) or nearest_text(path, all_paths())
    return refuse(path, value, f"unknown key{near or '; python launch.py --help all lists every one'}")


# Resume

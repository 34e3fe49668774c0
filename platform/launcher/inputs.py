"""What a run reads that stands outside its directory: every file that a key of its configuration names, in folders too.

launch ─► inputs_of ─► hashes ─► ledger (at the first launch), or compared with it (resume.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offtrail.core.plugins import PLUGIN, source_of
from offtrail.platform.config.build import MIX
from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.keys import keys_of, variant_keys
from offtrail.platform.config.schema import Config
from offtrail.platform.model.start import StartError, resolve
from offtrail.platform.runtime.contents import digests
from offtrail.tasks.base import TaskError
from offtrail.tasks.rows import files_of

READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
"""Suffixes of the files of a model's folder that are read; .bin where there are no safetensors."""
WRITTEN_BESIDE = ("trainer.json", "manifest.json", "compute.json")
"""What offtrail puts beside a model, and no model is read from."""


@dataclass(frozen=True)
class Input:
    """What one key names: the value as it was given, and the files behind it by their name in the ledger."""

    value: str
    files: dict[str, Path]


def inputs_of(config: Config, run_dir: Path) -> dict[str, Input]:
    """Key → the files that it names: data, models (the start model, however it was had) and code from outside."""
    found = data_of(config)
    found |= {key: Input(value, _files(Path(path))) for key, value, path in _models(config)}
    start = run_dir / "start"
    if start.is_symlink():
        found["model.path"] = Input(config.model.path, _files(Path(os.path.realpath(start))))
    for key, name in _texts("", dataclasses.asdict(config)):
        if PLUGIN.fullmatch(name) and (source := source_of(name)) is not None and source.suffix == ".py":
            found[key] = Input(name, {source.name: source})
    return found


def data_of(config: Config) -> dict[str, Input]:
    """Key → the files of data that it names."""
    found = {}
    for key, paths in _data_paths(config):
        files = [_data(key, Path(path)) for path in paths]
        named = {f"{i}/{name}" if i else name: file for i, one in enumerate(files) for name, file in one.items()}
        found[key] = Input(", ".join(paths), named)
    return found


def hashes(inputs: Mapping[str, Input]) -> dict[str, dict[str, str]]:
    """Key → file → hash; each file is read once."""
    known = digests({path for one in inputs.values() for path in one.files.values()})
    return {key: {name: known[path] for name, path in one.files.items()} for key, one in inputs.items()}


def _data_paths(config: Config) -> Iterator[tuple[str, list[str]]]:
    """(key, files and folders of data that it names) of each key that names some."""
    for key in keys_of(config).values():
        if key.is_mapping and not key.resumable:
            yield from _paths_within(key.path, key.default)
        elif key.path_kind == "file" and not key.resumable and (paths := _listed(key.default)):
            yield key.path, paths


def _models(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, value, path) of all but the start model; a name is looked up in the Hugging Face cache."""
    for key in keys_of(config).values():
        if key.path_kind != "model" or not key.default or key.resumable or key.path in ("model.path", "checkpoint"):
            continue
        with contextlib.suppress(StartError):  # who needs it will say so
            yield key.path, key.default, str(resolve(key.default))
    for name, entry in config.scorer.models.items():
        key_of_entry, given = f"scorer.models.{name}.path", entry["path"]
        with contextlib.suppress(StartError):
            yield key_of_entry, given, str(model_folder(given, key_of_entry) or resolve(given))


def _listed(value: str | list[str]) -> list[str]:
    return [path for path in (value if isinstance(value, list) else [value]) if path]


def _paths_within(path: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Those of task.settings={jsonl: {path: …}}, of eval.sets, of the mixtures among these, and of reject.mix."""
    if path == MIX:
        yield from ((f"{path}.{name}.path", [entry["path"]]) for name, entry in settings.items())
        return
    of_sets = path == "eval.sets"  # their families are tasks', by `name` where it is not the label
    group = "task" if path.startswith("eval.sets") else path.partition(".")[0]
    for label, entries in settings.items():
        if not isinstance(entries, dict):
            continue
        family = entries.get("name", label) if of_sets else label
        kinds = {name: key.path_kind for name, key in variant_keys().get(group, {}).get(family, {}).items()}
        for name, value in entries.items():
            if of_sets and name == "settings" and isinstance(value, dict):
                yield from _paths_within(f"{path}.{label}.settings", value)
            if kinds.get(f"{group}.{name}") == "file" and (paths := _listed(value)):
                yield f"{path}.{label}.{name}", paths


def _data(key: str, path: Path) -> dict[str, Path]:
    """The file itself, or those of a folder that are read, by their path in it."""
    if not path.is_dir():
        return {path.name: path} if path.is_file() else {}
    with contextlib.suppress(TaskError):  # who reads it will say so
        return {str(file.relative_to(path)): file for file in files_of(path, key)}
    return {}


def _files(path: Path) -> dict[str, Path]:
    """The file itself, or the files of a model's folder that are read."""
    if not path.is_dir():
        return {path.name: path} if path.is_file() else {}
    inside = sorted(file for file in path.iterdir() if file.is_file() and file.name not in WRITTEN_BESIDE)
    weights = ".safetensors" if any(file.suffix == ".safetensors" for file in inside) else ".bin"
    return {file.name: file for file in inside if file.suffix in (*READ, weights)}


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text of a configuration, names of mappings too, with its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}".lstrip(".")
            yield inner, name
            yield from _texts(inner, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(key, item)
    elif isinstance(value, str):
        yield key, value

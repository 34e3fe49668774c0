"""From the command line to a Config: `compose(argv)`.

    argv ─ parse ─► Layer (file)  ┐
                    Layer (line)  ┴ merge ─► {dotted key: text} ─ build ─► Config ─ validate ─► Config

Invariants
- Later layers win: dataclass defaults < a group's option < the file's keys, all of them < the command line's options <
  its keys. An option on the command line replaces the whole group, whatever the file holds there.
- An option may say `with: {learner.minibatches: 16}`: defaults in other sections that belong to it. They lose to every
  key that a file or the command line gives, and go when another option replaces theirs; between two options the later
  group of GROUPS wins, so what an algorithm says of the learning rate stands before what a model says of it.
- `model.path=DIR` takes model=pretrained along, below everything, where no layer names an option of `model`. So does an
  option of `recipe` with other groups' options in its `with`: `with: {algo: r1}`.
- Within a layer order says nothing, so one key given two values is an error.
- Values are literal: no interpolation, so that a saved configuration means the same everywhere.
- compose([saved]) == compose(argv) for every saved configuration of a composed one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import offtrail
from offtrail.core.plugins import OUTSIDE, is_plugin
from offtrail.platform.config.build import build
from offtrail.platform.config.checkpoints import model_folder, run_folder
from offtrail.platform.config.errors import ConfigError, nearest_text, refuse, shortened, show
from offtrail.platform.config.families import check_families
from offtrail.platform.config.files import MAX_DEPTH, Raw, as_text, read_file
from offtrail.platform.config.keys import (
    GROUPS,
    QUESTIONING,
    VARIANTS,
    all_paths,
    flatten,
    keys_of,
    noted_settings,
    variant_keys,
)
from offtrail.platform.config.paths import check_name, path_problem
from offtrail.platform.config.recipe import MODEL_KEYS, Stage, handed_keys, stages_of
from offtrail.platform.config.schema import SCHEMA_VERSION, Config, RunConfig
from offtrail.platform.config.sets import check_sets, with_options
from offtrail.platform.config.validate import validate
from offtrail.tasks.mixture import MixtureConfig

OPTIONS_DIR = Path(offtrail.__file__).parent / "configs"
UNSAVED = ("run.name", "run.resume", "run.resume_from")
"""What a saved configuration leaves out, so that it can be run again."""
TRAINED = ("task", "reward", "prompt", "sampling", "model")
"""Sections that the jobs of QUESTIONING take from the run whose checkpoint they ask."""
MODELS = "scorer.models"
PRETRAINED = "pretrained"
"""The option of `model` that a given model.path stands for."""


@dataclass
class Layer:
    """One source of settings: options by group, raw values by dotted key."""

    options: dict[str, str] = field(default_factory=dict)
    values: dict[str, Raw] = field(default_factory=dict)

    def set(self, key: str, value: Raw) -> None:
        """Take `key=value`; a group's plain text is an option."""
        if key.count(".") > MAX_DEPTH:
            raise refuse(key, value, f"unknown key: no key has more than {MAX_DEPTH} parts")
        store = self.options if key in GROUPS and isinstance(value, str) else self.values
        if key in store and store[key] != value:
            raise refuse(key, value, f"given twice, also as {show(store[key])}; keep one")
        store[key] = value


def compose(argv: Sequence[str]) -> Config:
    """The validated configuration of a command line (without its flags).

    Raises ConfigError, one line, on every mistake of the user.
    """
    file, line = parse(argv)
    run = _run_settings(file, line)
    if not run.resume:
        config = _composed([*_of_the_checkpoint(file, line), file, line])
    else:
        path = saved_config(run.dir, run.name)
        saved = file_layer(path)
        config, started = _composed([saved, file, line]), _composed([saved])
        refuse_cut(path, saved, started)
        refuse_new_science(started, config)
    if config.run.resume_from and stages_of(config):
        raise refuse("run.resume_from", config.run.resume_from, "a recipe has no checkpoints; it goes on where it was")
    for stage in stages_of(config):  # a mistake in the last one shows before the first has run for hours
        stage_config(config, stage, {})
    return config


def _of_the_checkpoint(file: Layer, line: Layer) -> list[Layer]:
    """For a job of QUESTIONING with a run's checkpoint: how it was trained, below all that is given. A section whose
    variant is given is the command's own, and so is what a given option says of other sections. For job=distill the
    same of its teacher, but for the model, which is the student's. job=eval asks the models that have scored the run,
    unless it is given others.
    """
    given = file.values | line.values
    distils, scored = given.get("job") == "distill", given.get("job") == "eval"
    checkpoint = given.get("distill.teacher" if distils else "checkpoint")
    if not (distils or given.get("job") in QUESTIONING) or not isinstance(checkpoint, str):
        return []
    model = model_folder(checkpoint)
    run = (run_folder(str(model)) if model is not None else None) or run_folder(checkpoint)
    if run is None:
        return []
    own = {*file.options, *line.options, *(key.removesuffix(".name") for key in given if key.endswith(".name"))}
    taken = [section for section in TRAINED if section not in own and not (distils and section == "model")]
    options = (file.options | line.options).items()
    beside = {key for group, option in options for key in _option_values(group, option)[1]}
    beside |= {"model.path", "model.name"}  # the checkpoint is the model; its start may be gone
    saved = file_layer(run / "config.yaml").values
    values = {k: v for k, v in saved.items() if k.partition(".")[0] in taken and k not in beside}
    if scored and not any(key.startswith(MODELS) for key in given):
        values |= {k: v for k, v in saved.items() if k.startswith(MODELS)}
    gone = set(saved.get(MODELS) or ()) - _models_in(given) - set(values.get(MODELS) or ())
    for key in ("reward.weights", "reward.only"):  # what is judged by rules, or by other models, is paid by those
        if isinstance(weighed := values.get(key), dict):
            values[key] = {name: value for name, value in weighed.items() if name not in gone}
    return [Layer(values=values)]


def _models_in(given: Mapping[str, Raw]) -> set[str]:
    """The names in scorer.models of dotted keys."""
    whole = given.get(MODELS)
    dotted = {key.removeprefix(MODELS + ".").partition(".")[0] for key in given if key.startswith(MODELS + ".")}
    return dotted | (set(whole) if isinstance(whole, dict) else set())


def stage_config(config: Config, stage: Stage, handed: Mapping[str, Raw]) -> Config:
    """The configuration of one stage: the recipe's, under the stage's own settings, under what earlier stages hand on
    (not yet, where it is only checked). One that asks a model, and is handed none, asks the recipe's model.path.

    Raises ConfigError that names the stage.
    """
    base, own = Layer(), Layer(values={})
    tree = as_text(saved_tree(config))
    del tree["recipe"]
    asks = MODEL_KEYS.get(stage.job) == "checkpoint" and not stage.start_from
    tree["checkpoint"] = config.model.path if asks else ""
    _take_tree(base, tree, "")
    try:
        _take_tree(own, stage.settings, "")
        _begin_anew(base, own)
        layers = [base, own, Layer(values={"job": stage.job, **handed})]
        return _composed(layers, handed_keys(stage) - handed.keys())
    except ConfigError as error:
        raise ConfigError(f"{stage.key}: {error}") from None


def _begin_anew(base: Layer, own: Layer) -> None:
    """A group whose variant a stage names by `name` has nothing of the recipe's: `task: {name: mixture, …}`."""
    for group in VARIANTS:
        name = f"{group}.name"
        if own.values.get(name, base.values.get(name)) != base.values.get(name):
            base.values = {key: value for key, value in base.values.items() if not key.startswith(f"{group}.")}


def load_config(path: Path) -> Config:
    """The configuration of a run directory's config.yaml, as it was saved: what a role process starts from."""
    return build(merge([file_layer(path)]))


def parse(argv: Sequence[str]) -> tuple[Layer, Layer]:
    """(file, command line): at most one YAML file, `group=option` and `key=value`."""
    file, line, path = Layer(), Layer(), None
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_][\w.:-]*", key):
            line.set(key, value)
        elif path is not None:
            raise ConfigError(f"{argument}: {path} is given already; one file is merged, the rest are key=value")
        else:
            path = _file_argument(argument)
            file = file_layer(path)
    return file, line


def _file_argument(argument: str) -> Path:
    near = nearest_text(argument, all_paths() | set(GROUPS))
    neither = ConfigError(f"{shortened(argument)}: neither key=value, group=option nor a YAML file{near}")
    if path_problem(argument):
        raise neither
    path = Path(os.path.expanduser(argument))
    if os.path.isfile(path / "config.yaml"):
        raise ConfigError(f"{argument}: is a run directory; to repeat it give {path / 'config.yaml'}")
    if os.path.isfile(path) or path.suffix in (".yaml", ".yml"):
        return path
    raise neither


def file_layer(path: Path) -> Layer:
    """The settings of a YAML file, a user's or a saved run's."""
    tree = read_file(path)
    version = tree.get("schema_version", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise ConfigError(
            f"schema_version={show(version)}: {path} was written by another offtrail; this one reads "
            f"{SCHEMA_VERSION}: run it with the offtrail that wrote it, or carry its keys over by hand"
        )
    layer = Layer()
    _take_tree(layer, tree, "")
    return layer


def _take_tree(layer: Layer, tree: Mapping[str, Raw], prefix: str) -> None:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if path not in _sections():
            layer.set(path, value)
        elif isinstance(value, dict):
            _take_tree(layer, value, f"{path}.")
        elif value != "":  # a section whose keys are all commented out says nothing
            layer.set(path, value)


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(path.rpartition(".")[0] for path in all_paths()) - {""}


def options_of(group: str) -> list[str]:
    """The options of a group: the files in configs/<group>/."""
    return sorted(path.stem for path in (OPTIONS_DIR / group).glob("*.yaml"))


def _option_values(group: str, option: str) -> tuple[dict[str, Raw], dict[str, Raw]]:
    """(its own section's values, its defaults in other sections), by dotted key."""
    options = options_of(group)
    if is_plugin(option) and (group == "task" or OUTSIDE in VARIANTS.get(group, {})):
        return {f"{group}.name": option}, {}
    if option not in options:
        hint = f"; a folder or a name is model.path={option}" if group == "model" and "/" in option else ""
        raise refuse(
            group, option, f"unknown option; options: {', '.join(options)}{nearest_text(option, options)}{hint}"
        )
    tree = read_file(OPTIONS_DIR / group / f"{option}.yaml")
    own, others = Layer(), Layer()
    _take_tree(others, tree.pop("with", {}), "")
    _take_tree(own, {group: tree}, "")
    return {f"{group}.name": option} | own.values, others.values


def _brought_along(layers: Sequence[Layer]) -> Layer:
    """What stands below everything: the options that the chosen recipe names for groups of which no layer does, and
    model=pretrained where a model.path is given.
    """
    paths = [layer.values["model.path"] for layer in layers if "model.path" in layer.values]
    brought = Layer(options={"model": PRETRAINED} if paths and paths[-1] else {})
    recipes = [layer.options["recipe"] for layer in layers if "recipe" in layer.options]
    if not recipes or recipes[-1] not in options_of("recipe"):
        return brought
    tree = read_file(OPTIONS_DIR / "recipe" / f"{recipes[-1]}.yaml").get("with", {})
    named = {name for layer in layers for name in (*layer.options, *(key.partition(".")[0] for key in layer.values
             if key.endswith(".name")))}  # fmt: skip
    options = {group: option for group, option in tree.items() if group in GROUPS and isinstance(option, str)}
    brought.options |= {group: option for group, option in options.items() if group not in named}
    return brought


def merge(layers: Sequence[Layer]) -> dict[str, Raw]:
    """One raw value for each key that is given, later layers winning."""
    merged: dict[str, Raw] = {}
    beside: dict[str, dict[str, Raw]] = {}
    for layer in (_brought_along(layers), *layers):
        for group, option in layer.options.items():
            merged = {key: value for key, value in merged.items() if not key.startswith(f"{group}.")}
            own, beside[group] = _option_values(group, option)
            merged |= own
        for key, value in sorted(layer.values.items(), key=lambda item: item[0].count(".")):
            if isinstance(value, dict):  # a mapping is one value: entries of earlier layers do not shine through
                merged = {old: kept for old, kept in merged.items() if not old.startswith(f"{key}.")}
            merged[key] = value
    others = {key: value for group in GROUPS for key, value in beside.get(group, {}).items()}
    return {key: value for key, value in others.items() if _stands(key, others | merged)} | merged


def _stands(path: str, values: Mapping[str, Raw]) -> bool:
    """Whether a key is one of the chosen variant's, or of no other's either (which `build` will refuse)."""
    group = path.partition(".")[0]
    variants = variant_keys().get(group, {})
    chosen = variants.get(str(values.get(f"{group}.name", getattr(Config(), group).name)), {}) if variants else {}
    return path in chosen or not any(path in keys for keys in variants.values())


def _composed(layers: Sequence[Layer], later: Collection[str] = ()) -> Config:
    """``later``: keys that are set when an earlier stage of a recipe has made what they name."""
    config = build(merge(layers))
    config.eval.sets = with_options(config.eval.sets, options_of, _option_values)
    validate(config, later)
    check_sets(config)
    if isinstance(config.task, MixtureConfig):
        check_families(config.task, "task.settings", config.job)
    return config


def _run_settings(file: Layer, line: Layer) -> RunConfig:
    """run.* alone, before the rest can be built: a resumed run's variants stand in its saved configuration."""
    values = {key: value for key, value in (file.values | line.values).items() if key.startswith("run.")}
    return build(values).run if "run.resume" in values else RunConfig()


def saved_config(folder: str, name: str) -> Path:
    """runs/NAME/config.yaml of the run to go on with; raises ConfigError when there is none."""
    if name:
        check_name("run.name", name)
    saved = sorted(Path(folder).glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [path.parent.name for path in saved]
    if not name:
        known = f"; the newest runs in {folder}: {', '.join(runs[:5])}" if runs else ""
        raise refuse("run.resume", True, f"needs run.name=NAME, the run to go on with{known}")
    path = Path(folder) / name / "config.yaml"
    if not os.path.isfile(path):
        raise refuse("run.name", name, f"no run to resume in {folder}{nearest_text(name, runs)}")
    return path


def refuse_cut(path: Path, saved: Layer, started: Config) -> None:
    """A saved configuration holds every key: one that was cut would go on with defaults in place of the rest."""
    missing = [key for key in flatten(started) if key not in saved.values and key not in UNSAVED]
    if missing:
        raise refuse(
            missing[0], "(absent)", f"{path} lacks it{f' and {len(missing) - 1} more keys' if missing[1:] else ''}: it "
            "was cut or edited; restore it, or start a new run",
        )  # fmt: skip


def refuse_new_science(started: Config, wanted: Config) -> None:
    """Only keys that do not decide a learner step's numbers may change (places, patience, views, speed: `resumable` at
    their fields), nothing that an arm of a comparison could differ in, but for those few that can save a diverged run,
    whose change the ledger notes; and a run may grow longer, never shorter.
    """
    before, now = flatten(started), flatten(wanted)
    may_change = {key.path for config in (started, wanted) for key in keys_of(config).values() if key.resumable is True}
    may_change |= noted_settings(started).keys()
    changed = [key for key in now | before if now.get(key) != before.get(key)]
    refused = [key for key in changed if key not in may_change]
    if refused:
        others = f" (also: {', '.join(refused[1:])})" if refused[1:] else ""
        raise refuse(
            refused[0],
            now.get(refused[0], "(gone)"),
            f"differs from {show(before.get(refused[0], '(absent)'))}, with which the run was started{others}; "
            f"a resumed run keeps what decides its numbers: leave it out, or start a new run from its config.yaml",
        )
    if wanted.learner.steps < started.learner.steps:
        raise refuse(
            "learner.steps",
            wanted.learner.steps,
            f"the run was started with {started.learner.steps}; a resumed run may grow longer, not shorter",
        )


# Saving


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, without run.name and what resumes a run, so that it can be run again."""
    return yaml.safe_dump(saved_tree(config), sort_keys=False, allow_unicode=True, width=120)


def saved_tree(config: Config) -> dict[str, Any]:
    """What ``to_yaml`` writes."""
    tree = dataclasses.asdict(config)
    for key in UNSAVED:
        del tree["run"][key.removeprefix("run.")]
    plain: dict[str, Any] = _plain(tree)
    return plain


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

"""What no single field can say: ranges, rules between keys, and paths that must exist. No torch, no network.

`validate(config)` runs every rule of RULES in order; the first that is broken raises a ConfigError that names the key,
its value and the way out. A rule's name is its sentence. What one variant's fields say among themselves stands in its
own `__post_init__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from offtrail.algos.pairs import incompatible
from offtrail.core.plugins import PluginError, check, check_settings, is_plugin
from offtrail.core.settings import out_of_limits
from offtrail.platform.config import learnable, scorers
from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.errors import ConfigError, nearest_text, refuse
from offtrail.platform.config.keys import QUESTIONING, flatten, keys_of
from offtrail.platform.config.paths import check_name
from offtrail.platform.config.schema import SCHEMA_VERSION, SINKS, Config, SglangConfig
from offtrail.rewards.config import TRL_MARK
from offtrail.search.config import OutsideConfig
from offtrail.tasks.config import JUDGED_BY_MORE
from offtrail.tasks.files import FileConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.programs import ProgramsConfig
from offtrail.tasks.templates import template_text


def validate(config: Config, later: Collection[str] = ()) -> None:
    """Raise ConfigError for the first broken rule. ``later``: keys that an earlier stage of a recipe will set."""
    try:
        for rule in RULES:
            rule(config)
        what_the_job_reads_is_named(config, later)
    except PluginError as error:
        raise ConfigError(str(error)) from None


def schema_is_this_one(config: Config) -> None:
    """Files are checked where they are read; this is the command line."""
    if config.schema_version != SCHEMA_VERSION:
        raise refuse("schema_version", config.schema_version, f"this offtrail has {SCHEMA_VERSION}; leave the key out")


LARGEST = 1e9
"""Of a number whose range has no upper end; with those that have, no sum or product of a few overflows."""
LARGEST_ENTRY = 2**63 - 1
"""Of a number in a mapping with free names, whose meaning is not known here: what a message and a database hold."""


def numbers_are_in_range(config: Config) -> None:
    """The range that stands at each field, and no nan, infinity or absurd size anywhere."""
    for key in keys_of(config).values():
        largest = LARGEST_ENTRY if key.is_mapping or key.has_upper_end else LARGEST
        for name, number in _numbers(key.path, key.default):
            if isinstance(number, float) and not math.isfinite(number):
                raise refuse(name, number, "must be a finite number")
            if not key.has_upper_end and abs(number) > largest:
                raise refuse(name, number, f"must be {'≤' if number > 0 else '≥ −'} {largest:,.0f}{key.meaning}")
        if complaint := out_of_limits(key.default, key.limits):
            raise ConfigError(f"{key.path}={complaint}{key.meaning}")


def _numbers(path: str, value: object) -> Iterator[tuple[str, float]]:
    """(where it stands, number) of every number in a value, however deep."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(f"{path}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(path, item)
    elif isinstance(value, (int, float)):
        yield path, value


def names_stay_in_their_folder(config: Config) -> None:
    """No path in a name that a folder is named after; an empty one means a default."""
    for key in keys_of(config).values():
        if key.path_kind == "name" and (key.default or key.path != "run.name"):
            check_name(key.path, key.default)


def made_model_has_whole_heads(config: Config) -> None:
    """Only for the model that offtrail makes itself (model.path empty)."""
    model = config.model
    if model.path:
        return
    if model.hidden_size % (2 * model.heads):
        raise refuse(
            "model.hidden_size",
            model.hidden_size,
            f"must be a multiple of 2·model.heads={2 * model.heads}: rotary positions need an even head size",
        )
    if model.heads % model.kv_heads:
        raise refuse("model.kv_heads", model.kv_heads, f"must divide model.heads={model.heads}")


def a_pretrained_model_has_a_path(config: Config) -> None:
    """Its learning rates would not move the model that offtrail makes."""
    if config.model.name == "pretrained" and not config.model.path:
        raise ConfigError("model.path=: model=pretrained needs a Hugging Face folder or name: model.path=DIR")


def model_paths_are_here(config: Config) -> None:
    """A folder with config.json, or a name in the Hugging Face cache: no role downloads, four of them would at once."""
    for key in keys_of(config).values():
        if key.path_kind == "model" and key.path != "checkpoint":  # which may be a run directory, too
            _model_is_here(key.path, key.default)
    for name, entry in config.scorer.models.items():
        key_of_entry, given = f"scorer.models.{name}.path", entry["path"]
        if model_folder(given, key_of_entry) is None:
            _model_is_here(key_of_entry, given, RUN_OR_FOLDER)


RUN_OR_FOLDER = "a run directory, a checkpoint or a Hugging Face model folder"


def _model_is_here(key: str, given: str, give: str = "a Hugging Face model folder, or leave it empty") -> None:
    if not given or os.path.isfile(Path(given) / "config.json"):
        return
    if os.path.isfile(Path(given) / "adapter_config.json"):
        merge = "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), with peft"
        raise refuse(key, given, f"is a LoRA adapter, not a model; merge it into its model first: {merge}")
    if os.path.isfile(Path(given) / "config.yaml"):
        raise refuse(key, given, f"is a run directory; give the model in it: {model_folder(given, key)}")
    if os.path.exists(given):
        gguf = any(path.suffix == ".gguf" for path in (Path(given), *Path(given).glob("*.gguf")))
        way = "is a GGUF model; take the folder that it was made from, or make one of it as docs/real.md does"
        raise refuse(key, given, way if gguf else "holds no config.json; a Hugging Face model folder has one")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given, re.ASCII) or given.startswith("."):
        raise refuse(key, given, f"no such folder; give {give}")
    cached = hub_cache() / f"models--{given.replace('/', '--')}" / "snapshots"
    if not any(cached.glob("*/config.json")):
        raise refuse(key, given, f"neither a folder nor in the Hugging Face cache; fetch it first: hf download {given}")


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its own environment variables (importing it would cost half a second)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def files_of_lines_are_here(config: Config) -> None:
    """The files and folders of a task and of examples."""
    task, reject = config.task, config.reject
    files = [("sft.path", config.sft.path), ("sample.shots_path", config.sample.shots_path)]
    files += [("eval.few_shot_path", config.eval.few_shot_path)]
    heads = {"reward_model": config.reward_model, "prm": config.prm}
    files += [(f"{job}.{end}path", getattr(one, f"{end}path")) for job, one in heads.items() for end in ("", "eval_")]
    files += [("reject.paths", path) for path in reject.paths]
    files += [("label.paths", path) for path in config.label.paths]
    files += [("prefer.paths", path) for path in config.prefer.paths]
    files += [(f"reject.mix.{name}.path", entry["path"]) for name, entry in reject.mix.items()]
    files += [("reject.decontaminate_against", path) for path in reject.decontaminate_against]
    if isinstance(task, JsonlConfig):
        files += [("task.decontaminate_against", path) for path in task.decontaminate_against]
    if isinstance(task, FileConfig):
        files += [("task.path", task.path), ("task.eval_path", task.eval_path)]
        if not task.path and not (config.job == "eval" and task.eval_path):
            raise ConfigError("task.path=: problems are needed: task.path=FILE, or a folder of files (docs/sets.md)")
    for key, path in files:
        what = "problem" if key.startswith("task.") or key.endswith("against") else "example"
        if path and not os.path.isfile(path) and not os.path.isdir(path):
            raise refuse(key, path, f"no such file or folder; give one {what} a row (docs/sets.md)")


def programs_are_run(config: Config) -> None:
    """A program is right when it passes its tests; a verifier that runs nothing would call nearly all of them wrong."""
    weights, runs = config.reward.weights, config.job in ("rl", *QUESTIONING)
    if runs and isinstance(config.task, ProgramsConfig) and "code" not in weights and not any(map(is_plugin, weights)):
        raise ConfigError(f"reward.weights={weights}: task={config.task.name} is judged by running: reward=code")


ASKED_PLACES = {"tags": "<answer>", "boxed": "\\boxed"}
"""reward.answer → what a template that asks for it says."""


def the_answer_is_looked_for_where_the_template_asks_for_it(config: Config) -> None:
    """A model that does as it is told would else earn nothing, for ever. In a tag or a box a last number is found."""
    reward, task = config.reward, config.task
    if config.job not in ("rl", *QUESTIONING) or (config.job == "eval" and config.eval.sets):
        return
    if reward.answer == "last_number" or not reward.looks_for_answers:
        return
    within = {name: task.settings.get(name, {}) for name in task.weights} if isinstance(task, MixtureConfig) else {}
    templates = {f"task.settings.{name}.template": given.get("template", "") for name, given in within.items()}
    for key, given in (templates or {"task.template": getattr(task, "template", "")}).items():
        text = template_text(str(given))
        asked = [place for place, words in ASKED_PLACES.items() if words in text]
        if not asked or reward.answer in asked or (reward.answer == "mark" and reward.answer_mark in text):
            continue
        way = f"{key}={reward.answer}" if reward.answer in ASKED_PLACES else f"a {key} that asks for it there"
        raise ConfigError(
            f"reward.answer={reward.answer}: {key} asks for the answer in {ASKED_PLACES[asked[0]]}, where it is not "
            f"looked for, so that every answer would be wrong; take reward.answer={asked[0]}, or {way}"
        )


def gold_answers_are_enough(config: Config) -> None:
    """Rows of a file have a question and an answer; what else a verifier would ask of its problem, they have not."""
    task = config.task
    for name in task.weights if isinstance(task, MixtureConfig) else [task.name]:
        kind = "programs" if isinstance(task, ProgramsConfig) else name
        if config.job == "prefer" and config.prefer.by == "verify" and kind in JUDGED_BY_MORE:
            raise refuse(
                "prefer.by", "verify", f"task={name} is judged by more than its gold answer; take reward, of job=sample"
            )
        if config.job == "reject" and config.reject.unscored == "verify" and kind in JUDGED_BY_MORE:
            raise refuse(
                "reject.unscored", "verify", f"task={name} is judged by more than its gold answer; take drop or keep"
            )


def a_groups_programs_have_time_and_memory(config: Config) -> None:
    """One after another in one verifier, each with an address space of its own that the verifier's bounds."""
    reward, sizes = config.reward, {"eval.samples": config.eval.samples}
    sizes |= {} if config.job == "eval" else {"batch.group_size": config.batch.group_size}
    drawn = {"sample": ("sample.samples", config.sample.samples), "label": ("label.rollouts", config.label.rollouts)}
    sizes = dict([drawn[config.job]]) if config.job in drawn else sizes
    key, size = max(sizes.items(), key=lambda item: item[1])
    given = reward.settings.get("code", {})
    seconds, memory = given.get("seconds", 10.0), given.get("memory_mb", 512)
    if "code" not in reward.weights or not isinstance(seconds, (int, float)) or not isinstance(memory, int):
        return
    if reward.deadline_seconds < size * seconds:
        must = f"must be ≥ {size * seconds:g}, {key}={size} times reward.settings.code.seconds={seconds:g}"
        raise refuse("reward.deadline_seconds", reward.deadline_seconds, must)
    if reward.memory_mb < memory:
        raise refuse("reward.memory_mb", reward.memory_mb, f"must be ≥ reward.settings.code.memory_mb={memory}")


def objective_and_correction_fit(config: Config) -> None:
    """No importance weight counts twice; the reason stands in algos/pairs.py."""
    reason = incompatible(config.algo, config.correction)
    if reason is not None:
        raise ConfigError(reason)


def minibatches_divide_groups(config: Config) -> None:
    """A learner step is K updates of whole groups."""
    groups, minibatches = config.batch.groups, config.learner.minibatches
    if groups % minibatches:
        raise refuse("batch.groups", groups, f"must be divisible by learner.minibatches={minibatches}")


def references_are_refreshed_between_steps(config: Config) -> None:
    """All K updates of a learner step have one reference, so it can only change after whole steps."""
    refresh, minibatches = config.algo.ref_refresh, config.learner.minibatches
    if refresh % minibatches:
        raise refuse(
            "algo.ref_refresh",
            refresh,
            f"counts optimizer updates: must be a multiple of learner.minibatches={minibatches}, the updates of a step",
        )


def groups_can_have_a_signal(config: Config) -> None:
    """One sample alone has no variance: every group would be refused."""
    if config.algo.filter_groups != "none" and config.batch.group_size < 2:
        raise refuse(
            "algo.filter_groups",
            config.algo.filter_groups,
            f"needs batch.group_size ≥ 2, not {config.batch.group_size}: one answer is always all right or all wrong",
        )


def every_rank_has_samples(config: Config) -> None:
    """Each of the K updates is split over the ranks, sample by sample."""
    if config.supervised is not None:
        if config.learner.ranks > config.supervised.batch_size:
            only = f"an update has only {config.job}.batch_size={config.supervised.batch_size} examples to split"
            raise refuse("learner.ranks", config.learner.ranks, only)
        return
    samples = config.batch.groups * config.batch.group_size // config.learner.minibatches
    if config.learner.ranks > samples:
        raise refuse(
            "learner.ranks",
            config.learner.ranks,
            f"an update has only batch.groups·batch.group_size/learner.minibatches = {samples} samples to split",
        )


def answers_fit_the_model(config: Config) -> None:
    """Prompt and answer share model.max_length, and a microbatch holds the longest sample."""
    longest, new = config.model.max_length, config.sampling.max_new_tokens
    samples = config.supervised is None
    if samples and new >= longest:
        raise refuse("sampling.max_new_tokens", new, f"must be < model.max_length={longest}: the prompt needs room too")
    grown = config.sampling.longest_at(config.learner.steps - 1)
    if samples and grown >= longest:
        raise refuse(
            "sampling.growth_factor",
            config.sampling.growth_factor,
            f"answers grow to {grown} tokens at step {config.sampling.growth_step}: must stay < "
            f"model.max_length={longest}",
        )
    if config.learner.tokens_per_microbatch < longest:
        raise refuse(
            "learner.tokens_per_microbatch",
            config.learner.tokens_per_microbatch,
            f"must be ≥ model.max_length={longest}: one sample is never split",
        )


def training_samples_the_policy_itself(config: Config) -> None:
    """Truncated or greedy sampling draws from another distribution than the one whose log-probabilities are kept."""
    sampling = config.sampling
    if not sampling.temperature > 0:
        raise refuse("sampling.temperature", sampling.temperature, "must be > 0 in training; eval.temperature may be 0")
    biased = "in training: cutting the tail would bias the importance ratios (the kept set is not replayed)"
    if sampling.top_p != 1.0:
        raise refuse("sampling.top_p", sampling.top_p, f"must be 1 {biased}")
    if sampling.top_k != 0:
        raise refuse("sampling.top_k", sampling.top_k, f"must be 0 {biased}")


def exact_staleness_is_repeatable(config: Config) -> None:
    """Exact mode promises a repeat bit for bit, which timing must not reach (I2b, I3)."""
    staleness = config.staleness
    if staleness.mode != "exact":
        return
    if config.generator.count > 1:
        raise refuse(
            "staleness.mode",
            "exact",
            f"needs generator.count=1, not {config.generator.count}: with several, timing decides which groups decode "
            "together, and so the rounding; or take staleness.mode=bound",
        )
    if staleness.on_violation == "drop":
        raise refuse(
            "staleness.on_violation",
            "drop",
            "not with staleness.mode=exact: drop takes groups in completion order, which timing decides; take wait",
        )
    if config.generator.max_in_flight < config.batch.groups:
        raise refuse(
            "generator.max_in_flight",
            config.generator.max_in_flight,
            f"must be ≥ batch.groups={config.batch.groups} with staleness.mode=exact: a batch is one wave",
        )


def code_from_outside_is_here(config: Config) -> None:
    """`module:function` names something that takes its settings, as its source tells: it is loaded where it is used."""
    reward, algo, search = config.reward, config.algo, config.search
    for name in reward.components:
        source = name if is_plugin(name) else f"offtrail.rewards.components.{name}:score"
        check(source, what="reward.weights")
        check_settings(
            source, reward.settings.get(name, {}), what=f"reward.settings.{name}", name=name, unless=TRL_MARK
        )
    if algo.loss:
        check(algo.loss, what="algo.loss")
        check_settings(algo.loss, algo.loss_settings, what="algo.loss_settings")
    if is_plugin(algo.advantage):
        check(algo.advantage, what="algo.advantage")
        check_settings(algo.advantage, algo.advantage_settings, what="algo.advantage_settings", given=3)
    for name in config.tracking.sinks:
        if not is_plugin(name) and name not in SINKS:
            must = f"must be of {', '.join(SINKS)}, or module:class{nearest_text(name, SINKS)}"
            raise refuse("tracking.sinks", config.tracking.sinks, must)
        source, settings = SINKS.get(name, name), config.tracking.sink_settings.get(name, {})
        check(source, what="tracking.sinks")
        check_settings(source, settings, what=f"tracking.sink_settings.{name}", name=name, given=1, given_to_class=1)
    for name in config.tracking.sink_settings:
        if name not in config.tracking.sinks:
            raise ConfigError(f"tracking.sink_settings.{name}: is in no tracking.sinks={config.tracking.sinks}; add it")
    if isinstance(search, OutsideConfig):
        check(search.name, what="search.name")
        check_settings(search.name, search.settings, what="search.settings", given=3, given_to_class=3)


def reward_names_the_tasks_there_are(config: Config) -> None:
    """A component that is for another task than those of the run would never be asked."""
    task = config.task
    known = sorted(task.weights) if isinstance(task, MixtureConfig) else [task.name]
    for name, limits in config.reward.only.items():
        for wanted in limits.get("tasks", known):
            if wanted not in known:
                near = nearest_text(wanted, known)
                why = f"task={task.name} has {', '.join(known)}{near}"
                raise refuse(f"reward.only.{name}.tasks", limits["tasks"], why)


def warmup_ends_before_training(config: Config) -> None:
    """The cosine of the cold start, and of the jobs that learn from examples, begins after its warm-up."""
    job, one = (config.job, config.supervised) if config.supervised else ("sft", config.sft)
    if one.warmup_steps >= one.steps:
        raise refuse(f"{job}.warmup_steps", one.warmup_steps, f"must be < {job}.steps={one.steps}")


def devices_are_known(config: Config) -> None:
    """`cpu` or a CUDA device; whether it is there, torch says when the role starts."""
    for key, device in (("learner.device", config.learner.device), ("engine.device", config.engine.device)):
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
            raise refuse(key, device, "must be cpu, cuda or cuda:N")


def head_is_no_wider_than_the_decoder(config: Config) -> None:
    """Rounded operands in the head alone would save a little and cost agreement with the engine (I5)."""
    learner = config.learner
    if learner.head_dtype == "bfloat16" and learner.dtype != "bfloat16":
        raise refuse("learner.head_dtype", "bfloat16", f"needs learner.dtype=bfloat16, not {learner.dtype}")


def adapters_can_be_trained(config: Config) -> None:
    """PEFT makes them; dropout has no place in a ratio of probabilities, and masks are not drawn the same again."""
    lora, key = config.learner.lora, "learner.lora.dropout"
    if lora.publish == "adapter" and not lora.rank:
        raise refuse("learner.lora.publish", "adapter", "needs learner.lora.rank, which is 0; or take merged")
    if lora.rank and config.head is not None:
        raise refuse("learner.lora.rank", lora.rank, f"is for job=rl and job=sft; take 0 in job={config.job}")
    if not lora.rank or config.job not in ("rl", "sft"):
        return
    if importlib.util.find_spec("peft") is None:
        raise refuse("learner.lora.rank", lora.rank, "needs peft: pip install 'offtrail[lora]', or take 0")
    if not lora.targets or ("all-linear" in lora.targets and lora.targets != ["all-linear"]):
        raise refuse("learner.lora.targets", lora.targets, "must be [all-linear], or names of layers, as [q_proj]")
    if lora.dropout and config.job == "rl":
        raise refuse(key, lora.dropout, "must be 0 in job=rl: ratios compare one policy with itself; job=sft takes it")
    if lora.dropout and (config.learner.activation_checkpointing or config.learner.ranks > 1):
        why = "needs learner.ranks=1 and no learner.activation_checkpointing: its masks would not be the same again"
        raise refuse(key, lora.dropout, why)


def liger_has_a_gpu(config: Config) -> None:
    """Triton kernels; auto falls back where they cannot run, always must not."""
    learner = config.learner
    if learner.liger != "always":
        return
    if learner.device == "cpu":
        raise refuse("learner.liger", "always", "needs learner.device=cuda; or take learner.liger=auto")
    if importlib.util.find_spec("liger_kernel") is None:
        raise refuse(
            "learner.liger", "always", "liger-kernel is not installed; pip install --no-deps liger-kernel, or take auto"
        )


def examples_are_put_before_questions_of_an_evaluation(config: Config) -> None:
    """Training and its evaluation ask plainly."""
    held = config.eval
    if held.few_shot and config.job != "eval":
        raise refuse("eval.few_shot", held.few_shot, f"is for job=eval, not job={config.job}, which asks plainly")
    if held.few_shot_path and not held.few_shot:
        raise refuse("eval.few_shot_path", held.few_shot_path, "needs eval.few_shot=k, how many examples are shown")


ASKING = (*QUESTIONING, "serve", "chat")
"""The jobs that load `checkpoint`."""


def what_the_job_reads_is_named(config: Config, later: Collection[str] = ()) -> None:
    """A job that asks a model, or sifts data, has some."""
    urls = isinstance(config.engine, SglangConfig) and config.engine.urls
    served = urls and config.job in QUESTIONING
    needless = served or (config.job == "label" and config.label.method == "exact")
    if config.job in ASKING and not config.checkpoint and not needless and "checkpoint" not in later:
        raise refuse(
            "checkpoint",
            "",
            f"job={config.job} needs a run directory, a checkpoint or a Hugging Face directory: checkpoint=DIR",
        )
    if config.job == "label" and not config.label.paths:
        raise ConfigError("label.paths=: job=label needs files of answers: label.paths=[FILE, …] (docs/data.md)")
    if config.job == "reject" and not config.reject.paths and "reject.paths" not in later:
        raise ConfigError("reject.paths=: job=reject needs files of answers: reject.paths=[FILE, …] (docs/data.md)")
    if config.job == "prefer" and not config.prefer.paths:
        raise ConfigError("prefer.paths=: job=prefer needs files of answers: prefer.paths=[FILE, …] (docs/data.md)")
    if config.head is not None and not config.head.path:
        what = "pairs or judged answers" if config.job == "reward_model" else "labelled steps"
        raise ConfigError(
            f"{config.job}.path=: job={config.job} needs a file of {what}: {config.job}.path=FILE "
            "(docs/reward_models.md)"
        )
    if config.job == "distill" and not config.distill.teacher and not urls:
        raise ConfigError(
            "distill.teacher=: job=distill needs a model or a file of its answers: distill.teacher=DIR or FILE, or "
            "engine=sglang engine.urls=[URL]"
        )


def a_checkpoint_is_served(config: Config) -> None:
    """job=eval, sample, label, serve and chat load `checkpoint`, and no other job reads it."""
    served = config.job in ASKING
    if config.checkpoint and not served:
        raise refuse(
            "checkpoint", config.checkpoint, f"job={config.job} does not read it; a start model is model.path=DIR"
        )
    if served and config.checkpoint and model_folder(config.checkpoint) is None:
        _model_is_here("checkpoint", config.checkpoint, RUN_OR_FOLDER)
    if config.job == "serve" and not isinstance(config.engine, SglangConfig):
        raise refuse("engine.name", config.engine.name, "job=serve needs sglang; for the terminal alone take job=chat")


def the_engines_own_rules_hold(config: Config) -> None:
    """They stand with their engine, which its configuration names: nothing here knows any engine."""
    if config.engine.rules:
        for rule in importlib.import_module(config.engine.rules).RULES:
            rule(config)


def weights_have_a_channel(config: Config) -> None:
    """Shared memory is Linux's /dev/shm, unless weights.dir names a folder; the others reach SGLang servers alone."""
    weights, engine = config.weights, config.engine
    if weights.channel == "shm" and not weights.dir and not Path("/dev/shm").is_dir():
        raise refuse("weights.channel", "shm", "this system has no /dev/shm; take weights.channel=disk")
    if weights.channel in ("shm", "disk"):
        return
    if config.job == "rl" and not isinstance(engine, SglangConfig):
        raise refuse("weights.channel", weights.channel, f"needs engine=sglang, not {engine.name}; take shm or disk")
    if weights.delta:
        raise refuse("weights.delta", True, f"is for weights.channel=shm or disk, not {weights.channel}")


def addresses_are_numeric(config: Config) -> None:
    """ZeroMQ and the servers bind to addresses of this host, not to names."""
    settings = flatten(config)
    for key in ("broker.address", "scorer.address", "serve.address", "engine.address"):
        try:
            address = ipaddress.ip_address(settings.get(key) or "127.0.0.1")
        except ValueError:
            raise refuse(key, settings[key], "must be an IP address, such as 127.0.0.1 or 0.0.0.0") from None
        if address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255"):
            raise refuse(key, settings[key], "is of many hosts; must be an address of this one, or 0.0.0.0")
        if "%" in str(address):
            raise refuse(key, settings[key], "must be an IP address without a zone: others dial it")


def a_lease_expires_before_the_run(config: Config) -> None:
    """A lost generator's groups must go to another before the broker's patience ends (I1, I4)."""
    broker = config.broker
    expiry = broker.heartbeat_seconds * broker.lease_heartbeats
    if broker.deadline_seconds <= expiry:
        raise refuse(
            "broker.deadline_seconds",
            broker.deadline_seconds,
            f"must be > broker.heartbeat_seconds·broker.lease_heartbeats = {expiry:g}: a lost lease expires first",
        )


RULES: tuple[Callable[[Config], None], ...] = (
    schema_is_this_one,
    numbers_are_in_range,
    names_stay_in_their_folder,
    made_model_has_whole_heads,
    a_pretrained_model_has_a_path,
    model_paths_are_here,
    files_of_lines_are_here,
    *scorers.RULES,
    programs_are_run,
    the_answer_is_looked_for_where_the_template_asks_for_it,
    gold_answers_are_enough,
    a_groups_programs_have_time_and_memory,
    objective_and_correction_fit,
    minibatches_divide_groups,
    references_are_refreshed_between_steps,
    groups_can_have_a_signal,
    every_rank_has_samples,
    answers_fit_the_model,
    training_samples_the_policy_itself,
    exact_staleness_is_repeatable,
    code_from_outside_is_here,
    reward_names_the_tasks_there_are,
    warmup_ends_before_training,
    devices_are_known,
    head_is_no_wider_than_the_decoder,
    adapters_can_be_trained,
    liger_has_a_gpu,
    examples_are_put_before_questions_of_an_evaluation,
    a_checkpoint_is_served,
    the_engines_own_rules_hold,
    weights_have_a_channel,
    addresses_are_numeric,
    a_lease_expires_before_the_run,
    *learnable.RULES,
)

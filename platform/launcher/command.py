"""The command: flags, then compose → run directory → launch. Nothing here imports torch.

    python launch.py (a checkout)   ┐
    offtrail (installed)            ├─► console ─► main
    python -m offtrail              ┘

Exit codes: 0 done, 2 a mistake of the user or of the environment (one line on stderr), 130 interrupted before the
start, and whatever `launch` returns.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import offtrail
from offtrail.core.problem import Problem
from offtrail.platform.config.compose import compose, stage_config, to_yaml
from offtrail.platform.config.errors import ConfigError, one_line, refuse
from offtrail.platform.config.keys import QUESTIONING, keys_of
from offtrail.platform.config.recipe import handed_keys, stages_of
from offtrail.platform.config.rundir import prepare
from offtrail.platform.config.schema import SINKS, Config
from offtrail.platform.config.validate import ASKING
from offtrail.platform.launcher.forks import fork_server
from offtrail.platform.model.folder import folder_of
from offtrail.platform.model.scoring import check_tokenizers, scorings
from offtrail.platform.runtime.device import without_gpu
from offtrail.platform.runtime.roles import roles_of

FLAGS = ("--help", "--version", "--dry-run")
Imitated = dict[tuple[str, str, str, str], list[Problem]]
"""The examples of each (sft.path, sft.prompt_field, sft.answer_field, task, which may leave some out)."""
# What the roles import, checked here so that a missing one is one line and not five tracebacks.
PACKAGES = (
    "accelerate aiohttp matplotlib msgspec numpy psutil pyarrow rich safetensors tensorboard torch transformers "
    "xxhash zmq"
)


def console() -> int:
    """The command line of this process; its exit code.

    Trap: a starter that ignores SIGCHLD hands that on, and the kernel then keeps nobody's exit status.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # η and · on a terminal that has only ASCII
    return main(sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Run the command line (without the program's name) and return its exit code."""
    try:
        return _run(argv)
    except ConfigError as error:
        print(f"offtrail: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    flags = {"--help" if argument == "-h" else argument for argument in argv if argument.startswith("-")}
    settings = [argument for argument in argv if not argument.startswith("-")]
    _refuse_unknown(flags)
    _require_current_directory()
    if "--help" in flags:
        from offtrail.platform.config.help import help_text

        show(help_text(settings, shutil.get_terminal_size((100, 24)).columns))
        return 0
    if "--version" in flags:
        show(f"offtrail {offtrail.__version__}\n")
        return 0
    config = compose(settings)
    if "--dry-run" in flags:
        for where, one, handed in runs_of(config):
            if one.job == "reject":
                with named(where):
                    require_rows(one, handed)
        show(to_yaml(config))
        return 0
    require_packages()
    require_inputs(config)
    if config.job == "chat":
        from offtrail.platform.launcher.chat import chat

        return chat(config)
    run_dir, lock = prepare(config)
    with lock:
        if any(spec.forks for spec in roles_of(config)):
            fork_server()  # it imports torch while this process prepares the run
        from offtrail.platform.launcher.jobs import launch

        return launch(config, run_dir)


def show(text: str) -> None:
    """Print to stdout; a reader that has seen enough (`| head`) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again


def _refuse_unknown(flags: set[str]) -> None:
    for flag in sorted(flags - set(FLAGS)):
        near = difflib.get_close_matches(flag, FLAGS, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(
            f"{flag}: unknown flag; flags: {', '.join(FLAGS)}{hint}; settings are key=value without dashes"
        )


def _require_current_directory() -> None:
    """Paths are made absolute from it, and code from outside the tree is looked for in it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current directory is gone; change to one that is there") from None


def require_packages() -> None:
    """Raise ConfigError when this Python lacks a package that a role imports."""
    missing = [name for name in PACKAGES.split() if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(
            f"{sys.executable} lacks {names}: install offtrail into it (pip install -e .), or `make demo`"
        )


def require_inputs(config: Config) -> None:
    """Raise ConfigError for what a run would need and not find here: of a recipe what any of its stages would, as far
    as no earlier one hands it on. What is worth a word goes to stderr, once.
    """
    said, examples = set[str](), Imitated()

    def note(text: str) -> None:
        if text not in said:
            said.add(text)
            print(f"offtrail: note: {one_line(text)}", file=sys.stderr)

    for where, one, handed in runs_of(config):
        with named(where):
            require_devices(one)
            require_scorers(one, handed)
            require_trackers(one)
            require_models(one, handed)
            if one.job in ("rl", "sft"):
                require_data(one, handed, examples, note)
            elif one.head is not None:
                require_labels(one)
            elif one.job == "eval":
                require_sets(one, note)
            elif one.job == "sample":
                require_problems(one, note)
            elif one.job == "label":
                require_answers(one, note)
            elif one.job == "reject":
                require_rows(one, handed)
            elif one.job == "prefer":
                require_pairs(one)


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """An error of one run begins with ``where`` it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def runs_of(config: Config) -> Iterator[tuple[str, Config, frozenset[str]]]:
    """(what an error begins with, configuration, keys that earlier stages set) of each run that this one makes."""
    stages = stages_of(config)
    if not stages:
        yield "", config, frozenset()
    for stage in stages:
        yield f"{stage.key}: ", stage_config(config, stage, {}), handed_keys(stage)


def require_devices(config: Config) -> None:
    """Raise ConfigError where a role's device cannot be here; what else torch has against it, the role says."""
    for key in {spec.device: None for spec in roles_of(config) if spec.device}:
        if reason := without_gpu(key, attrgetter(key)(config)):
            raise ConfigError(reason)


def require_scorers(config: Config, handed: Collection[str]) -> None:
    """Raise ConfigError where a model that scores cannot be read, does not read the tokens of the model whose answers
    it scores, or where the job asks none.
    """
    from offtrail.platform.config.checkpoints import model_folder

    models = scorings(config)
    if not models:
        return
    names = ", ".join(models)
    if config.job != "eval" and not any(spec.role == "scorer" for spec in roles_of(config)):
        raise refuse("scorer.models", f"{{{names}}}", f"job={config.job} asks none; leave it empty")
    if config.job == "rl" and config.scorer.refreshed:
        from offtrail.platform.launcher.refreshable import require_refresh

        require_refresh(config, models)
    key, given = ("checkpoint", config.checkpoint) if config.job == "eval" else ("model.path", config.model.path)
    folder = (model_folder(given) or folder_of(given)) if given and key not in handed else None
    if folder is not None:
        check_tokenizers(models.values(), folder)


def require_trackers(config: Config) -> None:
    """Raise ConfigError where the package of a tracker is not installed."""
    for name in config.tracking.sinks:
        if name in SINKS and importlib.util.find_spec(name) is None:
            raise refuse("tracking.sinks", name, "is not installed: pip install 'offtrail[trackers]', or leave it out")


def require_models(config: Config, handed: Collection[str] = ()) -> None:
    """Raise ConfigError where no role could read a model that the configuration names, or its engine compute it.
    ``handed``: keys that an earlier stage gives another value.
    """
    from offtrail.platform.config.checkpoints import model_folder
    from offtrail.platform.model.folder import check_model, check_tokenizer, folder_of
    from offtrail.platform.model.layouts import require_trained_head

    served = config.job in ASKING
    elsewhere = bool(getattr(config.engine, "urls", [])) and config.job in QUESTIONING  # its weights are
    for key, given in ((key.path, key.default) for key in keys_of(config).values() if key.path_kind == "model"):
        folder = (model_folder(given, key) or folder_of(given)) if given and key not in handed else None
        if folder is None:  # there is none to make, or it is refused by name already
            continue
        if not (elsewhere and key == "checkpoint"):
            check_model(key, given, folder, trained=not served)
        if key == ("checkpoint" if served else "model.path"):
            check_tokenizer(key, given, folder, config.prompt)
            if config.job == "reward_model" or (config.job == "prm" and config.prm.objective == "steps"):
                require_trained_head(key, given, folder)
            elif config.job != "serve" and not elsewhere:
                _require_architecture(config, key, given, folder)


def _require_architecture(config: Config, key: str, given: str, folder: Path) -> None:
    """Of what the local engine computes, the tensors are those of the config.json; another architecture is one for jobs
    without that engine, whose learner compares them when it loads.
    """
    from offtrail.platform.engines.spec import read_spec
    from offtrail.platform.model.folder import tensors_of

    rl = config.job == "rl"
    local = config.job in ("rl", *QUESTIONING, "chat") and (
        config.engine.name == "local" or (rl and config.eval.engine == "local")
    )
    try:
        spec = read_spec(folder)
        if local and rl:
            spec.check_length(config.model.max_length)
    except ValueError as error:
        if not local:
            return
        raise ConfigError(str(error).replace(f"model.path={folder}", f"{key}={given}")) from None
    tensors = tensors_of(key, given, folder)
    try:
        spec.check_tensors(tensors)
    except ValueError as error:
        raise refuse(key, given, f"its {error}; download or save it again") from None


def require_sets(config: Config, note: Callable[[str], None]) -> None:
    """Raise ConfigError when a set of job=eval cannot be read, or holds too few problems, or none that fits the model,
    or a component of its reward cannot be made. ``note`` hears of prompts that leave no room.
    """
    from offtrail.core.plugins import PluginError
    from offtrail.platform.launcher.prompts import check_held_out, counter_of_checkpoint
    from offtrail.rewards.base import RewardError
    from offtrail.tasks.base import TaskError

    try:
        sets = held_out_sets(config, note)
        count = None if config.run.resume else counter_of_checkpoint(config)
        if count is not None:
            check_held_out(config, sets, count, note)
    except (PluginError, RewardError, TaskError) as error:
        raise ConfigError(str(error)) from None


def held_out_sets(config: Config, note: Callable[[str], None]) -> dict[str, list[Problem]]:
    """Key → what is asked of each held-out set, its reward made for once. Raises PluginError, RewardError and
    TaskError; one of a set of eval.sets names it.
    """
    from offtrail.platform.config.sets import sets_of
    from offtrail.platform.launcher.prompts import checkpoint_chats
    from offtrail.rewards.base import RewardError
    from offtrail.rewards.registry import make_reward
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.registry import make_task, remarks_on

    found, through_chat = {}, bool(config.eval.few_shot) and checkpoint_chats(config)
    for one in sets_of(config):
        name = one.beside or one.label
        key = f"eval.sets.{name}" if name in config.eval.sets else "eval.prompts"
        try:
            task = make_task(one.config.task, config.run.seed)
            problems = task.held_out(one.prompts)
            if one.shots:
                found[f"{key} after eval.few_shot={one.shots}"] = one.put(problems, chats=through_chat)
                continue
            found[key] = problems
            make_reward(one.config.reward, task.verify)
        except (RewardError, TaskError) as error:
            if key == "eval.prompts":
                raise
            raise type(error)(f"{key}: {error}") from None
        if key != "eval.prompts" or config.job == "eval":
            for remark in remarks_on(task):
                note(remark if key == "eval.prompts" else f"{key}: {remark}")
    return found


def require_problems(config: Config, note: Callable[[str], None]) -> None:
    """Raise ConfigError when job=sample has not the problems or examples that it is to ask, or none that fits the
    model, or a component of the reward cannot be made. ``note`` hears of prompts that leave no room.
    """
    from offtrail.core.plugins import PluginError
    from offtrail.platform.launcher.prompts import asked_folder, check_asked, counter_of_checkpoint
    from offtrail.platform.model.folder import has_template
    from offtrail.rewards.base import RewardError
    from offtrail.rewards.registry import make_reward
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.prompting import questions
    from offtrail.tasks.registry import make_task, remarks_on

    folder = asked_folder(config)
    chats = folder is None or has_template("checkpoint", config.checkpoint, folder)
    try:
        task = make_task(config.task, config.run.seed)
        for remark in remarks_on(task):
            note(remark)
        make_reward(config.reward, task.verify)
        chats = chats and config.prompt.chat != "never"
        _, put = questions(task, config.sample, config.reward, config.run.seed, chats=chats)
        count = None if config.run.resume else counter_of_checkpoint(config)
        if count is not None:
            check_asked(config, put, count, note)
    except (PluginError, RewardError, TaskError) as error:
        raise ConfigError(str(error)) from None


def require_answers(config: Config, note: Callable[[str], None]) -> None:
    """Raise ConfigError when a file of job=label holds a row that cannot be labelled, or none that has steps, or a
    component of the reward cannot be made.
    """
    from offtrail.core.plugins import PluginError
    from offtrail.rewards.base import RewardError
    from offtrail.rewards.registry import make_reward
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.registry import make_task, remarks_on
    from offtrail.tasks.step_labels import require_steps

    try:
        task = make_task(config.task, config.run.seed)
        for remark in remarks_on(task):
            note(remark)
        make_reward(config.reward, task.verify)
        require_steps(config.label, task, config.task)
    except (PluginError, RewardError, TaskError) as error:
        raise ConfigError(str(error)) from None


def require_rows(config: Config, handed: Collection[str]) -> None:
    """Raise ConfigError when a file of job=reject holds a row that cannot be used."""
    from offtrail.core.plugins import PluginError
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.candidates import candidates_in, examples_of_mix, held_index
    from offtrail.tasks.registry import make_task

    given = config.reject
    read: list[Iterable[object]] = []
    if "reject.paths" not in handed:
        read.append(candidates_in(given, config.reward.main, config.task))
    if "reject.mix" not in handed:
        read += (examples_of_mix(name, entry) for name, entry in given.mix.items())
    try:
        for rows in read:
            deque(rows, maxlen=0)  # one by one: there may be more than memory holds
        task = make_task(config.task, config.run.seed)
        held_index(given, config.task, task.held_out(config.eval.prompts) if given.held_out else [])
    except (PluginError, TaskError) as error:
        raise ConfigError(str(error)) from None


def require_pairs(config: Config) -> None:
    """Raise ConfigError when a file of job=prefer holds a row that cannot be compared."""
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.pairs import answers_in

    try:
        deque(answers_in(config.prefer, config.reward.main, config.task), maxlen=0)
    except TaskError as error:
        raise ConfigError(str(error)) from None


def require_labels(config: Config) -> None:
    """Raise ConfigError when a file of labelled answers holds a row that cannot be used, or too few."""
    from offtrail.platform.learner.labelled_rows import read
    from offtrail.tasks.base import TaskError

    try:
        read(config)
    except TaskError as error:
        raise ConfigError(str(error)) from None


def require_data(config: Config, handed: Collection[str], examples: Imitated, note: Callable[[str], None]) -> None:
    """Raise ConfigError when the files of the task, or of examples, hold a line that cannot be used, or too few
    held-out problems, or none that fits the model; or a component of the reward, or the driver, cannot be made.
    ``note`` hears what else is to be said of them, and of ``examples``: those that earlier stages and this one imitate.
    """
    from offtrail.core.plugins import PluginError
    from offtrail.platform.launcher.prompts import check_examples, check_prompts, counter, remarks_on_trained
    from offtrail.rewards.base import RewardError
    from offtrail.search.registry import SearchError
    from offtrail.search.registry import check as check_driver
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.examples import read_examples, remark_on_held_out
    from offtrail.tasks.registry import (
        check_answered,
        check_promises,
        check_worked,
        from_outside,
        make_task,
        overlaps_of_examples,
        remarks_on,
        without_overlaps,
    )

    sft = config.sft
    try:
        task = make_task(config.task, config.run.seed)
        for remark in remarks_on(task):
            note(remark)
        count = None if config.run.resume else counter(config, handed)
        cold = not config.model.path and "model.path" not in handed
        if (config.job == "sft" or cold) and "sft.path" not in handed:
            if not sft.path:
                start = ", or a model to start from in model.path" if config.job == "rl" else ""
                check_worked(task, f"name a file of answers in sft.path{start}")
                if config.job == "rl":
                    check_answered(task, config.reward)
            else:
                given = (sft.path, sft.prompt_field, sft.answer_field, repr(config.task))
                if given not in examples:
                    read = read_examples(Path(sft.path), sft.prompt_field, sft.answer_field)
                    overlaps = overlaps_of_examples(task, read)
                    for overlap in overlaps:
                        note(overlap.remark())
                    examples[given] = without_overlaps(read, overlaps)
                if count is not None:
                    check_examples(config, examples[given], count, note)
        if config.job == "rl":
            sets = held_out_sets(config, note)
            for remark in remarks_on_trained(config, task, sets):
                note(remark)
            for imitated in examples.values():
                if remark := remark_on_held_out(imitated, [one for problems in sets.values() for one in problems]):
                    note(remark)
            shares = Counter(problem.task for problem in sets["eval.prompts"])
            for one in from_outside(task):
                check_promises(one, shares[one.name])
            check_driver(config.search)
            if count is not None:
                check_prompts(config, task, sets, count, note)
    except (PluginError, RewardError, SearchError, TaskError) as error:
        raise ConfigError(str(error)) from None

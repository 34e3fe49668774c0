"""Checkpoints: runs/NAME/checkpoints/step_N, a Hugging Face directory with the trainer's state beside it.

    model.safetensors, config.json, tokenizer…   opens with AutoTokenizer and the AutoModel of its head: ForCausalLM,
                                                 ForSequenceClassification or ForTokenClassification
    adapter/adapter_model.safetensors, …         learner.lora: the adapters alone, which PeftModel.from_pretrained opens
                                                 over the start model; model.safetensors is then the merged model
    scores.json                                  of a model that scores: how it is read (model/scores.py)
    trainer.json                                 step, updates, …
    trainer/optimizer.safetensors                AdamW's moments by parameter name, and torch's random state
    trainer/value.safetensors, value_optim…      of each further trained module (algo=ppo's critic) the same
    trainer/reference.safetensors                the reference policy, once it is no longer the start model
    window/v00000012.safetensors                 staleness.mode=exact: the versions that a resumed run publishes again
    manifest.json                                every file's size and hash, written last (runtime/contents.py)

Invariants: a directory named step_N is whole (written under another name, sealed by rename); a checkpoint that cannot
be written leaves the older ones as they are, and what could not be saved is known before the first update
(``rehearse``); nothing in it depends on the number of ranks: rank 0 writes full tensors, and every rank cuts its shards
out of them. The launcher has verified its files before a role begins from it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from offtrail.platform.config.checkpoints import steps_of
from offtrail.platform.config.schema import LoraConfig
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World, full, local, resharded, shard_like
from offtrail.platform.model import lora
from offtrail.platform.model.scores import ScoreSpec
from offtrail.platform.model.scores import write as write_scores
from offtrail.platform.runtime.contents import write_manifest
from offtrail.platform.weights import store

_HEADROOM = 1 << 24
STATE = "trainer"
"""A folder of its own: SGLang loads every safetensors file that lies beside the model's."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; one line with the path and the way out."""


@dataclass(frozen=True)
class TrainerState:
    """Where training stands: learner steps done, each trained module's optimizer updates by its name, and the update
    that the reference was refreshed at (0: it is the start model).
    """

    step: int
    updates: dict[str, int]
    refreshed: int = 0

    @classmethod
    def of(cls, step: int, trainer: Trainer[Any]) -> TrainerState:
        """The state of a trainer after ``step`` learner steps."""
        return cls(step, {name: t.updates for name, t in trainer.trained.items()}, trainer.refreshed)


def path_of(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step}"


def parameter_names(policy: nn.Module) -> list[str]:
    """Names as transformers has them: those of PackedModel without the ``model.`` that it adds."""
    return [name.removeprefix("model.") for name, _ in policy.named_parameters()]


def gather(policy: nn.Module) -> dict[str, Tensor]:
    """Full parameters under transformers' names, adapters merged into their weights; all ranks take part. With one rank
    the live ones, but for merged ones: read, then let go.
    """
    # Trap: gathered parameters that FSDP2 left at the root would be taken for the result, and a NumPy view of them
    # forbids it to free them.
    held = dict(zip(parameter_names(policy), resharded(policy).parameters(), strict=True))
    scaling = getattr(getattr(policy, "model", None), "lora_scaling", 1.0)

    def whole(name: str) -> Tensor:
        tensor, parts = full(held[name].detach()), lora.parts_of(name)
        if parts is None:
            return tensor
        a, b = (full(held[part].detach()) for part in parts)
        return lora.merged(tensor, a, b, scaling)

    return {lora.plain(name): whole(name) for name in held if not lora.is_adapter(name)}


def gather_adapters(policy: nn.Module) -> dict[str, Tensor]:
    """The full adapters alone; all ranks take part."""
    held = dict(zip(parameter_names(policy), resharded(policy).parameters(), strict=True))
    return {name: full(parameter.detach()) for name, parameter in held.items() if lora.is_adapter(name)}


def gather_optimizer(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's full moments and step counts, ``NAME.exp_avg`` and so on; all ranks take part. Empty before the first
    update.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in zip(parameter_names(policy), policy.parameters(), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{key}"] = full(value)
    return state


def write(
    run_dir: Path,
    state: TrainerState,
    model: Any,
    tokenizer: Any,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    window: Mapping[int, Path],
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    adapters: tuple[Mapping[str, Tensor], LoraConfig] | None = None,
    scores: ScoreSpec | None = None,
) -> Path:
    """Write and seal one checkpoint; rank 0 only. ``window``: published version → its file, copied as a whole;
    ``beside``: further safetensors files by their stem; ``adapters`` that stand merged in ``parameters``, and their
    settings; ``scores``: how a model that scores is to be read.

    Raises CheckpointError: not enough room, or the file system's own word; older checkpoints stay as they are.
    """
    target = path_of(run_dir, state.step)
    temporary = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        others = {} if beside is None else beside
        alone, settings = adapters or ({}, None)
        everything = [tensor for part in (parameters, moments, alone, *others.values()) for tensor in part.values()]
        versions = sum(store.whole_size(file.parent, version) for version, file in window.items())
        _check_room(target, versions + sum(t.numel() * t.element_size() for t in everything))
        temporary.mkdir()
        write_model(temporary, model, tokenizer, parameters)
        if scores is not None:
            write_scores(temporary, scores)
        if settings is not None:
            base = str(Path(model.name_or_path).resolve())
            lora.save(temporary / lora.FOLDER, alone, settings, base)
        random = {"torch_random_state": torch.get_rng_state()}
        state_folder = temporary / STATE
        state_folder.mkdir()
        _save({**moments, **random}, state_folder / "optimizer.safetensors")
        for stem, tensors in others.items():
            _save(tensors, state_folder / f"{stem}.safetensors")
        for version, file in window.items():
            (temporary / "window").mkdir(exist_ok=True)
            store.copy_whole(file.parent, version, temporary / "window" / file.name)
        (temporary / "trainer.json").write_text(json.dumps(vars(state)))
        write_manifest(temporary)
        _seal(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(target, error) from error
    return target


def rehearse(run_dir: Path, model: Any, tokenizer: Any, trainer: Trainer[Any]) -> None:
    """Write what a checkpoint holds beside tensors, and remove it again, before anything is trained; rank 0 only.

    Raises CheckpointError: not enough room for one checkpoint, what the file system says, or which file of the start
    model cannot be saved, or could not be opened again.
    """
    target = run_dir / "checkpoints"
    temporary = target / ".rehearsal"
    try:
        target.mkdir(exist_ok=True)
        # Parameters and AdamW's two moments of those that are trained, float32
        all_of = [p for t in trainer.trained.values() for p in t.module.parameters()]
        _check_room(target, sum((3 if p.requires_grad else 1) * 4 * p.numel() for p in all_of))
        for unfinished in target.glob(".*"):  # of earlier lives, which were killed while they wrote
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir()
        write_model(temporary, model, tokenizer, {})
        _check_names(temporary, model, trainer.module)
    except Exception as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(target: Path, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    place = "make room there"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        place = "make it writable"
    return CheckpointError(f"{target} cannot be written: {_words(error)}; {place}, or set run.dir elsewhere")


def _words(error: Exception) -> str:
    """On one line."""
    return " ".join(str(error).split())


def prune(run_dir: Path, newest: int, keep: int, spared: Sequence[int] = ()) -> None:
    """Remove all but the ``keep`` newest up to ``newest``, of which the broker knows, and the ``spared`` ones. Later
    ones are of an earlier life of the run that never told of them.
    """
    steps = steps_of(run_dir)
    kept = [step for step in steps if step <= newest][-keep:]
    for step in set(steps) - set(kept) - set(spared):
        shutil.rmtree(path_of(run_dir, step))


def read_state(path: Path) -> TrainerState:
    """Raises CheckpointError where the directory or its trainer.json is missing or damaged."""
    try:
        return TrainerState(**json.loads((path / "trainer.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint to go on from: {error}") from error


def restore_optimizer(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its moments (cut to this rank's shard), and torch its random state if the file has one."""
    saved = _load(file)
    if "torch_random_state" in saved:
        torch.set_rng_state(saved.pop("torch_random_state"))
    for name, parameter in zip(parameter_names(module), module.parameters(), strict=True):
        if f"{name}.step" in saved:
            optimizer.state[parameter] = {
                "step": saved[f"{name}.step"].to(parameter.device),
                **{key: shard_like(saved[f"{name}.{key}"], parameter.detach()) for key in MOMENTS},
            }


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file.parent.parent} is no checkpoint to go on from: {file.name}: {error}") from error


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, file)


def read_window(path: Path) -> dict[int, dict[str, Tensor]]:
    """The versions before this checkpoint that it carries, oldest first."""
    files = sorted((path / "window").glob("v*.safetensors"), key=lambda f: int(f.stem[1:]))
    return {int(file.stem[1:]): load_file(file) for file in files}


def save(
    run_dir: Path, world: World, state: TrainerState, model: Any, tokenizer: Any, trainer: Trainer[Any],
    window: Mapping[int, Path], settings: LoraConfig | None = None,
) -> Path | None:  # fmt: skip
    """Gather on all ranks, write on rank 0: its path there, None elsewhere. A failure to write raises on rank 0."""
    main, *others = trainer.trained.values()
    parameters, moments = gather(main.module), gather_optimizer(main.module, main.optimizer)
    beside = {}
    for other in others:
        beside[other.name] = gather(other.module)
        beside[f"{other.name}_optimizer"] = gather_optimizer(other.module, other.optimizer)
    if trainer.reference is not None and trainer.refreshed:
        beside["reference"] = gather(trainer.reference)
    alone = gather_adapters(main.module)
    if not world.main:
        return None
    adapters = (alone, settings) if alone and settings is not None else None
    return write(run_dir, state, model, tokenizer, parameters, moments, window, beside, adapters, trainer.scores)


def restore(path: Path, trainer: Trainer[Any]) -> None:
    """Everything of a checkpoint but the parameters of the model itself, which the trainer was made with.

    Raises CheckpointError where something is missing or unreadable.
    """
    state = read_state(path)
    if state.updates.keys() != trainer.trained.keys():
        raise CheckpointError(
            f"{path} is no checkpoint to go on from: it has {sorted(state.updates)}, but {sorted(trainer.trained)} are "
            "trained; resume with the configuration that it was written with"
        )
    main, *others = trainer.trained.values()
    trainer.refreshed, main.updates = state.refreshed, state.updates[main.name]
    if lora.adapters_of(main.module):
        restore_adapters(path / lora.FOLDER / lora.WEIGHTS, main.module)
    restore_optimizer(path / STATE / "optimizer.safetensors", main.module, main.optimizer)
    for other in others:
        other.updates = state.updates[other.name]
        restore_parameters(path / STATE / f"{other.name}.safetensors", other.module)
        restore_optimizer(path / STATE / f"{other.name}_optimizer.safetensors", other.module, other.optimizer)
    if trainer.reference is not None and trainer.refreshed:
        restore_parameters(path / STATE / "reference.safetensors", trainer.reference)


@torch.no_grad()
def restore_adapters(file: Path, module: nn.Module) -> None:
    """Cut a module's adapters out of a file in PEFT's names."""
    saved = _load(file)
    for name, parameter in zip(parameter_names(module), resharded(module).parameters(), strict=True):
        if lora.is_adapter(name):
            _take(saved, lora.to_peft(name), parameter, file)


def _take(saved: Mapping[str, Tensor], name: str, parameter: Tensor, file: Path) -> None:
    if name not in saved or saved[name].shape != parameter.shape:
        raise CheckpointError(f"{file} is no checkpoint to go on from: it lacks {name} of {tuple(parameter.shape)}")
    local(parameter).copy_(local(shard_like(saved[name], parameter.detach())))


@torch.no_grad()
def restore_parameters(file: Path, module: nn.Module) -> None:
    """Cut a module's parameters out of a file of ``gather``."""
    saved = _load(file)
    for name, parameter in zip(parameter_names(module), resharded(module).parameters(), strict=True):
        _take(saved, name, parameter, file)


def write_model(folder: Path, model: Any, tokenizer: Any, parameters: Mapping[str, Tensor]) -> None:
    """What ``save_pretrained`` writes, from gathered tensors; a tied head is written once. The class that config.json
    names is the model's own, which its head decides.

    Raises CheckpointError naming the file of the start model that transformers does not write.
    """
    start = Path(model.name_or_path)
    model.config.architectures = [type(model).__name__]
    with _saving(start / "config.json"):
        model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        with _saving(start / "generation_config.json"):
            # Not save_pretrained, which refuses what real models come with, such as a temperature without do_sample.
            model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    with _saving(start / "tokenizer_config.json"):
        tokenizer.save_pretrained(folder)  # after config.json and generation_config.json: it sets their stop tokens
    tensors = {name: value.contiguous().cpu() for name, value in parameters.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def _saving(file: Path) -> Iterator[None]:
    """What the disk does not take is raised as it is; all else has its cause in ``file``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise CheckpointError(
            f"{file} was loaded, but cannot be saved in a checkpoint: {_words(error)}; mend that file"
        ) from error


def _check_names(folder: Path, model: Any, module: nn.Module) -> None:
    """Raise CheckpointError where the model that config.json describes has not the parameters that will be written."""
    with torch.device("meta"):
        opened = type(model)(AutoConfig.from_pretrained(folder))
    described = {name: tuple(p.shape) for name, p in opened.named_parameters()}
    held = zip(parameter_names(module), module.parameters(), strict=True)
    written = {lora.plain(name): tuple(p.shape) for name, p in held if not lora.is_adapter(name)}
    if differing := sorted(name for name in described | written if described.get(name) != written.get(name)):
        raise CheckpointError(
            f"{model.name_or_path}: its parameters are not those of the {type(model).__name__} that its config.json "
            f"describes ({differing[0]} and {len(differing) - 1} more), so that no checkpoint could be opened again; "
            "merge an adapter (LoRA) into its model first, and take the whole model"
        )


def _check_room(target: Path, size: int) -> None:
    place = target if target.is_dir() else target.parent
    needed, free = size + _HEADROOM, shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed:,} bytes, {free:,} are free: make room there, or set run.dir elsewhere"
            "; older checkpoints are untouched"
        )


def _seal(temporary: Path, target: Path) -> None:
    """Rename into place. A resumed run may write a step again: the old one steps aside first."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)

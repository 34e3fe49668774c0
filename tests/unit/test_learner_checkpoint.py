"""Checkpoints: whole or not there, openable by transformers, and going on from one is as if nothing had happened."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offtrail.algos.correction_config import TisConfig
from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.checkpoint import CheckpointError, TrainerState
from offtrail.platform.learner.objectives import PolicyGradient
from offtrail.platform.learner.train import Trained, Trainer, adamw, warmup
from offtrail.platform.learner.world import World
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.contents import MANIFEST, cut_short, damage_of

ALONE = World(0, 1, torch.device("cpu"))
MakeBatch = Callable[..., Batch]


def build(path: Path) -> tuple[Any, Trainer[Batch]]:
    model, config = load_model(path), Config(correction=TisConfig())
    policy = Policy(model)
    optimizer = adamw(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.0)
    config.learner.optim.warmup_updates = 100
    objective = PolicyGradient(config)
    trained = Trained("policy", policy, objective, optimizer, warmup(config.learner.optim))
    return model, Trainer(ALONE, objective, [trained], Activity(), budget=500)


class Saved(NamedTuple):
    run_dir: Path
    path: Path
    model: Any
    trainer: Trainer[Batch]

    def save(self, step: int, window: dict[int, Path] | None = None) -> Path | None:
        state = TrainerState.of(step, self.trainer)
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        return checkpoint.save(self.run_dir, ALONE, state, self.model, tokenizer, self.trainer, window or {})


@pytest.fixture
def saved(tmp_path: Path, start_dir: Path, make_batch: MakeBatch) -> Saved:
    """One step trained and saved as step_1."""
    model, trainer = build(start_dir)
    trainer.step(0, make_batch(0))
    run = Saved(tmp_path, start_dir, model, trainer)
    assert run.save(1) == checkpoint.path_of(tmp_path, 1)
    return run._replace(path=checkpoint.path_of(tmp_path, 1))


def state(trainer: Trainer[Batch]) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in checkpoint.gather(trainer.module).items()}


def test_transformers_opens_it(saved: Saved, start_dir: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(saved.path)
    ids = torch.tensor([[5, 9, 30, 12]])
    plain = AutoModelForCausalLM.from_pretrained(start_dir)
    plain.load_state_dict(state(saved.trainer), strict=False)
    assert torch.equal(opened(ids).logits, plain(ids).logits)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(saved.path).decode([7, 8]) == "01"
    assert opened.generation_config.eos_token_id == plain.generation_config.eos_token_id


def test_going_on_from_it_gives_the_same_bits(saved: Saved, make_batch: MakeBatch) -> None:
    state_of = checkpoint.read_state(saved.path)
    assert state_of == TrainerState(step=1, updates={"policy": 2})
    _, resumed = build(saved.path)
    checkpoint.restore(saved.path, resumed)
    drawn = torch.rand(3)
    torch.manual_seed(99)
    checkpoint.restore(saved.path, resumed)
    assert torch.equal(drawn, torch.rand(3))
    for step in (1, 2):
        mine, theirs = saved.trainer.step(step, make_batch(step)), resumed.step(step, make_batch(step))
        assert mine.metrics == theirs.metrics
    ours, others = state(saved.trainer), state(resumed)
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_without_its_moments_the_way_would_differ(saved: Saved, make_batch: MakeBatch) -> None:
    _, forgetful = build(saved.path)
    forgetful.main.updates = 2
    saved.trainer.step(1, make_batch(1))
    forgetful.step(1, make_batch(1))
    ours, others = state(saved.trainer), state(forgetful)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_a_full_disk_is_told_and_older_ones_stay(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match=r"step_2 needs [\d,]+ bytes, 0 are free: make room .* run\.dir"):
        saved.save(2)
    assert [p.name for p in saved.path.parent.iterdir()] == ["step_1"]
    assert checkpoint.read_state(saved.path).step == 1


def test_a_disk_that_fills_meanwhile_leaves_nothing_half_written(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"step_2 cannot be written: .*No space left"):
        saved.save(2)
    assert [p.name for p in saved.path.parent.iterdir()] == ["step_1"]


# What can be loaded, but not saved, is known before the first update


def rehearsed(start: Path, run_dir: Path) -> Any:
    model, trainer = build(start)
    checkpoint.rehearse(run_dir, model, Text(start), trainer)
    return model


@pytest.fixture
def start(start_dir: Path, tmp_path: Path) -> Path:
    """A start model to spoil."""
    return shutil.copytree(start_dir, tmp_path / "start")


def test_a_rehearsal_leaves_nothing_of_its_own_nor_of_a_killed_learners(start: Path, tmp_path: Path) -> None:
    for name in (".step_3.writing", ".step_2.old", ".rehearsal", "step_2", "set_aside"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    rehearsed(start, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["set_aside", "step_2"]


def test_a_temperature_without_do_sample_is_saved_as_it_was_loaded(start: Path, tmp_path: Path) -> None:
    """Real models come so; transformers' own save_pretrained refuses it."""
    file = start / "generation_config.json"
    told = json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6, "top_k": 20}
    file.write_text(json.dumps(told))
    model = rehearsed(start, tmp_path)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    checkpoint.write_model(tmp_path / "out", model, Text(start), checkpoint.gather(Policy(model)))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (opened.temperature, opened.top_k, opened.eos_token_id) == (0.6, 20, told["eos_token_id"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            "tokenizer",
            r"start/tokenizer_config\.json was loaded, but cannot be saved .*: no such vocabulary; mend that",
        ),
        ("config", r"start/config\.json was loaded, but cannot be saved .*: no such field; mend that file"),
        ("adapter", r"its parameters are not those of the Qwen3ForCausalLM .* \(lora_A\.weight and 0 more\).*LoRA"),
        ("full", r"checkpoints needs [\d,]+ bytes, 10 are free: make room there, or set run\.dir elsewhere"),
        ("read-only", r"checkpoints cannot be written: .*Read-only.*; make it writable, or set run\.dir elsewhere"),
    ],
)
def test_each_cause_has_its_own_advice(
    spoil: str, words: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trainer = build(start)
    text = Text(start)

    def raises(error: Exception) -> Callable[..., None]:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        return fail

    if spoil == "tokenizer":
        monkeypatch.setattr(text.tokenizer, "save_pretrained", raises(ValueError("no such\nvocabulary")))
    elif spoil == "config":
        monkeypatch.setattr(model.config, "validate", raises(TypeError("no such field")), raising=False)
    elif spoil == "adapter":
        model.lora_A = torch.nn.Linear(2, 2, bias=False)
    elif spoil == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(Path, "mkdir", raises(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.rehearse(tmp_path, model, text, trainer)
    monkeypatch.undo()
    assert not list(tmp_path.glob("checkpoints/*"))


# Damage


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "trainer.json", "trainer/optimizer.safetensors", MANIFEST],
)
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(saved: Saved, name: str) -> None:
    assert damage_of(saved.path) == ""
    file = saved.path / name
    whole = file.read_bytes()
    for place in (len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert str(file) in damage_of(saved.path)
    file.write_bytes(whole[:-1])
    assert str(file) in damage_of(saved.path)
    file.unlink()
    assert damage_of(saved.path) == f"{file} is missing"
    file.write_bytes(whole)
    assert damage_of(saved.path) == ""
    shutil.rmtree(saved.path)
    assert damage_of(saved.path) == f"{saved.path} is missing"


def test_a_safetensors_file_that_was_cut_is_told_by_its_header(saved: Saved) -> None:
    file = saved.path / "model.safetensors"
    whole = file.read_bytes()
    assert cut_short(file) == ""
    for end, words in ((len(whole) - 8, "its header tells of"), (100, "tells of"), (4, "no safetensors header")):
        file.write_bytes(whole[:end])
        assert words in cut_short(file)
        assert str(file) in cut_short(file)
    file.write_bytes(b"\x10" + b"\0" * 7 + b"{" * 16)
    assert "no safetensors header" in cut_short(file)


def test_the_newest_are_kept(saved: Saved) -> None:
    for step in (2, 9, 10):
        saved.save(step)
    checkpoint.prune(saved.run_dir, 10, keep=2, spared=(0, 2))
    assert sorted(p.name for p in saved.path.parent.iterdir()) == ["step_10", "step_2", "step_9"]
    checkpoint.prune(saved.run_dir, 10, keep=2)
    assert sorted(p.name for p in saved.path.parent.iterdir()) == ["step_10", "step_9"]


def test_a_later_one_that_an_earlier_life_never_told_of_does_not_push_the_newest_out(saved: Saved) -> None:
    for step in (9, 5):
        saved.save(step)
    checkpoint.prune(saved.run_dir, 5, keep=1)
    assert [p.name for p in saved.path.parent.iterdir()] == ["step_5"]


def test_a_step_written_again_replaces_the_old(saved: Saved, make_batch: MakeBatch) -> None:
    saved.trainer.step(1, make_batch(1))
    saved.save(1)
    assert checkpoint.read_state(saved.path).updates == {"policy": 4}
    assert [p.name for p in saved.path.parent.iterdir()] == ["step_1"]


def test_the_window_of_versions_comes_back(saved: Saved, tmp_path: Path) -> None:
    from offtrail.platform.weights.store import Publisher

    publisher = Publisher(tmp_path / "channel", keep=4)
    checksums = {v: publisher.publish(v, {"w": torch.full((3,), float(v))}) for v in (9, 10, 11)}
    path = saved.save(12, {v: tmp_path / "channel" / f"v{v:08d}.safetensors" for v in (9, 10, 11)})
    publisher.close()
    assert path is not None
    again = Publisher(tmp_path / "channel", keep=4)
    window = checkpoint.read_window(path)
    assert list(window) == [9, 10, 11]
    assert {v: again.publish(v, tensors) for v, tensors in window.items()} == checksums
    again.close()
    assert checkpoint.read_window(saved.path) == {}


def test_what_is_no_checkpoint_is_named(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(CheckpointError, match="step_7 is no checkpoint to go on from"):
        checkpoint.read_state(checkpoint.path_of(tmp_path, 7))
    (saved.path / "trainer" / "optimizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="step_1 is no checkpoint to go on from"):
        checkpoint.restore(saved.path, saved.trainer)

"""What a launch refuses before its roles start: other inputs, a damaged checkpoint, a ledger that is not the run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from offtrail.algos.config import PpoConfig
from offtrail.algos.correction_config import CorrectionConfig
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.inputs import inputs_of
from offtrail.platform.launcher.resume import check_what_is_there
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.runtime.contents import write_manifest
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A task of two files, a start model, a critic's start and a reward from outside, all in tmp_path/in."""
    place = tmp_path / "in"
    for model in ("model", "critic"):
        (place / model).mkdir(parents=True)
        (place / model / "config.json").write_text("{}")
        (place / model / "model.safetensors").write_bytes(weights(7))
        (place / model / "README.md").write_text("read by nobody")
        (place / model / "compute.json").write_text("{}")
    (place / "train.jsonl").write_text('{"question": "1+1"}\n')
    (place / "held_out.jsonl").write_text('{"question": "2+2"}\n')
    (place / "my_reward_code.py").write_text("def brevity(): ...\n")
    config = Config(algo=PpoConfig())
    config.task = JsonlConfig(path=str(place / "train.jsonl"), eval_path=str(place / "held_out.jsonl"))
    config.model.path = str(place / "model")
    config.algo.critic.path = str(place / "critic")  # type: ignore[attr-defined]
    config.reward.weights = {"accuracy": 1.0, "my_reward_code:brevity": 0.5}
    return config


def weights(value: int) -> bytes:
    """A safetensors file of one byte."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value])


@pytest.fixture
def run_dir(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has begun: its start model is linked."""
    monkeypatch.syspath_prepend(tmp_path / "in")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "start").symlink_to(config.model.path)
    return run_dir


@pytest.fixture
def trained(config: Config, run_dir: Path) -> Path:
    """Two steps of it, both checkpointed."""
    check_what_is_there(config, run_dir)
    ledger = Ledger(run_dir / FILE)
    ledger.publish(0, "c0")
    for step in (1, 2):
        ledger.publish(step, f"c{step}")
        checkpoint(run_dir, step)
        ledger.checkpointed(step)
    ledger.close()
    config.run.resume = True
    return run_dir


def checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step}"
    (folder / "trainer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights(step))
    (folder / "trainer" / "optimizer.safetensors").write_bytes(weights(100 + step))
    write_manifest(folder)
    return folder


# Inputs


def test_every_input_that_a_key_names_is_found_and_nothing_that_nobody_reads(config: Config, run_dir: Path) -> None:
    found = {key: sorted(one.files) for key, one in inputs_of(config, run_dir).items()}
    assert found == {
        "task.path": ["train.jsonl"],
        "task.eval_path": ["held_out.jsonl"],
        "model.path": ["config.json", "model.safetensors"],
        "algo.critic.path": ["config.json", "model.safetensors"],
        "reward.weights.my_reward_code:brevity": ["my_reward_code.py"],
    }
    mixture = MixtureConfig(weights={"jsonl": 1.0}, settings={"jsonl": {"path": config.task.path, "template": "x"}})  # type: ignore[attr-defined]
    config.task = mixture
    assert "task.settings.jsonl.path" in inputs_of(config, run_dir)
    config.eval.sets = {"both": {"name": "mixture", "weights": mixture.weights, "settings": mixture.settings}}
    assert "eval.sets.both.settings.jsonl.path" in inputs_of(config, run_dir)
    (run_dir / "start").unlink()
    (run_dir / "start").mkdir()  # random weights of job=sft, made by the run itself
    assert "model.path" not in inputs_of(config, run_dir)


def test_unchanged_inputs_go_on_and_what_nobody_reads_may_change(config: Config, trained: Path) -> None:
    (Path(config.model.path) / "README.md").write_text("another")
    check_what_is_there(config, trained)


def test_a_folder_of_data_is_what_the_key_reads_of_it(config: Config, run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "set"
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"question": "1+1"}\n')
    config.task = JsonlConfig(path=str(folder), eval_path=str(folder))
    found = {key: sorted(one.files) for key, one in inputs_of(config, run_dir).items() if key.startswith("task")}
    assert found == {"task.path": ["data/train-0.jsonl", "data/train-1.jsonl"], "task.eval_path": ["data/test.jsonl"]}
    check_what_is_there(config, run_dir)
    (folder / "README.md").write_text("read by nobody")
    config.run.resume = True
    check_what_is_there(config, run_dir)
    (folder / "data/train-2.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"^task.path=.*train-2.jsonl is new \(its hash is in the ledger"):
        check_what_is_there(config, run_dir)
    (folder / "data/train-2.jsonl").unlink()
    (folder / "data/train-1.jsonl").write_text('{"question": "1+2"}\n')
    with pytest.raises(ConfigError, match=r"^task.path=.*train-1.jsonl is not what the run began with"):
        check_what_is_there(config, run_dir)


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("task.path", "train.jsonl"),
        ("task.eval_path", "held_out.jsonl"),
        ("model.path", "model/config.json"),
        ("model.path", "model/model.safetensors"),
        ("algo.critic.path", "critic/model.safetensors"),
        ("reward.weights.my_reward_code:brevity", "my_reward_code.py"),
    ],
)
def test_a_resume_over_another_input_is_refused_and_over_the_old_one_goes_on(
    key: str, file: str, config: Config, trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in" / file
    before = path.read_bytes()
    path.write_bytes(weights(8) if path.suffix == ".safetensors" else before + b"\n")
    with pytest.raises(ConfigError, match=rf"^{key}=.*{file} is not what the run began with .*; put back .* new run"):
        check_what_is_there(config, trained)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"^{key}=.* is gone"):
        check_what_is_there(config, trained)
    path.write_bytes(before)
    check_what_is_there(config, trained)


def test_a_file_that_a_key_has_got_since_is_another_input(config: Config, trained: Path, tmp_path: Path) -> None:
    config.sft.path = str(tmp_path / "in" / "held_out.jsonl")
    with pytest.raises(ConfigError, match=r"^sft\.path=.*held_out\.jsonl is new .*put back what was there"):
        check_what_is_there(config, trained)


def test_a_file_that_a_model_has_got_since_is_another_model(config: Config, trained: Path) -> None:
    (Path(config.model.path) / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=r"^model\.path=.*chat_template\.jinja is new"):
        check_what_is_there(config, trained)


def test_weights_whose_copy_was_cut_are_refused_before_the_first_launch(config: Config, run_dir: Path) -> None:
    file = Path(config.model.path) / "model.safetensors"
    file.write_bytes(weights(7)[:-1])
    with pytest.raises(ConfigError, match=r"^model\.path=.*model\.safetensors has .* bytes, its header tells of"):
        check_what_is_there(config, run_dir)
    config.model.path = ""  # a cold start in the cache
    with pytest.raises(
        ConfigError, match=rf"^model\.path=: .*was cut or damaged; delete {file.parent}, and it is made"
    ):
        check_what_is_there(config, run_dir)
    assert not (run_dir / FILE).exists()


# Settings


def test_a_resume_over_an_edited_configuration_is_refused_and_over_the_old_one_goes_on(
    config: Config, trained: Path
) -> None:
    config.correction.cap, config.batch.groups = 3.0, 7  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError,
        match=r"^correction\.cap=3\.0: .*run/config\.yaml was edited, the run began with 2\.0 \(also: batch\.groups=7, "
        r"was 16\), .*; put back what was there, or start a new run",
    ):
        check_what_is_there(config, trained)
    config.correction.cap, config.batch.groups = 2.0, 16  # type: ignore[attr-defined]
    config.correction, kept = CorrectionConfig(), config.correction
    with pytest.raises(
        ConfigError, match=r"^correction\.name=none: .* began with tis \(also: .*correction\.cap=\(absent\), was 2\.0"
    ):
        check_what_is_there(config, trained)
    config.correction = kept
    check_what_is_there(config, trained)


def test_what_may_change_at_a_resume_may_and_so_may_the_place_of_an_input(
    config: Config, trained: Path, tmp_path: Path
) -> None:
    config.learner.steps, config.learner.optim.lr, config.generator.count = 99, 1e-5, 3
    config.task.eval_path = str(Path(config.task.eval_path).rename(tmp_path / "held_out.jsonl"))  # type: ignore[attr-defined]
    check_what_is_there(config, trained)


# The ledger


def test_a_missing_or_empty_ledger_beside_checkpoints_is_refused(config: Config, trained: Path) -> None:
    ledger = trained / FILE
    before = ledger.read_bytes()
    for spoil, words in (
        (ledger.unlink, "is missing, beside 2 checkpoints up to step_2"),
        (ledger.touch, "is empty"),
        (lambda: Ledger(ledger).close(), "ends at version -1, .*it was emptied, or is an older copy"),
    ):
        spoil()
        with pytest.raises(ConfigError, match=rf"^run\.resume=true: .*{words}.*restore it, or start .*step_2"):
            check_what_is_there(config, trained)
    ledger.write_bytes(before)
    check_what_is_there(config, trained)


# Checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_its_files_name_with_the_older_one_that_is_whole(
    name: str, config: Config, trained: Path
) -> None:
    file = trained / "checkpoints" / "step_2" / name
    file.write_bytes(file.read_bytes()[:-2] + b"!!")
    with pytest.raises(ConfigError, match=rf"^run\.resume=true: .*step_2/{name} .*run\.resume_from=step_1, which"):
        check_what_is_there(config, trained)
    config.run.resume_from = "step_1"
    check_what_is_there(config, trained)
    ledger = Ledger(trained / FILE)
    assert ledger.checkpoint == 1
    ledger.close()
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["set_aside", "step_1"]
    assert (trained / "checkpoints" / "set_aside" / "step_2" / name).is_file()


def test_without_any_whole_one_the_start_model_is_left(config: Config, trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints" / "step_2")
    (trained / "checkpoints" / "step_1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step_2 is missing; restore it, or .* run\.resume_from=step_0, which"):
        check_what_is_there(config, trained)
    config.run.resume_from = "step_1"
    with pytest.raises(ConfigError, match=r"^run\.resume_from=step_1: .*step_1/model\.safetensors has 0 bytes"):
        check_what_is_there(config, trained)
    config.run.resume_from = "step_0"
    check_what_is_there(config, trained)


def test_a_checkpoint_that_the_ledger_never_heard_of_is_not_gone_on_from(config: Config, trained: Path) -> None:
    checkpoint(trained, 3)  # sealed, and killed before it could be told
    check_what_is_there(config, trained)
    config.run.resume_from = "step_3"
    with pytest.raises(ConfigError, match=r"^run\.resume_from=step_3: the newest .* the ledger knows is step_2"):
        check_what_is_there(config, trained)

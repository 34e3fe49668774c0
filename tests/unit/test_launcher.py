"""The launcher around its roles: what it removes, how it ends, and what it says. Fake processes, no torch in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.context import remove_shared_memory, weights_folder
from offtrail.platform.weights.store import Publisher


@pytest.fixture
def config() -> Config:
    """Quiet."""
    config = Config()
    config.tracking.progress, config.tracking.tensorboard = "off", False
    return config


# What is removed


def test_weights_dir_keeps_everything_that_is_not_the_channels(config: Config, tmp_path: Path) -> None:
    place, run_dir = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    (place / "thesis.tex").write_text("mine")
    config.weights.dir = str(place)
    folder = weights_folder(config, run_dir)
    assert folder.parent == place
    publisher = Publisher(folder)
    publisher.publish(3, {"w": torch.zeros(2)})
    publisher.pin(3)
    publisher.close()
    (folder / "writing" / ".tmpXYZ").write_text("unfinished")
    (folder / "notes.txt").write_text("mine too")
    remove_shared_memory(config, run_dir)
    assert sorted(path.name for path in place.rglob("*")) == sorted([folder.name, "notes.txt", "thesis.tex"])
    (folder / "notes.txt").unlink()
    remove_shared_memory(config, run_dir)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]
    remove_shared_memory(config, run_dir)  # nothing left is no error


def test_a_channel_on_disk_stays_for_a_resume(config: Config, tmp_path: Path) -> None:
    config.weights.channel = "disk"
    for place in ("", str(tmp_path / "place")):
        config.weights.dir = place
        folder = weights_folder(config, tmp_path / "run")
        Publisher(folder).publish(1, {"w": torch.zeros(2)})
        remove_shared_memory(config, tmp_path / "run")
        assert (folder / "v00000001.safetensors").is_file()


def test_two_runs_never_share_a_folder(config: Config, tmp_path: Path) -> None:
    for place in ("", str(tmp_path)):
        config.weights.dir = place
        folders = {weights_folder(config, tmp_path / name) for name in ("a", "b")}
        assert len(folders) == 2

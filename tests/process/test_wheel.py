"""The built wheel, away from the checkout: it holds everything, and its command runs from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "learner.steps=1 learner.minibatches=1 batch.groups=2 batch.group_size=2 eval.prompts=4 sft.steps=2 "
    "sft.warmup_steps=1 tracking.progress=off tracking.tensorboard=false"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout installed into it."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"  # a copy: setuptools would take what an earlier build has left beside it
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(checkout)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    [wheel] = folder.glob("offtrail-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=240
    )
    return folder


def offtrail(installed: Path, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(installed / "site"), "OFFTRAIL_CACHE": str(installed / "cache")}
    script = installed / "site" / "bin" / "offtrail"
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)


def test_the_wheel_holds_the_packages_the_options_and_the_license(installed: Path) -> None:
    [wheel] = installed.glob("offtrail-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"offtrail/{path.relative_to(ROOT)}"
        for room in ("ablations", "algos", "configs", "core", "platform", "rewards", "search", "tasks")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert sources - names == set()
    assert "offtrail/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_composes_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = offtrail(installed, tmp_path, "task=addition", "staleness.max=8", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "max_digits: 4" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.prove
def test_the_command_trains_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = offtrail(installed, tmp_path, "run.name=first", *SMALL.split())
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["groups/lost"]) == ("completed", 1, 0)

"""No attack of tests/attacks is scored as right, and none leaves anything: as whoever runs this, and as nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.watch import ATTACKS, META, OF_TESTS, PLENTY, RIGHT, Watch, attacked, watching
from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.judge import judge
from offtrail.rewards.sandbox.walls import landlock_abi

ROOT = Path(__file__).parents[2]
NOBODY = 65534
WALLS = [
    pytest.param("landlock", marks=pytest.mark.skipif(landlock_abi() < 1, reason="the kernel has no Landlock")),
    pytest.param("bwrap", marks=pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")),
]


@pytest.fixture(scope="module", params=WALLS)
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    with Box(request.param, PLENTY) as box:
        yield box


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    with watching(tmp_path_factory.mktemp("attacked")) as watch:
        yield watch


@pytest.mark.parametrize("name", [*ATTACKS, *OF_TESTS])
def test_an_attack_scores_nothing_and_leaves_nothing(box: Box, watch: Watch, name: str):
    judged, harm = attacked(box, watch, name)
    assert judged.score == 0
    assert judged.reason != "ok"
    assert harm == []


def test_the_box_still_works_after_them(box: Box):
    box.limits = PLENTY
    assert judge(box, RIGHT, META).reason == "ok"
    assert judge(box, "def f(x): return 0", META).reason.startswith("wrong")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("read_secret", "gave 'LEAK"),
        ("read_env", "gave 'LEAK"),
        ("signal_parent", "signalled"),
        ("network_tcp", "connected over TCP"),
        ("unix_abstract", "connected over abstract"),
        ("subprocess", "wrote sub"),
        ("disk_fill", "wrote token"),
    ],
)
def test_without_walls_the_same_programs_do_harm_and_it_is_seen(watch: Watch, name: str, told: str):
    """So that the tests above can fail."""
    program = watch.aimed(ATTACKS[name]) + "\nprint(f(2))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=watch.marks, capture_output=True, text=True, timeout=60, check=True)
    from attacks.watch import SEEN

    SEEN.append(done.stdout)
    harm = watch.harm()
    for path in watch.marks.iterdir():
        path.unlink()
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        Path(folder, watch.token).unlink(missing_ok=True)
    assert any(one.startswith(told) for one in harm), harm


def python_for(user: int) -> str:
    """A Python that a user can start and that finds the attacks; "" where there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            if not as_user(user, python, "-c", "import attacks.watch").returncode:
                return python
        except PermissionError:
            pass
    return ""


def as_user(user: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    return subprocess.run(
        command, user=user, group=user, extra_groups=[], cwd="/", env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; the tests above ran as one")
@pytest.mark.parametrize(
    ("wall", "user"),
    [
        ("landlock", NOBODY),
        *(pytest.param(*case, marks=pytest.mark.prove) for case in (("landlock", 0), ("bwrap", NOBODY), ("bwrap", 0))),
    ],
)
def test_as_another_user_and_as_root_with_a_python_for_all(wall: str, user: int):
    """As root with a Python that all may read, each run has a user of its own; else it stays root's, without power."""
    if (wall == "landlock" and landlock_abi() < 1) or (wall == "bwrap" and not shutil.which("bwrap")):
        pytest.skip(f"{wall} is not here")
    if not (python := python_for(NOBODY)):
        pytest.skip(f"user {NOBODY} can read no Python, or not this checkout")
    done = as_user(user, python, "-B", str(ROOT / "tests" / "attacks" / "watch.py"), wall)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["uid"], said["found"], said["alive"]) == (user, {}, "ok")

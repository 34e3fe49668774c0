"""The guard of the layout: the root's folders are offtrail's packages, and `platform/` never shadows Python's own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ROOT / "src" / "offtrail"
PACKAGES = ("ablations", "algos", "core", "platform", "rewards", "search", "tasks")
FOLDERS = (*PACKAGES, "configs")


def python(code, cwd, *flags, path=None):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_is_a_relative_link(name):
    link = LINKS / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{name}"
    assert link.is_dir()


def test_there_are_no_other_links():
    assert sorted(path.name for path in LINKS.iterdir() if path.is_symlink()) == sorted(FOLDERS)


def test_platform_alone_has_no_init():
    """With an __init__.py, `import platform` from the root would find the folder, and `import torch` would die."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    folders = [ROOT / name for name in PACKAGES if name != "platform"]
    folders += [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_dir()]
    bare = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if any(folder.glob("*.py")) and not (folder / "__init__.py").exists()
    ]
    assert bare == []


STANDARD = f"""
import platform, sys
assert platform.__file__ == {str(Path(sysconfig.get_path("stdlib")) / "platform.py")!r}, platform.__file__
assert platform.python_version()
try:
    import platform.config
except ModuleNotFoundError as error:
    assert "'platform' is not a package" in str(error)
else:
    raise AssertionError("platform.config was importable")
"""


@pytest.mark.parametrize("where", ["root", "links", "elsewhere"])
def test_platform_is_the_standard_librarys(where, tmp_path):
    cwd = {"root": ROOT, "links": LINKS.parent, "elsewhere": tmp_path}[where]
    for path in (None, LINKS.parent, ROOT):
        done = python(STANDARD, cwd, path=path)
        assert done.returncode == 0, done.stderr


def test_torch_imports_from_the_root():
    done = python("import torch; print(torch.__file__)", ROOT, path=LINKS.parent)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(ROOT / "torch"))


def test_offtrail_platform_imports_from_anywhere(tmp_path):
    code = (
        "import offtrail.platform.config.schema, offtrail.core, offtrail.tasks.config; import platform; platform.node()"
    )
    for cwd in (ROOT, tmp_path):
        done = python(code, cwd, path=LINKS.parent)
        assert done.returncode == 0, done.stderr


def test_children_of_spawn_find_the_standard_platform():
    """A spawned child starts with the root in front of sys.path; it must still get the standard library's module."""
    code = (
        "import multiprocessing, platform\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.apply(platform.python_version) == platform.python_version()\n"
    )
    done = python(code, ROOT, path=LINKS.parent)
    assert done.returncode == 0, done.stderr


def test_links_that_became_text_files_say_what_to_do(tmp_path):
    """A checkout without symbolic links (Windows, some archives) holds each link as a small text file."""
    broken = tmp_path / "offtrail"
    broken.mkdir()
    shutil.copy(LINKS / "__init__.py", broken)
    for name in FOLDERS:
        (broken / name).write_text(f"../../{name}")
    done = python("import offtrail", tmp_path, path=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: offtrail: the links in src/offtrail/ are missing")
    assert "core.symlinks=true" in last


def test_launch_from_a_checkout_without_links_is_one_line(tmp_path):
    shutil.copy(ROOT / "launch.py", tmp_path)
    (tmp_path / "src" / "offtrail").mkdir(parents=True)
    shutil.copy(LINKS / "__init__.py", tmp_path / "src" / "offtrail")
    done = subprocess.run(
        [sys.executable, "launch.py", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("offtrail: error: the links in src/offtrail/ are missing")
    assert done.stderr.count("\n") == 1
    assert "install" in done.stderr


FLOORS = (
    "config wire", "ledger weights", "runtime", "tracking model verifier", "engines",
    "broker scorer generator evaluator", "learner", "refresher", "launcher",
)  # fmt: skip
"""The rooms of platform/, floor by floor: a room imports from its own floor's left, or from floors below."""


def imports_of(path):
    """Absolute imports of offtrail, those inside functions too, as tuples of names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = tuple(node.module.split("."))
            yield from ((*parts, alias.name) if len(parts) == 2 else parts for alias in node.names)


def test_no_import_inside_the_platform_runs_back_up():
    order = " ".join(FLOORS).split()
    assert sorted(order) == sorted(path.name for path in (ROOT / "platform").iterdir() if any(path.glob("*.py")))
    upwards = [
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for room in order
        for path in (ROOT / "platform" / room).rglob("*.py")
        for name in imports_of(path)
        if name[:2] == ("offtrail", "platform") and order.index(name[2]) > order.index(room)
    ]
    assert upwards == []


def test_the_floor_test_sees_an_import_inside_a_function(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from offtrail.platform.launcher.jobs import launch\n")
    assert list(imports_of(file)) == [("offtrail", "platform", "launcher", "jobs")]


def test_only_the_platform_knows_processes_and_sockets():
    """algos, search, rewards and tasks import core and themselves, never the platform; core imports none of them. Tasks
    compare answers by the graders of rewards.
    """
    allowed = {
        "core": {"core"},
        "algos": {"algos", "core"},
        "tasks": {"tasks", "core", "rewards"},
        "rewards": {"rewards", "core"},
        "search": {"search", "core"},
    }
    wrong = [
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for room, rooms in allowed.items()
        for path in (ROOT / room).rglob("*.py")
        for name in imports_of(path)
        if name[0] == "offtrail" and len(name) > 1 and name[1] not in rooms
    ]
    assert wrong == []


STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN)\s")


def test_sql_stands_in_one_room():
    """What I1 says of the ledger's rows is read and changed in platform/ledger alone."""
    found = [
        f"{path.relative_to(ROOT)}: {node.value[:40]}"
        for path in (ROOT / "platform").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and STATEMENT.match(node.value)
    ]
    assert len(found) > 20
    assert [line for line in found if not line.startswith("platform/ledger/")] == []

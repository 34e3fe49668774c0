"""core/plugins.py: `module:attribute` from outside the tree, and one line for every way in which it can be wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offtrail.core.plugins import PluginError, bind, check, check_settings, is_plugin, load

SOURCE = """
from math import tau as circle
LIMIT, other = 3, 4
def brevity(): ...
class Judge: ...
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, as the current directory, with a module and a package of names of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "users_code.py").write_text(SOURCE)
    (tmp_path / "users_broken.py").write_text("def f(): ...\nraise RuntimeError('not\\ntoday')\n")
    (tmp_path / "users_lacking.py").write_text("import no_such_package_at_all\ndef f(): ...\n")
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "__init__.py").write_text("")
    (tmp_path / "users_package" / "inner.py").write_text("def f(): return 7\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]


def test_a_module_beside_the_launch_is_found_and_one_in_a_package():
    assert load("users_code:LIMIT", what="k") == 3
    assert load("users_package.inner:f", what="k")() == 7
    for name in ("LIMIT", "other", "circle", "brevity", "Judge"):
        check(f"users_code:{name}", what="k")


def test_an_installed_module_needs_no_folder():
    assert load("math:tau", what="k") == pytest.approx(6.283185307)


@pytest.mark.parametrize("take", [load, check])
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("users_code", "reward.weights=users_code: must be package.module:attribute, such as my_code:weights"),
        ("users_code:", "must be package.module:attribute"),
        ("../users_code:f", "must be package.module:attribute"),
        ("users_cod:brevity", "no module users_cod in this Python"),
        ("users_package.outer:f", "no module users_package.outer in this Python"),
        ("users_code.inner:f", "no module users_code.inner in this Python"),
        ("users_code:brevty", "reward.weights=users_code:brevty: users_code has no brevty; nearest: brevity"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_way_out(take, name, line):
    with pytest.raises(PluginError) as error:
        take(name, what="reward.weights")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_import_raises_is_told():
    with pytest.raises(PluginError, match="importing users_broken raised RuntimeError: not today"):
        load("users_broken:f", what="k")
    with pytest.raises(PluginError, match=r"importing users_lacking raised ModuleNotFoundError: .*no_such_package"):
        load("users_lacking:f", what="k")


def test_a_check_runs_nothing_of_the_module():
    check("users_broken:f", what="k")
    assert "users_broken" not in sys.modules


def test_names_bound_where_the_source_cannot_tell_are_left_to_loading(folder):
    (folder / "users_late.py").write_text("if True:\n    def f(): return 1\n")
    check("users_late:g", what="k")
    assert load("users_late:f", what="k")() == 1


def test_a_users_file_never_takes_the_place_of_pythons(folder):
    (folder / "colorsys.py").write_text("raise SystemExit('the wrong one')\n")
    code = "from offtrail.core.plugins import load; load('users_code:LIMIT', what='k'); import colorsys; print(1)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_only_a_colon_makes_a_plugin():
    assert is_plugin("a:b")
    assert not is_plugin("accuracy")


SETTINGS = """
import functools
def loss(tokens, width=1, *, deep): ...
def anything(tokens, **settings): ...
def bare(tokens): ...
def estimator(rewards, group_of, lengths, limit=.5): ...
class Judge:
    def __init__(self, strict, mood=1): ...
class Driver:
    def __init__(self, lease, sampling, generator, more=1): ...
class Plain: ...
@functools.cache
def decorated(tokens): ...
made = functools.partial(loss, width=2)
"""


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("loss", {"deep": 1}, ""),
        ("loss", {"deep": 1, "width": 2}, ""),
        ("loss", {"deep": 1, "widht": 2}, "k.widht=2: no such setting; m:loss takes width, deep; nearest: width"),
        ("loss", {"width": 2}, "k.deep: is needed by m:loss; set it"),
        ("anything", {"x": 1}, ""),
        ("bare", {"tokens": 1}, "k.tokens=1: no such setting; m:bare takes none"),
        ("estimator", {"limit": 1}, ""),
        ("estimator", {"lengths": 1}, "k.lengths=1: no such setting; m:estimator takes limit"),
        ("Judge", {"strict": 1, "mood": 2}, ""),
        ("Judge", {}, "k.strict: is needed by m:Judge; set it"),
        ("Judge", {"strict": 1, "self": 2}, "k.self=2: no such setting; m:Judge takes strict, mood"),
    ],
)
def test_settings_are_checked_by_the_source_as_by_the_loaded_function(
    folder: Path, name: str, settings: dict[str, int], line: str
):
    (folder / "users_settings.py").write_text(SETTINGS)
    given = 3 if name == "estimator" else 1
    source = f"users_settings:{name}"

    def by_source():
        check_settings(source, settings, what="k", name=f"m:{name}", given=given)

    def by_loading():
        bind(load(source, what="k"), settings, name=f"m:{name}", what="k", given=given)

    for look in (by_source, by_loading):
        if not line:
            look()
            continue
        with pytest.raises(PluginError) as error:
            look()
        assert str(error.value) == line


def test_the_settings_of_an_imported_function_are_checked_where_it_is_written(folder: Path):
    (folder / "users_settings.py").write_text(SETTINGS)
    (folder / "users_collection.py").write_text("from users_settings import loss as soft, estimator\n")
    with pytest.raises(PluginError, match=r"^k\.widht=2: no such setting; users_collection:soft takes width, deep"):
        check_settings("users_collection:soft", {"deep": 1, "widht": 2}, what="k")
    check_settings("users_collection:estimator", {"limit": 1}, what="k", given=3)


def test_what_the_source_does_not_show_is_left_to_the_load(folder: Path):
    (folder / "users_settings.py").write_text(SETTINGS)
    for name in ("Plain", "decorated", "made", "functools"):
        check_settings(f"users_settings:{name}", {"x": 1}, what="k")
    check_settings("users_settings:Driver", {"more": 2}, what="k", given_to_class=3)
    with pytest.raises(PluginError, match=r"k\.lease=2: no such setting; users_settings:Driver takes more"):
        check_settings("users_settings:Driver", {"lease": 2}, what="k", given_to_class=3)

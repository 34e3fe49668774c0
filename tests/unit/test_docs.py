"""What README and docs/ tell people to type: each command is run as far as `--dry-run`, each key in them exists."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offtrail.platform.config.compose import compose, options_of, to_yaml
from offtrail.platform.config.help import USAGE
from offtrail.platform.config.keys import GROUPS, Key, all_paths, keys_of, variant_keys
from offtrail.platform.config.recipe import stages_of
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.sglang import flags, versions
from offtrail.platform.launcher.command import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LANGUAGES = {"sh", "python", "yaml", "text"}
"""sh: commands, and nothing else; text: what no machine reads."""
NOT_RUN = {
    r"python3 -m pip install ": "needs a package index",
    r"export ": "sets the shell of another machine",
    r"benchmarks/gpu/bundle\.sh ": "downloads wheels",
}
"""What cannot be tried here, with the reason."""


def every_key() -> Iterator[Key]:
    yield from keys_of(Config()).values()
    yield from (key for variants in variant_keys().values() for keys in variants.values() for key in keys.values())


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        yield from ((page, code) for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language)


def commands() -> list[tuple[str, str]]:
    """(where it stands first, command without its comment), and those that --help shows; each once."""
    shell = [(page.name, code) for page, code in blocks("sh")]
    usage = "\n".join(line.strip() for line in USAGE.splitlines() if line.startswith("  python"))
    found: dict[str, str] = {}
    for name, code in [*shell, ("--help", usage)]:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.setdefault(shlex.join(words), name)
    return [(name, command) for command, name in found.items()]


def placeholders(folder: Path) -> None:
    """What the examples name: modules of docs/extending/, a model, sets, settings, a finished run."""
    for _, code in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code, encoding="utf-8")
    for model in (
        "models/Qwen2.5-0.5B-Instruct",
        "models/smollm2-135m-instruct",
        "models/prm",
        "runs/NAME/checkpoints/step_40",
        "runs/NAME/start",
        "runs/refreshed/scorers/prm/checkpoints/step_1",
    ):
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text("{}", encoding="utf-8")
    (folder / "runs" / "NAME" / "config.yaml").write_text(to_yaml(compose([])), encoding="utf-8")
    for name in ("gsm8k_train", "gsm8k_test", "math500", "aime24", "gpqa_diamond"):
        (folder / f"{name}.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    for name in ("samples", "general"):
        (folder / f"{name}.jsonl").write_text(
            '{"prompt": "1+1?", "answer": "2", "gold": "2", "reward": 1}\n', encoding="utf-8"
        )
    row = '{"text": "Double.", "code": "def f(x):\\n return 2*x", "test_list": ["assert f(1) == 2"]}\n'
    (folder / "mbpp.jsonl").write_text(row, encoding="utf-8")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "shots.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n', encoding="utf-8")
    row = '{"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n'
    (folder / "ifeval.jsonl").write_text(row, encoding="utf-8")
    (folder / "xstest.csv").write_text("type,prompt\nhomonyms,How do I kill a process?\n", encoding="utf-8")
    for name in ("cold_start", "general"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n', encoding="utf-8")
    for name in ("pairs", "steps"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "1+1?"}\n', encoding="utf-8")
    for run in ("asked", "warm", "labelled", "pairs"):
        (folder / "runs" / run).mkdir()
        row = '{"prompt": "1+1?", "answer": "<think>1+1=2</think>", "gold": "2", "labels": [true]}\n'
        (folder / "runs" / run / "data.jsonl").write_text(row, encoding="utf-8")
    (folder / "settings.yaml").write_text("learner: {steps: 9}\n", encoding="utf-8")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples' files, on a machine that has SGLang."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(flags, "find_spec", lambda name: object())
    monkeypatch.setattr(versions, "installed", lambda: "0.5.21")
    placeholders(tmp_path)
    return tmp_path


def dry_run(arguments: list[str]) -> int:
    """The real command, at least to its configuration; a run that it names can be resumed by a later one."""
    if "--help" in arguments or "--version" in arguments:
        return main(arguments)
    for argument in arguments:
        if argument.startswith("run.name=") and "run.resume=true" not in arguments:
            folder = Path("runs", argument.partition("=")[2])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(compose(arguments)), encoding="utf-8")
    return main([*arguments, *({"--dry-run"} - set(arguments))])


def check_benchmark(script: Path, arguments: list[str]) -> None:
    known = set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    common = ROOT / "benchmarks" / "common.py"
    known |= set(re.findall(r'"(--[\w-]+)"', common.read_text(encoding="utf-8")))
    assert {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} <= known


def check_command(command: str) -> None:
    """AssertionError for a command that does not run, or of a kind that nobody has thought of."""
    words = shlex.split(command)
    if any(re.match(pattern, command) for pattern in NOT_RUN):
        return
    program = words[:2]
    if program == ["python", "launch.py"]:
        assert dry_run(words[2:]) == 0
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif program[0] in ("python", "python3") and "benchmarks/" in program[1]:
        check_benchmark(ROOT / "benchmarks" / program[1].partition("benchmarks/")[2], words[2:])
    else:
        raise AssertionError("neither run here nor listed in NOT_RUN")


def test_every_block_says_what_it_is():
    assert [(p.name, n, c[:60]) for p in PAGES for n, c in FENCE.findall(p.read_text()) if n not in LANGUAGES] == []


def test_every_command_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    """In the order of the pages, since a run can be resumed that an earlier command has started."""
    found = commands()
    wrong = []
    for where, command in found:
        try:
            check_command(command)
        except (AssertionError, OSError) as error:
            wrong.append((where, command, str(error) or capsys.readouterr().err))
    assert wrong == []
    assert len(found) > 50


@pytest.mark.parametrize(
    "command",
    [
        "python launch.py task=jsnl",
        "python launch.py learner.stps=3",
        "python launch.py --help algos",
        "make demonstration",
        "python benchmarks/gpu/learner.py --arm",
        "python benchmarks/none.py",
        "docker run x",
    ],
)
def test_a_wrong_command_would_be_found(elsewhere: Path, command: str):
    with pytest.raises((AssertionError, OSError)):
        check_command(command)


def test_every_yaml_block_is_a_recipe(elsewhere: Path):
    found = list(blocks("yaml"))
    for _, code in found:
        Path("recipe.yaml").write_text("recipe:\n" + "".join(f"  {line}\n" for line in code.splitlines()))
        assert stages_of(compose(["recipe.yaml"]))
    assert found


def test_every_key_and_option_that_the_prose_names_exists():
    """Of `section.key=…` and `group=option` in backticks."""
    spans = [
        (page.name, word)
        for page in PAGES
        for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
        for word in shlex.split(span.replace("'", ""))
        if re.match(rf"({'|'.join(SECTIONS)})(\.\w+)*=", word)
    ]
    assert [span for span in spans if not exists(*span[1].split("=", 1))] == []
    assert len(spans) > 80


SECTIONS = sorted({path.partition(".")[0] for path in all_paths()})
MAPPINGS = tuple(f"{key.path}." for key in every_key() if key.is_mapping)


def exists(key: str, value: str) -> bool:
    if key in GROUPS:
        return value in options_of(key) or not re.fullmatch(r"[a-z_0-9]+", value)
    return key in all_paths() or key.startswith(MAPPINGS)

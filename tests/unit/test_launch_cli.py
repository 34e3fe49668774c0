"""The command as it is typed: exit code 2 and one line for a mistake, no traceback, no torch, nothing started."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import offtrail
from fakes import scores
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.help import help_text
from offtrail.platform.config.keys import GROUPS, all_paths
from offtrail.platform.launcher.command import require_devices, require_scorers
from offtrail.platform.runtime import device

ROOT = Path(__file__).parents[2]


def run(*argv, cwd=ROOT, **environment):
    # Without PYTHONPATH: launch.py itself must find the checkout's package.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [sys.executable, str(ROOT / "launch.py"), *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


def refused(*argv, cwd=ROOT, **environment):
    """The one line of a mistake, without its prefix."""
    done = run(*argv, cwd=cwd, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("offtrail: error: ")
    return done.stderr.removeprefix("offtrail: error: ").rstrip("\n")


@pytest.fixture
def problems(tmp_path):
    """A function that writes a JSON-lines file and gives the arguments that train on it."""

    def write(*lines):
        path = tmp_path / "problems.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ["task=gsm8k", f"task.path={path}", f"run.dir={tmp_path}", "run.name=never"]

    yield write
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("argument", "begins"),
    [
        ("batch.grups=8", "batch.grups=8: unknown key; nearest: batch.groups"),
        ("batch.groups=many", "batch.groups=many: must be a whole number"),
        ("task=adition", "task=adition: unknown option"),
        ("model.path=/no/such/model", "model.path=/no/such/model: no such folder"),
        ("run.dir=/proc/runs", "run.dir=/proc/runs: cannot be written"),
        ("no_equals_sign", "no_equals_sign: neither key=value"),
        ("--dryrun", "--dryrun: unknown flag; flags: --help, --version, --dry-run; nearest: --dry-run"),
        ("model.name=\udcff", "model.name=\\udcff: must be UTF-8 text"),
        ("run.name=two\nlines", "run.name=two lines: letters"),
    ],
)
def test_mistake(argument, begins):
    assert refused(argument).startswith(begins)


def test_exit_statuses_are_heard_though_the_starter_ignores_them():
    """Popen takes one that is lost for 0, and waitpid knows of no child."""
    code = (
        "import signal, subprocess, sys; from offtrail.platform.launcher import command\n"
        "def main(argv): return subprocess.run([sys.executable, '-c', 'import sys; sys.exit(3)']).returncode\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); command.main = main; sys.exit(command.console())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 3


def test_a_run_name_that_exists(tmp_path):
    (tmp_path / "mine").mkdir()
    text = refused(f"run.dir={tmp_path}", "run.name=mine")
    assert text.startswith(f"run.name=mine: {tmp_path}/mine exists; go on with it by run.resume=true")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_to_resume_that_does_not_exist(tmp_path):
    text = refused(f"run.dir={tmp_path}", "run.name=mine", "run.resume=true")
    assert text.startswith("run.name=mine: no run to resume")


def test_a_configuration_of_another_version(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("schema_version: 99\n", encoding="utf-8")
    assert refused(str(path)).startswith("schema_version=99: ")


def test_malformed_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: 1\nb: [\n", encoding="utf-8")
    assert refused("mine.yaml", cwd=tmp_path).startswith("mine.yaml, line 3: malformed YAML")


def test_a_malformed_line_of_problems(problems):
    text = refused(*problems('{"question": "1+1?", "answer": "#### 2"}', '{"question": '))
    assert text.startswith("task.path=")
    assert "line 2: not valid JSON" in text


def test_a_problem_with_no_answer(problems):
    text = refused(*problems('{"question": "1+1?"}'))
    assert "line 1: no field 'answer' (fields: 'question'); add it" in text


def test_answers_that_the_verifier_cannot_read_are_said_before_the_start(problems):
    """…and then the held-out share of three problems is too small for the evaluation that is asked for."""
    lines = [f'{{"question": "q{i}", "answer": "#### {answer}"}}' for i, answer in enumerate(["18", "18%", "7"])]
    done = run(*problems(*lines), "eval.prompts=9")
    note, error = done.stderr.splitlines()
    assert note.startswith("offtrail: note: task.path=")
    assert "of 3 answers 2 can be read as numbers; 1 others with digits or LaTeX, such as '18%' in line 2" in note
    assert error.startswith("offtrail: error: 9 held-out prompts were asked of")


@pytest.mark.parametrize("key", ["learner.device", "engine.device"])
def test_a_device_that_this_machine_cannot_have(key, monkeypatch, tmp_path):
    config = compose([f"{key}=cuda:1"])
    monkeypatch.setattr(device, "DEV", tmp_path)
    with pytest.raises(ConfigError, match=rf"^{key}=cuda:1: this machine has no GPU .*; take {key}=cpu, or a machine"):
        require_devices(config)
    require_devices(compose([]))
    (tmp_path / "nvidia0").touch()
    require_devices(config)


def test_models_that_score_are_refused_where_the_job_asks_none(tmp_path: Path) -> None:
    named = [f"scorer.models.rm.path={scores.made(tmp_path / 'rm', 'outcome')}", "reward.weights.rm=0.1"]
    require_scorers(compose(named), ())
    require_scorers(compose([*named, "job=eval", f"checkpoint={tmp_path / 'rm'}"]), ())
    (tmp_path / "rows.jsonl").write_text("{}")
    config = compose([*named, "job=reject", f"reject.paths=[{tmp_path / 'rows.jsonl'}]"])
    with pytest.raises(ConfigError, match=r"^scorer\.models=\{rm\}: job=reject asks none; leave it empty$"):
        require_scorers(config, ())
    require_scorers(compose([]), ())


@pytest.mark.parametrize("package", ["omegaconf", "yaml", "msgspec", "torch"])
def test_a_missing_dependency(package, tmp_path):
    """Without a package the command says so in one line, before it makes a directory."""
    code = f"import sys, runpy; sys.modules['{package}'] = None; sys.argv = ['launch.py', 'run.dir={tmp_path}/runs']; "
    code += f"runpy.run_path('{ROOT / 'launch.py'}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("offtrail: error: ")
    assert package in done.stderr
    assert "pip install -e ." in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_configuration_and_makes_nothing(tmp_path):
    done = run("task=addition", "run.dir=runs", "run.name=x", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tree = yaml.safe_load(done.stdout)
    assert tree["task"]["name"] == "addition"
    assert (tree["run"]["dir"], tree["run"]["seed"]) == ("runs", 0)
    assert {"name", "resume"}.isdisjoint(tree["run"])  # so that it can be run again
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.yaml").write_text(done.stdout, encoding="utf-8")
    assert run("printed.yaml", "--dry-run", cwd=tmp_path).stdout == done.stdout


def test_help_is_an_overview_of_groups_and_sections():
    done = run("--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    first = [line.split()[0] for line in done.stdout.splitlines() if line.split()]
    assert {f"{group}=" for group in GROUPS} <= set(first)
    assert {path.partition(".")[0] for path in all_paths()} <= set(first)
    assert "chain_hard" in done.stdout
    assert max(map(len, done.stdout.splitlines()[20:])) <= 80  # the examples above are as long as they are
    assert len(done.stdout.splitlines()) < 80
    assert run("-h", COLUMNS="80").stdout == done.stdout


def test_help_of_all_lists_every_key_within_the_terminals_width():
    text = help_text(["all"], 70)
    assert all_paths() == {line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]", line)} & all_paths()
    assert max(map(len, text.splitlines())) <= 70
    start = text.splitlines().index(f"  {'staleness.max':<30} int = 2")
    line = "η: no token older than this is trained; 0 = the synchronous loop. (≥ 0)"
    assert " ".join(" ".join(text.splitlines()[start + 1 : start + 3]).split()) == line


def test_help_of_a_section_a_variant_and_a_key():
    algo, ppo = help_text(["algo"]), help_text(["algo=ppo"])
    assert {"algo.kl", "algo.dual_clip", "algo.gae_lambda", "algo.tau"} <= set(algo.split())
    assert {"algo.kl", "algo.gae_lambda"} <= set(ppo.split())
    assert "algo.tau" not in ppo
    assert "batch." not in algo
    assert help_text(["learner.optim"]).count(" = ") == 6
    assert help_text(["eval.every"]).splitlines()[1].split() == ["eval.every", "int", "=", "10"]
    assert help_text(["batch.groups", "sft"]) == help_text(["batch.groups"]) + "\n" + help_text(["sft"])
    assert help_text(["batch.groups=4"]) == help_text(["batch.groups"])  # a command line with --help at its end
    assert refused("--help", "algos").startswith("--help algos: no such section or key; nearest: algo")


def test_help_on_a_terminal_that_has_only_ascii():
    done = run("--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_help_into_a_closed_pipe():
    command = f"{sys.executable} {ROOT / 'launch.py'} --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""


def test_a_current_directory_that_is_gone(tmp_path):
    command = (
        f"cd {tmp_path} && mkdir here && cd here && rmdir ../here && {sys.executable} {ROOT / 'launch.py'} --dry-run"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (
        2, "offtrail: error: the current directory is gone; change to one that is there\n",
    )  # fmt: skip


def test_version():
    assert run("--version").stdout == f"offtrail {offtrail.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_nothing_heavy_is_imported(flag):
    """What answers in under half a second: the standard library, omegaconf and yaml. Imports decide it, so they are
    what is asserted, not the clock.
    """
    code = (
        f"import sys, runpy; sys.argv = ['launch.py', '{flag}']\n"
        f"try: runpy.run_path('{ROOT / 'launch.py'}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pyarrow', 'zmq', 'msgspec', 'rich', 'matplotlib', 'tensorboard'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.endswith("HEAVY []\n")


def test_config_imports_no_torch():
    names = [path.stem for path in (ROOT / "platform" / "config").glob("[!_]*.py")]
    code = "import sys\n" + "".join(f"import offtrail.platform.config.{name}\n" for name in names)
    code += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert len(names) > 5

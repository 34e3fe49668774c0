"""Prompts of a set that do not fit the model are counted before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offtrail.core.problem import Problem
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config, PromptConfig
from offtrail.platform.launcher import prompts
from offtrail.platform.launcher.command import require_inputs
from offtrail.platform.launcher.prompts import told_of
from offtrail.platform.model import characters
from offtrail.platform.model.lengths import Asked, count, lengths

Line = Callable[..., list[str]]


@pytest.fixture
def line(tmp_path: Path, start_dir: Path) -> Line:
    """The command line that trains the tiny model on questions of so many characters, which are as many tokens."""

    def make(*characters: int) -> list[str]:
        rows = [{"question": f"{i}".rjust(n, "1"), "answer": f"#### {i}"} for i, n in enumerate(characters)]
        path, held_out = tmp_path / "set.jsonl", tmp_path / "held_out.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        held_out.write_text(json.dumps({"question": "1+1=?", "answer": "#### 2"}) + "\n")
        return [
            "task=jsonl", f"task.path={path}", f"task.eval_path={held_out}", "eval.prompts=1",
            f"model.path={start_dir}", "model.max_length=100", "sampling.max_new_tokens=40",
        ]  # fmt: skip

    return make


def test_how_many_of_how_many_do_not_fit_is_said_before_the_start(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 tokens and 40 new ones are the 100 that there are."""
    monkeypatch.setattr(prompts, "lengths", count)
    require_inputs(compose(line(10, 60, 61, 75)))
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("offtrail: note: task.path=")
    assert note.endswith(
        "set.jsonl: 2 of 4 prompts leave no room for sampling.max_new_tokens=40 in model.max_length=100 (the longest "
        "takes 75 tokens): raise it, or lower sampling.max_new_tokens; they are refused as failed, and never trained"
    )


def test_a_set_of_which_nothing_fits_is_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "lengths", count)
    with pytest.raises(ConfigError, match=r"^task\.path=.*set\.jsonl: 2 of 2 prompts leave no room for sampling\.max"):
        require_inputs(compose(line(61, 75)))
    with pytest.raises(ConfigError, match=r"^eval\.prompts: 1 of 1 prompts leave no room"):
        require_inputs(compose([*line(3, 4)[:-1], "sampling.max_new_tokens=96"]))


def test_prompts_without_tokens_are_told_with_the_first_reason() -> None:
    told = told_of([4, "task=jsonl, problem 2: why", "task=jsonl, problem 3: why"], compose([]))
    assert told == ("2 of 3 prompts cannot be put to the model, the first: task=jsonl, problem 2: why", False)
    assert told_of(["why"], compose([]))[1]
    assert told_of([], compose([])) == ("", False)


def test_held_out_prompts_of_a_generated_task_are_told_too(
    start_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the small model that is to be made, and of one that is there."""
    monkeypatch.setattr(prompts, "lengths", count)
    tight = ["eval.prompts=50", "model.max_length=64", "sampling.max_new_tokens=48"]
    for model in ([], [f"model.path={start_dir}"]):
        require_inputs(compose([*tight, *model]))
        [note] = capsys.readouterr().err.splitlines()
        assert re.match(r"offtrail: note: eval\.prompts: \d+ of 50 prompts leave no room for .* count as wrong$", note)
        with pytest.raises(ConfigError, match=r"^eval\.prompts: 50 of 50 prompts leave no room"):
            require_inputs(compose([*tight[:2], "sampling.max_new_tokens=63", *model]))


def test_held_out_prompts_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    questions = ("1+1=?", "2+2=?", "Wie viele?")
    path.write_text("".join(json.dumps({"question": q, "answer": "#### 2"}) + "\n" for q in questions))
    held_out = [f"task.eval_path={path}", "task.path=" + str(tmp_path / "train.jsonl")]
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "3+3=?", "answer": "#### 6"}) + "\n")
    with pytest.raises(ConfigError, match=r"^eval\.prompts: 1 of 3 prompts cannot be put .* know all of 'Wie viele\?'"):
        require_inputs(compose(["task=jsonl", *held_out, "eval.prompts=3"]))


PLAIN = st.lists(st.sampled_from([*characters.ALPHABET, *characters.TAGS, *characters.SPECIALS, "A", "ß"]))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PLAIN.map("".join), max_size=5))
def test_the_small_models_tokens_are_counted_without_its_tokenizer(start_dir: Path, texts: list[str]) -> None:
    problems = [Problem("t", i, text, "1") for i, text in enumerate(texts)]
    problems.append(Problem("t", 99, "1+1=", "2", messages=({"role": "user", "content": "1+1="},)))
    assert characters.count(problems, False) == count(Asked(str(start_dir), PromptConfig(), problems))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PLAIN.map("".join), PLAIN.map("".join)), max_size=5))
def test_so_are_those_of_answers(start_dir: Path, pairs: list[tuple[str, str]]) -> None:
    pairs = [*pairs, ("1+1=<think>", "<think>1</think>2"), ("1+1=<think>\n</think>", "<think>1</think> 2")]
    problems = [Problem("t", i, prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    found = characters.count(problems, True)
    assert found == count(Asked(str(start_dir), PromptConfig(), problems, answered=True))
    assert found[-2:] == [len("1+1=") + 1 + len("1") + 1 + len("2") + 1, len("1+1=") + 3 + len("2") + 1]


@pytest.mark.parametrize("model", [True, False], ids=["a model", "the small model"])
def test_examples_that_are_too_long_or_unknown_are_refused_before_the_start_as_in_the_learner(
    model: bool, start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`12+34=` is 6 tokens, and `46` with its stop token 3: 9."""
    monkeypatch.setattr(prompts, "lengths", count)
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": "1=", "answer": "1"}, {"prompt": "12+34=", "answer": "46"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = ["job=sft", f"sft.path={path}", "sampling.max_new_tokens=1", *([f"model.path={start_dir}"] if model else [])]
    words = f"sft.path={path}, line 2: prompt and answer take 9 tokens, more than model.max_length=8 (1 of 2 lines do)"
    require_inputs(compose([*sft, "model.max_length=9"]))
    with pytest.raises(ConfigError, match=re.escape(words)):
        require_inputs(compose([*sft, "model.max_length=8"]))
    assert capsys.readouterr().err == ""
    require_inputs(compose([*sft, "model.max_length=8", "sft.long=drop"]))
    assert "1 of 2 examples are left out: they are longer than model.max_length=8" in capsys.readouterr().err
    monkeypatch.setattr(prompts, "LOOKED_AT", 1)  # the longer one
    with pytest.raises(ConfigError, match=re.escape(words)):
        require_inputs(compose([*sft, "model.max_length=8"]))
    path.write_text(json.dumps({"prompt": "Größe", "answer": "1"}))
    with pytest.raises(ConfigError, match=re.escape(f"sft.path={path}, line 1: the tokenizer does not know all of")):
        require_inputs(compose(sft))


def test_a_process_of_its_own_counts(start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    problems = [Problem("jsonl", 1, "12+34=", "46", {"solution": ""}), Problem("jsonl", 2, "Größe", "1")]
    found = lengths(Asked(str(start_dir), PromptConfig(), problems))
    assert found[0] == 6
    assert re.match("task=jsonl, problem 2: the tokenizer does not know all of 'Größe'", str(found[1]))
    assert lengths(Asked(str(tmp_path), PromptConfig(), problems)) == []


def test_examples_that_answer_held_out_prompts_are_counted(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out prompt is 1+1=?; a run that starts from a model imitates nothing."""
    monkeypatch.setattr(prompts, "lengths", count)
    examples = tmp_path / "examples.jsonl"
    asked = ("2+1=?", " 1+1=? ", "1+1=?")
    examples.write_text("".join(json.dumps({"prompt": prompt, "answer": "2"}) + "\n" for prompt in asked))
    words = (
        f"sft.path={examples}: 2 of 3 examples answer held-out prompts, first line 2; what is evaluated was trained "
        "on: take them out, or name another held-out set"
    )
    task = [setting for setting in line(3, 4) if not setting.startswith("model.path=")]
    stages = f"recipe.stages={{a: {{job: sft, sft: {{path: {examples}}}}}, b: {{job: rl, start_from: a}}}}"
    again = stages.replace(" b: ", f" again: {{job: sft, sft: {{path: {examples}}}}}, b: ")  # counted once
    for arguments in ([*task, f"sft.path={examples}"], [*task, stages], [*task, again]):
        require_inputs(compose(arguments))
        assert capsys.readouterr().err == f"offtrail: note: {words}\n"
    require_inputs(compose([*line(3, 4), f"sft.path={examples}"]))
    assert capsys.readouterr().err == ""


def test_answers_that_grow_take_their_room_from_the_start() -> None:
    config = Config()
    config.model.max_length, config.learner.steps = 64, 10
    config.sampling.max_new_tokens, config.sampling.growth_step, config.sampling.growth_factor = 16, 5, 3.0
    said, none = told_of([10, 20], config)
    assert said.startswith(
        "1 of 2 prompts leave no room for sampling.max_new_tokens=16 (48 from sampling.growth_step=5 on)"
    )
    assert not none

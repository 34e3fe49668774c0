"""Decontamination: which problems share text, what is said of them, and what is trained on then."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.launcher.command import require_inputs
from offtrail.platform.launcher.inputs import data_of
from offtrail.platform.launcher.overlap import FILE, write_overlaps
from offtrail.platform.learner.data import FileExamples, make_examples
from offtrail.platform.model.text import Text
from offtrail.tasks.base import TaskError
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask, read_prompts
from offtrail.tasks.mixture import MixtureConfig, MixtureTask
from offtrail.tasks.overlap import Index, Item, compare, words_of
from offtrail.tasks.registry import remarks_on

VOCABULARY = [f"w{i}" for i in range(2000)]


def text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=length))


def items(*texts: str) -> list[Item]:
    return [Item("set", f"line {i}", one) for i, one in enumerate(texts, start=1)]


def found(index: Index, prompt: str) -> list[str]:
    return [item.place for item, _ in index.matches(prompt)]


def test_planted_copies_are_found_and_nothing_else() -> None:
    """A copy stands within other text, in other letters and marks, and with its last word exchanged."""
    rng = random.Random(0)
    evaluation = [text(rng, rng.randint(11, 60)) for _ in range(500)]
    index = Index(items(*evaluation))
    for number, original in enumerate(evaluation, start=1):
        copy = original.rpartition(" ")[0].upper().replace(" ", ",\n ")
        assert found(index, f"{text(rng, 20)}. {copy} other {text(rng, 20)}") == [f"line {number}"]
    assert [found(index, text(rng, 60)) for _ in range(2000)] == [[]] * 2000


def test_nine_words_are_no_match_and_ten_are() -> None:
    index = Index(items("a b c d e f g h i j k l"))
    assert found(index, "x b c d e f g h i j x") == []
    assert index.matches("x b c d e f g h i j k x")[0][1] == "b c d e f g h i j k"


def test_a_short_problem_matches_as_a_whole_inside_a_longer_one_too() -> None:
    index = Index(items("What is 2+3?", "Compute sin 60.", "  "))
    assert found(index, "Hello. What is 2 + 3, please?") == ["line 1"]
    assert found(index, "What is 2+4? Compute cos 60.") == []


def test_what_stands_in_three_problems_is_boilerplate_but_a_problem_of_it_alone_matches_as_a_whole() -> None:
    common = "the answer is m over n where m and n are relatively prime"
    index = Index(items(f"one {common}", f"two {common}", f"three {common}", common))
    assert found(index, f"nothing new but {common}") == ["line 4"]
    assert found(index, f"{common.removesuffix(' prime')} odd") == []
    assert found(index, f"so two {common}") == ["line 2", "line 4"]
    two = Index(items(f"one {common}", f"two {common}"))
    assert found(two, common) == ["line 1", "line 2"]


def test_a_problem_that_an_evaluation_set_holds_several_times_is_no_boilerplate() -> None:
    original = "a b c d e f g h i j k l"
    assert found(Index(items(original, original.upper(), original, f"{original}.")), original) == ["line 1"]


def test_a_chinese_character_is_a_word() -> None:
    assert words_of("小明有3个苹果, OK") == ["小", "明", "有", "3", "个", "苹", "果", "ok"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3+4*2", "3-4*2"), ("3+4*2", "3 + 4 / 2"), ("x = -3", "x = 3"), ("What is -3+5?", "What is 3+5?"),
        ("2^10", "2*10"), ("a<b", "a>b"), ("5;+1;%10=?", "5;-1;%10=?"), (r"3+\frac12", r"3-\frac12"),
        ("sin x + cos y", "sin x - cos y"), (r"\pi - 3", r"\pi + 3"), ("x² + 1", "x² - 1"), ("x_1 + x_2", "x_1 - x_2"),
        ("-7 and 2", "7 and 2"),
    ],
)  # fmt: skip
def test_formulas_that_differ_by_a_sign_are_other_ones(one: str, other: str) -> None:
    assert words_of(one) != words_of(other)
    assert [word.strip("+-*/^%=<>") for word in words_of(one)] == [word.strip("+-*/^%=<>") for word in words_of(other)]
    assert found(Index(items(one)), other) == []
    assert found(Index(items(one)), f"So {one.upper()}!") == ["line 1"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3+4*2", "3 + 4 * 2"), ("3 − 4 × 2 ÷ 5", "3-4*2/5"), ("a well-known fact", "a well known fact"),
        ("COVID-19 in May", "COVID 19 in May"), ("Tom - a boy - ran", "Tom, a boy, ran"),
        ("- 3 pens\n- 4 caps", "3 pens, 4 caps"), ("km/h and/or miles", "km h and or miles"),
        ("20% of it", "20 of it"), ("3+4=?", "3+4"), ("so (3+4)", "so 3+4"),
    ],
)  # fmt: skip
def test_how_a_text_is_set_makes_no_other_words(one: str, other: str) -> None:
    assert words_of(one) == words_of(other)


def test_a_sign_is_no_word() -> None:
    assert words_of("3+4*2 = 11, so x-1 > 9") == ["3", "+4", "*2", "=11", "so", "x", "-1", ">9"]
    index = Index(items("1+2+3+4+5+6+7+8+9+10+11"))
    assert found(index, "0+1+2+3+4+5+6+7+8+9") == []  # 9 of its words
    assert found(index, "1+2+3+4+5+6+7+8+9+10") == ["line 1"]


@given(st.lists(st.text("ab ", max_size=30), max_size=6), st.text("ab ", max_size=60))
def test_it_agrees_with_a_search_of_texts(evaluation: list[str], prompt: str) -> None:
    """Oracle: runs of words as texts within texts; few words, so that much repeats."""
    distinct = list(dict.fromkeys(" ".join(words_of(one)) for one in evaluation if words_of(one)))
    padded = f" {' '.join(words_of(prompt))} "

    def runs(one: str) -> list[str]:
        words = one.split()
        return [f" {' '.join(words[i : i + 10])} " for i in range(len(words) - 9)]

    expected = []
    for one in distinct:
        own = [run for run in runs(one) if sum(run in f" {other} " for other in distinct) < 3]
        if any(run in padded for run in own) or (not own and f" {one} " in padded):
            expected.append(one)
    assert sorted(" ".join(words_of(item.text)) for item, _ in Index(items(*evaluation)).matches(prompt)) == sorted(
        expected
    )


# In a task


def write(path: Path, *questions: str, field: str = "question") -> str:
    path.write_text("".join(json.dumps({field: question, "answer": "#### 1"}) + "\n" for question in questions))
    return str(path)


ASKED = "Ann has twelve pens and buys seven more of them on Monday"
OTHER = "A train leaves the town at nine and arrives at noon in the city"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Line 2 of the training file copies the held-out problem, line 4 one of a further set."""
    train = write(tmp_path / "train.jsonl", "1+1?", f"Hello! {ASKED}. How many?", "2+2?", f"{OTHER}, how long is that?")
    return {
        "path": train,
        "eval_path": write(tmp_path / "test.jsonl", f"{ASKED}?", "3 + 3 = ?"),
        "decontaminate_against": [write(tmp_path / "math.jsonl", OTHER, field="problem")],
    }


def test_report_trains_on_all_and_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    task = JsonlTask(JsonlConfig(decontaminate="report", **settings), 0)
    assert [problem.index for problem in task.training()] == [1, 2, 3, 4]
    assert task.remarks == [
        f"task.path={settings['path']}: 2 of its 4 problems share 10 words in a row, or a shorter problem, with "
        f"task.eval_path={settings['eval_path']} and task.decontaminate_against={tmp_path}/math.jsonl, the first "
        f"line 2 with task.eval_path={settings['eval_path']}, line 1 ('ann has twelve pens and buys seven more of "
        "them'); they are trained on all the same (task.decontaminate=report); the run directory lists all"
    ]
    clean = JsonlTask(JsonlConfig(decontaminate="report", path=settings["eval_path"], eval_path=settings["path"]), 0)
    assert "2 of" not in clean.remarks[0]


def test_drop_leaves_them_out_of_every_epoch(settings: dict[str, Any]) -> None:
    task = JsonlTask(JsonlConfig(decontaminate="drop", **settings), 0)
    assert [problem.index for problem in task.training()] == [1, 3]
    assert {task.train(i).prompt for i in range(20)} == {"1+1?", "2+2?"}
    assert "they are left out of training (task.decontaminate=drop)" in task.remarks[0]
    (only,) = settings["decontaminate_against"]
    other = write(Path(only).with_name("other"), f"{OTHER}!", field="problem")
    all_of_it = JsonlConfig(path=only, eval_path=other, prompt_field="problem", decontaminate="drop")
    with pytest.raises(TaskError, match=r"task.decontaminate=drop: leaves no problem for training"):
        JsonlTask(all_of_it, 0).train(0)


def test_the_hash_split_is_compared_too_and_a_clean_set_is_said_to_be_clean(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = write(tmp_path / "a.jsonl", *(text(rng, 20) for _ in range(100)))
    task = JsonlTask(JsonlConfig(path=path, decontaminate="report"), 0)
    n = len(task.training())
    assert task.remarks == [
        f"task.path={path}: none of its {n} problems shares 10 words in a row with its held-out 0.1"
    ]


def test_a_familys_overlap_is_said_within_a_mixture(settings: dict[str, Any]) -> None:
    mixture = MixtureTask(
        MixtureConfig(weights={"jsonl": 1.0}, settings={"jsonl": settings | {"decontaminate": "drop"}}), 0
    )
    assert any(remark.startswith("task.settings.jsonl: task.path=") for remark in remarks_on(mixture))


def test_the_report_lists_every_pair_with_its_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = [f"task.path={settings['path']}", f"task.eval_path={settings['eval_path']}", "task.decontaminate=drop",
                 f"task.decontaminate_against=[{settings['decontaminate_against'][0]}]", "eval.prompts=1"]  # fmt: skip
    config = compose(["task=jsonl", *arguments])
    write_overlaps(config, tmp_path)
    (found,) = json.loads((tmp_path / FILE).read_text())["sets"]
    assert found["policy"] == "drop"
    assert found["training"] == {"set": f"task.path={settings['path']}", "problems": 4, "overlapping": 2}
    assert [(one["problems"], one["overlapping"]) for one in found["against"]] == [(2, 1), (1, 1)]
    assert [(pair["training"], pair["evaluation"]) for pair in found["pairs"]] == [
        ("line 2", "line 1"), ("line 4", "line 1"),
    ]  # fmt: skip
    assert data_of(config)["task.decontaminate_against"].files == {"math.jsonl": tmp_path / "math.jsonl"}
    (tmp_path / FILE).unlink()
    write_overlaps(compose(["task=jsonl", *arguments[:2]]), tmp_path)
    assert not (tmp_path / FILE).exists()


SUM = "1+2+3+4+5+6+7+8+9+1+2"


@pytest.mark.parametrize(("policy", "kept"), [("report", 4), ("drop", 2), ("off", 4)])
def test_examples_to_imitate_are_compared_as_training_problems_are(
    policy: str, kept: int, tmp_path: Path, start_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines 2 and 3 hold the held-out problem, the first within the template; line 4 has other signs."""
    template = "1;2;3;4;5;6;7;8;9;1;2;{prompt}=?"
    asked = ["9-8=?", template.replace("{prompt}", SUM), f"{SUM}+5", SUM.replace("+", "-")]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"prompt": one, "answer": "1"}) + "\n" for one in asked))
    keys = [
        f"task.path={write(tmp_path / 'train.jsonl', '1+1', '2+2')}", f"sft.path={examples}",
        f"task.template={template}", f"task.eval_path={write(tmp_path / 'test.jsonl', SUM)}", "task=jsonl",
        f"task.decontaminate={policy}", "eval.prompts=1", "sft.batch_size=1", "prompt.chat=never",
    ]  # fmt: skip
    for job, sets in (
        ("sft", [f"sft.path={examples}"]),
        ("rl", [f"task.path={tmp_path}/train.jsonl", f"sft.path={examples}"]),
    ):
        config = compose([*keys, f"job={job}"])
        require_inputs(config)
        told = capsys.readouterr().err
        assert (f"sft.path={examples}: 2 of its 4 problems share 10 words in a row" in told) == (policy != "off")
        assert ("examples answer held-out prompts" in told) == (job == "rl" and policy != "drop")
        (tmp_path / FILE).unlink(missing_ok=True)
        write_overlaps(config, tmp_path)
        if policy == "off":
            assert not (tmp_path / FILE).exists()
            continue
        found = json.loads((tmp_path / FILE).read_text())["sets"]
        assert [one["training"]["set"] for one in found] == sets
        assert [(pair["training"], pair["evaluation"]) for pair in found[-1]["pairs"]] == [
            ("line 2", "line 1"), ("line 3", "line 1"),
        ]  # fmt: skip
    source = make_examples(compose([*keys, "job=sft"]), Text(start_dir))
    assert isinstance(source, FileExamples)
    assert len(source.pairs) == kept
    examples.write_text(json.dumps({"prompt": SUM, "answer": "1"}))
    if policy == "drop":
        with pytest.raises(ConfigError, match=rf"^task.decontaminate=drop: leaves no example of sft.path={examples}"):
            require_inputs(compose([*keys, "job=sft"]))


def test_paths_of_further_sets_are_absolute_checked_and_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = ["task=jsonl", "task.path=train.jsonl"]
    config = compose([*task, "task.decontaminate=report", "task.decontaminate_against=[math.jsonl, test.jsonl]"])
    assert config.task.decontaminate_against == [f"{tmp_path}/math.jsonl", f"{tmp_path}/test.jsonl"]  # type: ignore[attr-defined]
    mixture = compose(["task=mixture", "task.weights={jsonl: 1}", "task.settings.jsonl.path=train.jsonl",
                       "task.settings.jsonl.decontaminate=drop",
                       "task.settings.jsonl.decontaminate_against=[math.jsonl]"])  # fmt: skip
    assert data_of(mixture)["task.settings.jsonl.decontaminate_against"].value == f"{tmp_path}/math.jsonl"
    for wrong, complaint in (
        (["task.decontaminate_against=[math.jsonl]"], "must be empty with task.decontaminate=off"),
        (["task.decontaminate=drop", "task.decontaminate_against=[none.jsonl]"], "none.jsonl: no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            compose([*task, *wrong])


def test_a_further_set_without_a_prompt_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q"}\n{"text_": "q"}\n')
    with pytest.raises(TaskError, match=r"task.decontaminate_against=.*a.jsonl, line 2: no field 'question'"):
        read_prompts(path, JsonlConfig())


DATA = os.environ.get("OFFTRAIL_DATA", "")


@pytest.mark.skipif(not DATA, reason="OFFTRAIL_DATA is not set: names a folder with gsm8k_test.jsonl and others")
def test_public_sets() -> None:
    """ProcessBench's GSM8K part is of GSM8K's test set; two of 200 training problems share a phrase with that."""
    names = ["gsm8k_test", "gsm8k_train_first200", "processbench_gsm8k"]
    sets = {name: read_prompts(Path(DATA) / f"{name}.jsonl", JsonlConfig()) for name in names}
    assert len(compare(sets["gsm8k_train_first200"], sets["gsm8k_test"], "report").places) == 2
    assert len(compare(sets["processbench_gsm8k"], sets["gsm8k_test"], "report").places) == 400

"""JSON lines: the loader, its errors, the split, the data order and numeric equality."""

from __future__ import annotations

import bz2
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtrail.core.types import Problem
from offtrail.platform.config.compose import compose
from offtrail.rewards.registry import make_reward
from offtrail.tasks.base import TaskError
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask, number
from offtrail.tasks.mixture import MixtureConfig, MixtureTask
from offtrail.tasks.registry import make_task, remarks_on
from offtrail.tasks.split import is_held_out, stream
from offtrail.tasks.templates import task_template


def row(i: int) -> dict[str, Any]:
    return {
        "question": f"Ann has {i} pens and buys {i}. How many?",
        "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
    }


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    return write(tmp_path / "hundred.jsonl", *map(row, range(100)))


def test_a_problem_is_the_line(tmp_path: Path):
    task = JsonlTask(JsonlConfig(path=write(tmp_path / "one.jsonl", row(4)), held_out_share=0.0), 0)
    problem = task.train(0)
    assert problem == Problem("jsonl", 0, row(4)["question"], "8", {"solution": "4+4=<<4+4=8>>8"})
    assert task.trace(problem, stream(0)) == "<think>4+4=8</think><answer>8</answer>"
    assert task.check_steps(problem, "<think>4+4=8") == []


def test_template_wraps_the_prompt_but_does_not_move_the_split(hundred: str):
    plain = JsonlTask(JsonlConfig(path=hundred), 0)
    wrapped = JsonlTask(JsonlConfig(path=hundred, template="{q} Q: {prompt}\nA:"), 0)
    assert wrapped.train(3).prompt == "{q} Q: " + plain.train(3).prompt + "\nA:"
    assert [p.answer for p in wrapped.held_out(5)] == [p.answer for p in plain.held_out(5)]


def test_each_epoch_is_another_permutation_of_the_training_side(hundred: str):
    task, n = JsonlTask(JsonlConfig(path=hundred), 0), 0
    train = {row(i)["question"] for i in range(100) if not is_held_out("jsonl", row(i)["question"], 0.1)}
    n = len(train)
    epochs = [[task.train(e * n + i).prompt for i in range(n)] for e in range(3)]
    assert all(set(epoch) == train for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[2] == [JsonlTask(JsonlConfig(path=hundred), 0).train(2 * n + i).prompt for i in range(n)]
    assert epochs[0] != [JsonlTask(JsonlConfig(path=hundred), 1).train(i).prompt for i in range(n)]
    held_out = {p.prompt for p in task.held_out(100 - n)}
    assert held_out | train == {row(i)["question"] for i in range(100)}
    assert not held_out & train


def test_an_eval_file_is_held_out_whole_and_taken_out_of_training(tmp_path: Path, hundred: str):
    other = write(tmp_path / "eval.jsonl", *map(row, (5, 6, 1000, 6)))
    task = JsonlTask(JsonlConfig(path=hundred, eval_path=other), 0)
    assert {p.answer for p in task.held_out(3)} == {"10", "12", "2000"}  # a prompt that stands twice counts once
    assert len({task.train(i).prompt for i in range(98)}) == 98
    assert not {task.train(i).answer for i in range(98)} & {"10", "12"}
    with pytest.raises(
        TaskError, match=r"4 held-out prompts were asked of .*eval.jsonl, which holds 3; lower eval.prompts"
    ):
        task.held_out(4)


def test_too_few_held_out(hundred: str):
    task = JsonlTask(JsonlConfig(path=hundred), 0)
    with pytest.raises(
        TaskError, match=r"512 held-out prompts were asked of the held-out share 0.1 of .*hundred.jsonl, which"
    ):
        task.held_out(512)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer"', r"line 3: not valid JSON \("),
        ("[1, 2]", r"line 3: holds list, not an object"),
        ('{"question": "a"}', r"line 3: no field 'answer' \(fields: 'question'\); add it, or set"),
        ('{"question": "a", "answer": null}', r"line 3: field 'answer' is null; fill it, delete"),
        ('{"question": null, "answer": "#### 4"}', r"line 3: field 'question' is null; fill it, delete"),
        ('{"question": "a", "answer": ""}', r"line 3: field 'answer' is empty"),
        ('{"question": "a", "answer": "it is 4"}', r"line 3: no answer: 'answer' lacks the mark '####'; add it, set"),
        ('{"question": "a", "answer": "it is ####  "}', r"line 3: no answer after '####'"),
        ('{"answer": "#### 4"}', r"line 3: no field 'question'"),
        ('{"question": "  ", "answer": "#### 4"}', r"line 3: field 'question' is empty"),
        ('{"question": ["a"], "answer": "#### 4"}', r"line 3: field 'question' is list, not text"),
        ('{"question": true, "answer": "#### 4"}', r"line 3: field 'question' is bool, not text"),
        ("[" * 100_000, r"line 3: not valid JSON \(nested too deep\)"),
        ('{"question": "\\frac", "answer": "#### 4"}', r"line 3: field 'question' holds a control char"),
        ('{"question": "\\beta", "answer": "#### 4"}', r"line 3: field 'question' holds a control char"),
        ('{"question": "\\sin"}', r"line 3: not valid JSON \(Invalid \\escape, column 15\); write"),
        ('{"question": "a", "answer": "#1", "answer": "#2"}', r"line 3: the key 'answer' is given twice; keep one"),
        ('{"question": "a", "answer": NaN}', r"line 3: NaN is no number in JSON"),
        ('{"question": "a", "answer": 1e101}', r"line 3: field 'answer' is a number of more than 100 digits"),
        ('{"question": "a \\ud800", "answer": "#### 4"}', r"line 3: field 'question' holds half a surrogate pair"),
    ],
)  # fmt: skip
def test_a_bad_line_is_an_error_with_its_number(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "bad.jsonl", row(1), "", line, row(2))  # a blank line counts but is skipped
    with pytest.raises(TaskError, match=r"^task.path=.*bad.jsonl, " + message) as caught:
        JsonlTask(JsonlConfig(path=path), 0)
    assert "\n" not in str(caught.value)


def test_a_page_end_or_another_separator_in_a_text_ends_no_line(tmp_path: Path):
    """Form feeds come with text out of PDFs, the others with text of the web."""
    texts = [f"one{separator}two" for separator in "\f\v\x1c\x85\u2028"]
    for escaped in (True, False):
        rows = (json.dumps({"question": text, "answer": "#### 4"}, ensure_ascii=escaped) for text in texts)
        task = JsonlTask(JsonlConfig(path=write(tmp_path / "f.jsonl", *rows), held_out_share=0.0), 0)
        assert [problem.prompt for problem in task.training()] == texts


def test_bytes_that_are_no_text_are_an_error_with_their_line(tmp_path: Path):
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"question": "\xff\xfe", "answer": "#### 1"}\n')
    with pytest.raises(TaskError, match=r"bytes.jsonl, line 2: not valid JSON \(byte 15 of the line is no UTF-8\)"):
        JsonlTask(JsonlConfig(path=str(path)), 0)


def test_files_that_cannot_be_used(tmp_path: Path, hundred: str):
    with pytest.raises(TaskError, match=r"task.path is empty: task=jsonl needs task.path=FILE"):
        JsonlTask(JsonlConfig(), 0)
    with pytest.raises(TaskError, match=r"task.path=.*none.jsonl: No such file or directory; name a readable"):
        JsonlTask(JsonlConfig(path=str(tmp_path / "none.jsonl")), 0)
    (tmp_path / "none").mkdir()
    with pytest.raises(TaskError, match=r"task.eval_path=.*: the folder holds no Parquet, Arrow or JSON file"):
        JsonlTask(JsonlConfig(path=hundred, eval_path=str(tmp_path / "none")), 0)
    with pytest.raises(TaskError, match=r"the file holds no lines"):
        JsonlTask(JsonlConfig(path=write(tmp_path / "empty.jsonl", "", "")), 0)
    with pytest.raises(TaskError, match=r"none of its 100 problems is left for training"):
        JsonlTask(JsonlConfig(path=hundred, eval_path=hundred), 0)
    with pytest.raises(ValueError, match=r"task.template='\{q\}': must be .* or a text that contains \{prompt\}"):
        JsonlConfig(template="{q}")


def test_a_verifier_alone_reads_no_file():
    task = JsonlTask(JsonlConfig(path="/nowhere/at/all.jsonl"), 0, load=False)
    assert task.verify(Problem("jsonl", 0, "q", "18", {}), "$18.00")


def test_other_fields_and_numbers_as_answers(tmp_path: Path):
    path = write(tmp_path / "aime.jsonl", {"problem": "p", "answer": 204})
    task = JsonlTask(JsonlConfig(path=path, prompt_field="problem", answer_after="", held_out_share=0.0), 0)
    assert task.train(0).answer == "204"
    assert task.trace(task.train(0), stream(0)) == "<think></think><answer>204</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("18.0", 18), ("18.", 18), (" 18 ", 18), ("$18", 18), ("$ 1,800.50", Fraction("1800.5")),
        ("-3", -3),
        ("-$3", -3), ("+3", 3), ("1,234,567", 1234567), (".5", Fraction(1, 2)), ("1/2", Fraction(1, 2)),
        ("0", 0), ("-0", 0),
        ("-3 / 4", Fraction(-3, 4)), ("007", 7), ("1.5/3", Fraction(1, 2)), ("1e3", 1000),
        ("-1.5E-05", Fraction(-3, 200000)),
    ],
)  # fmt: skip
def test_numbers(text: str, value: int | Fraction):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", ".", "$", "-", "1,23", "12,3456", "1 000", "18 apples", "18%", "1/0", "1e", "1e100", "0x10", "1_0", "--3",
     "1.2.3", "٣", "²", "inf", "nan", "18 18", "=18", "9" * 101, "1/2/3"],
)  # fmt: skip
def test_what_is_no_number(text: str):
    assert number(text) is None


@given(st.text(max_size=30))
def test_any_text_is_read_without_an_error(text: str):
    number(text)


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_one_value_written_in_many_ways(value: int, zeros: int):
    point = "." + "0" * zeros if zeros else ""
    task = JsonlTask(JsonlConfig(), 0, load=False)
    problem = Problem("jsonl", 0, "q", str(value), {})
    for text in (f"{value}{point}", f"{value:,}{point}", f"{2 * value}/2"):
        assert task.verify(problem, text)
    for text in (f"{value + 1}{point}", f"{value}{point or '.'}1", f"{2 * value + 1}/2"):
        assert not task.verify(problem, text)


def test_answers_that_are_no_numbers_are_compared_as_text():
    task = JsonlTask(JsonlConfig(), 0, load=False)
    assert task.verify(Problem("jsonl", 0, "q", "x + 1", {}), " x  + 1 ")
    assert not task.verify(Problem("jsonl", 0, "q", "x + 1", {}), "1 + x")
    assert not task.verify(Problem("jsonl", 0, "q", "18", {}), "eighteen")


@pytest.mark.parametrize("written", ["1e-05", "0.00001", "1.0E-5", "0.000010"])
def test_equal_numbers_of_a_file_are_equal_answers(tmp_path: Path, written: str):
    path = write(tmp_path / "small.jsonl", f'{{"question": "q", "answer": {written}}}')
    task = JsonlTask(JsonlConfig(path=path, answer_after="", held_out_share=0.0), 0)
    assert all(task.verify(task.train(0), text) for text in ("1e-05", "0.00001", "1/100000", ".00001"))
    assert not task.verify(task.train(0), "0.00002")
    assert "e" not in task.train(0).answer.lower()  # what job=sft teaches is a plain number


# Answers that mean a value which the verifier cannot read


FORMATS = ["18%", r"\frac{1}{2}", r"\boxed{18}", "18 apples", "−3", "1 1/2", "1 000", "5 m/s"]


def of_answers(path: Path, *answers: str, **settings: Any) -> JsonlTask:
    rows = ({"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers))
    return JsonlTask(JsonlConfig(path=write(path, *rows), answer_after="", held_out_share=0.0, **settings), 0)


def test_a_set_whose_answers_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(
        TaskError, match=r"none of its 8 answers can be read as a number, such as '18%' in line 1; write"
    ):
        of_answers(tmp_path / "a.jsonl", *FORMATS)
    task = of_answers(tmp_path / "a.jsonl", *FORMATS, compare="text")
    assert task.remarks == []
    problems = [task.train(i) for i in range(8)]
    assert all(task.verify(problem, problem.answer) for problem in problems)
    assert not any(task.verify(problem, "18") for problem in problems)


@pytest.mark.parametrize("answer", FORMATS)
def test_a_set_with_some_such_answers_says_how_many_and_which(tmp_path: Path, answer: str):
    task = of_answers(tmp_path / "a.jsonl", "18", "$1,800.50", answer, "Paris")
    (remark,) = task.remarks
    assert remark.startswith(
        f"task.path={tmp_path}/a.jsonl: of 4 answers 2 can be read as numbers; 1 others with digits"
    )
    assert f"such as {answer!r} in line 3" in remark
    mixed = MixtureConfig(weights={"jsonl": 1.0}, settings={"jsonl": {"path": task.config.path, "answer_after": ""}})
    assert remarks_on(MixtureTask(mixed, 0)) == [f"task.settings.jsonl: {remark}"]


def test_words_are_compared_as_words_without_a_word(tmp_path: Path):
    assert of_answers(tmp_path / "a.jsonl", "Paris", "x + y", "B").remarks == []
    assert of_answers(tmp_path / "b.jsonl", "18", "-3/4", "1e-05").remarks == []


def test_a_set_that_contradicts_itself_says_how_often_and_where_first(tmp_path: Path):
    """18 and 18.0 are one answer; the blanks of `a  b` do not make another problem of it than `a b`."""
    rows = [("a b", "18"), ("c", "1"), ("a  b", "18.0"), ("c", "2"), ("c", "3"), ("d", "x"), ("d", "y"), ("a b", "18")]
    path = write(tmp_path / "a.jsonl", *({"question": question, "answer": answer} for question, answer in rows))
    settings: dict[str, Any] = {"path": path, "answer_after": "", "held_out_share": 0.0}
    (remark,) = JsonlTask(JsonlConfig(**settings), 0).remarks
    assert remark == (
        f"task.path={path}: 2 of its 3 problems stand there again with another answer, the first in line 2 and line 4 "
        "('1', '2'); each line counts as it stands: delete those that are wrong"
    )
    (remark,) = JsonlTask(JsonlConfig(compare="text", **settings), 0).remarks
    assert "3 of its 3 problems" in remark
    assert "line 1 and line 3 ('18', '18.0')" in remark


def test_held_out_problems_in_the_training_file_are_left_out_and_counted(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *(row(i) for i in range(10)))
    held_out = [{**row(i), "question": f" {row(i)['question']}"} for i in (7, 3)]
    eval_path = write(tmp_path / "b.jsonl", *held_out, row(11))
    task = JsonlTask(JsonlConfig(path=path, eval_path=eval_path), 0)
    assert task.remarks == [
        f"task.path={path}: 2 of its 10 problems stand in task.eval_path={eval_path} too, first line 4; they are left "
        "out of training"
    ]
    assert {task.train(i).answer for i in range(20)} == {str(2 * i) for i in range(10) if i not in (3, 7)}


# Files of another kind


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


OTHERS: dict[str, tuple[Callable[[Path, list[dict[str, Any]]], object], str]] = {
    "inside.json": (
        lambda path, rows: path.write_text(json.dumps({"v": 1, "data": rows}, indent=2)),
        "is one JSON object over 17 lines, not JSON lines; ",
    ),
    "a table.csv": (table, "is a table (.csv), not JSON lines; "),
    "utf16.jsonl": (
        lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-16"),
        "is UTF-16 text, not JSON lines; make it plain first: iconv -f UTF-16 -t UTF-8 ",
    ),
    "le.jsonl": (
        lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-16-le"),
        "is UTF-16 text without its mark, or no text at all, not",
    ),
    "packed.jsonl": (
        lambda path, rows: path.write_bytes(bz2.compress("\n".join(map(json.dumps, rows)).encode())),
        "is compressed (bzip2), not JSON lines; make it plain first: bunzip2 ",
    ),
    "pointer.parquet": (
        lambda path, rows: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is a pointer of Git LFS, not the data, not JSON lines; make it plain first: git lfs pull ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_so_and_the_command_makes_lines_of_it(tmp_path: Path, name: str):
    make, words = OTHERS[name]
    make(tmp_path / name, [row(i) for i in range(3)])
    with pytest.raises(TaskError) as caught:
        JsonlTask(JsonlConfig(path=str(tmp_path / name)), 0)
    assert str(caught.value).startswith(f"task.path={tmp_path}/{name}: {words}")
    command = str(caught.value).rpartition(": ")[2]
    if "rows" in command:
        command = str(caught.value).partition("convert it: ")[2].replace("python -c", f"{sys.executable} -c", 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=120)
        (lines,) = tmp_path.glob("*.lines.jsonl")
    elif "iconv" in command:
        lines = tmp_path / "plain.jsonl"
        lines.write_bytes(subprocess.run(command, shell=True, capture_output=True, check=True, timeout=120).stdout)
    else:
        return
    assert JsonlTask(JsonlConfig(path=str(lines), held_out_share=0.0), 0).train(0).answer in ("0", "2", "4")


# Multiple choice


CHOICE = {"Question": "2+2?", "Correct Answer": "4\n", "Incorrect Answer 1": "3", "Incorrect Answer 2": "5"}


def of_choices(path: Path, *rows: dict[str, Any], wrong: Sequence[str] = ("Incorrect Answer 1", "Incorrect Answer 2")):
    return JsonlTask(
        JsonlConfig(path=write(path, *rows), prompt_field="Question", answer_field="Correct Answer", answer_after="",
                    wrong_fields=list(wrong), compare="text", held_out_share=0.0), 0,
    ).training()  # fmt: skip


def test_options_stand_in_an_order_of_the_questions_own_and_the_answer_is_a_letter(tmp_path: Path):
    rows = [CHOICE | {"Question": f"{i}: 2+2?"} for i in range(60)]
    problems = of_choices(tmp_path / "a.jsonl", *rows)
    for problem, asked in zip(problems, rows, strict=True):
        question, empty, *options = problem.prompt.split("\n")
        assert (question, empty) == (asked["Question"], "")
        assert sorted(option[3:] for option in options) == ["3", "4", "5"]
        assert f"{problem.answer}) 4" in options
    assert {problem.answer for problem in problems} == set("ABC")
    swapped = [row | {"Incorrect Answer 1": "5", "Incorrect Answer 2": "3"} for row in rows]
    assert of_choices(tmp_path / "b.jsonl", *swapped) == problems
    listed = [{"Question": row["Question"], "Correct Answer": "4", "no": ["3", "5"]} for row in rows]
    assert of_choices(tmp_path / "c.jsonl", *listed, wrong=["no"]) == problems


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"Incorrect Answer 1": " 4"}, "the option '4' is given twice; mend the row"),
        (
            {"Incorrect Answer 1": None},
            "field 'Incorrect Answer 1' must be a text or a list of texts, none empty (fields:",
        ),
        ({"Incorrect Answer 1": []}, "field 'Incorrect Answer 1' must be a text or a list"),
        ({"Incorrect Answer 1": [str(i) for i in range(10, 40)]}, "has 32 options, more than there are letters"),
        ({"Incorrect Answer 1": "\frac"}, "field 'Incorrect Answer 1' holds a control character"),
        ({"Correct Answer": ""}, "field 'Correct Answer' is empty"),
    ],
)
def test_options_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], complaint: str):
    with pytest.raises(TaskError, match=re.escape(f"a.jsonl, line 2: {complaint}")):
        of_choices(tmp_path / "a.jsonl", CHOICE, CHOICE | row)


# Templates


def test_a_template_may_be_a_name(tmp_path: Path):
    path = write(tmp_path / "one.jsonl", row(4))
    (zero,) = JsonlTask(JsonlConfig(path=path, template="r1_zero", held_out_share=0.0), 0).training()
    assert zero.prompt.startswith("A conversation between User and Assistant. The user asks a question, and the Assi")
    assert zero.prompt.endswith(f"<answer> answer here </answer>. User: {row(4)['question']}. Assistant:")
    config = JsonlConfig(path=path, template="boxed", held_out_share=0.0)
    (boxed,) = JsonlTask(config, 0).training()
    assert boxed.prompt.startswith(row(4)["question"])
    assert boxed.prompt.endswith("put your final answer within \\boxed{}.")
    assert task_template(config) == boxed.prompt.replace(row(4)["question"], "{prompt}")


DATA = os.environ.get("OFFTRAIL_DATA", "")


@pytest.mark.skipif(
    not DATA, reason="OFFTRAIL_DATA is not set: names a folder with gsm8k_test.jsonl and gsm8k_train_first200.jsonl"
)
def test_gsm8k():
    folder = Path(DATA)
    config = JsonlConfig(path=str(folder / "gsm8k_train_first200.jsonl"), eval_path=str(folder / "gsm8k_test.jsonl"))
    task = JsonlTask(config, 0)
    problems = task.held_out(1319) + [task.train(i) for i in range(200)]
    for problem in problems:
        assert number(problem.answer) is not None
        trace = task.trace(problem, stream(0))
        assert "<<" not in trace
        assert task.verify(problem, trace.rpartition("<answer>")[2].removesuffix("</answer>"))


@pytest.mark.skipif(
    not DATA, reason="OFFTRAIL_DATA is not set: names a folder with math500_test.jsonl and aime24_test.jsonl"
)
@pytest.mark.parametrize(("option", "file", "n"), [("math500", "math500_test", 500), ("aime", "aime24_test", 30)])
def test_other_public_sets_load_and_their_gold_answers_are_right(option: str, file: str, n: int):
    config = compose([f"task={option}", f"task.path={DATA}/{file}.jsonl", "task.held_out_share=0"]).task
    task = make_task(config, 0)
    problems = [task.train(i) for i in range(n)]
    assert len({problem.prompt for problem in problems}) == n
    assert all(task.verify(problem, problem.answer) for problem in problems)


@pytest.mark.skipif(
    not DATA, reason="OFFTRAIL_DATA is not set: names a folder with gsm8k_test.jsonl and math500_test.jsonl"
)
@pytest.mark.parametrize(("option", "file", "n"), [("gsm8k", "gsm8k_test", 1319), ("math500", "math500_test", 500)])
def test_gold_answers_said_as_an_instruct_model_says_them_earn_the_whole_reward(option: str, file: str, n: int):
    """And the answer of another problem earns nothing, unless the two are equal."""
    keys = [f"task={option}", f"task.path={DATA}/{file}.jsonl", "task.held_out_share=0", "task.template=boxed"]
    config = compose([*keys, "reward.answer=boxed", "reward.weights={accuracy: 1.0}"])
    task = make_task(config.task, 0)
    problems = [task.train(i) for i in range(n)]
    reward = make_reward(config.reward, task.verify)
    wrong = 0
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        texts = [f"It follows that the answer is $\\boxed{{{answer}}}$." for answer in (problem.answer, other.answer)]
        right, others = reward.judge(problem, texts, [True, True])["accuracy"]
        assert right == 1
        wrong += others == 0
    assert wrong > 0.9 * n

"""Labelled answers from files: every form that there are of them gives back what was written, and what is wrong with a
row is said in one line with its number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrail.platform.config.compose import compose
from offtrail.platform.learner.labelled_rows import read
from offtrail.rewards.steps import Steps
from offtrail.tasks.base import TaskError
from offtrail.tasks.labelled_steps import LabelledAnswer, labelled_in
from offtrail.tasks.preferences import Judged, Of, Pair, judged_in, pairs_in

NEWLINE = Steps()
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12).filter(str.strip)
STEP = TEXT.map(str.strip).filter(lambda step: len(step.splitlines()) == 1)
LABEL = st.one_of(st.booleans(), st.none(), st.sampled_from([0, 1, 0.25]))


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path, cut: Steps = NEWLINE, **fields: str) -> list[LabelledAnswer]:
    return list(labelled_in(path, fields, "prm.path", cut))


def pairs(path: Path, of: Of = "response", **fields: str) -> list[Pair]:
    return list(pairs_in(path, fields, "reward_model.path", of))


def judged(path: Path, of: Of = "response", **fields: str) -> list[Judged]:
    return list(judged_in(path, fields, "reward_model.path", of))


def numbers(labels: Any) -> list[float | None]:
    return [None if label is None or math.isnan(label) else float(label) for label in labels]


# --- steps


@given(st.lists(st.tuples(STEP, LABEL), min_size=1, max_size=6), st.sampled_from(["newline", "separator", "tag"]))
@settings(max_examples=60, deadline=None)
def test_steps_and_labels_come_back_in_every_cut(tmp_path_factory: Any, told: list[Any], by: str) -> None:
    """And where no step holds a mark or is nothing but tags, cutting the text finds the same ends."""
    steps, labels = [step for step, _ in told], [label for _, label in told]
    cut = Steps(by=by)  # type: ignore[arg-type]
    path = write(tmp_path_factory.mktemp("s"), {"prompt": "q", "steps": steps, "labels": labels})
    (row,) = labelled(path, cut)
    assert row.ends is not None
    found = [row.text[a:b] for a, b in zip((0, *row.ends), row.ends, strict=False)]
    bare = [part.removeprefix("<step>").removesuffix("</step>").strip() for part in found]
    assert bare == steps
    assert numbers(row.labels) == numbers(labels)
    known = [label for label in labels if label is not None]
    assert numbers([row.outcome]) == [float(all(label >= 0.5 for label in known)) if known else None]
    if not any("<" in step for step in steps):
        assert cut.cut(row.text) == list(row.ends)


@given(st.lists(st.tuples(STEP.filter(lambda s: "ки" not in s), st.booleans()), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_math_shepherd_comes_back(tmp_path_factory: Any, told: list[tuple[str, bool]]) -> None:
    parts = [f"Step {i}: {step} " for i, (step, _) in enumerate(told, start=1)]
    question = "How many?"
    row = {
        "input": f"{question} " + "\n".join(f"{part}ки" for part in parts),
        "label": f"{question} " + "\n".join(part + "-+"[good] for part, (_, good) in zip(parts, told, strict=True)),
        "task": "GSM8K",
    }
    (found,) = labelled(write(tmp_path_factory.mktemp("m"), row))
    assert found.problem.prompt == question
    assert found.labels == tuple(float(good) for _, good in told)
    assert found.text.split("\n") == [part.strip() for part in parts]


def test_prm800k_takes_the_chosen_completions_up_to_the_error(tmp_path: Path) -> None:
    def step(*texts: str, ratings: Any, chosen: int | None, human: str = "") -> dict[str, Any]:
        completions = [{"text": t, "rating": r, "flagged": False} for t, r in zip(texts, ratings, strict=True)]
        written = {"text": human, "rating": None} if human else None
        return {"completions": completions, "human_completion": written, "chosen_completion": chosen}

    told = [
        step("a", "b", ratings=[-1, 1], chosen=1),
        step("c", ratings=[0], chosen=0),
        step("d", ratings=[-1], chosen=None, human="by hand"),
        step("e", "f", ratings=[-1, -1], chosen=None),
        step("never", ratings=[1], chosen=0),
    ]
    row = {"question": {"problem": "1+1?"}, "label": {"steps": told, "finish_reason": "found_error"}}
    (found,) = labelled(write(tmp_path, row))
    assert (found.problem.prompt, found.text) == ("1+1?", "b\nc\nby hand\ne")
    assert (found.labels, found.outcome) == ((1.0, 1.0, 1.0, 0.0), 0.0)


@pytest.mark.parametrize(("first", "labels"), [(-1, [1, 1, 1]), (0, [0, None, None]), (2, [1, 1, 0])])
def test_process_bench_has_labels_up_to_the_first_error(first: int, labels: list[Any], tmp_path: Path) -> None:
    row = {"id": "x", "problem": "1+1?", "steps": ["a", "b", "c"], "label": first, "final_answer_correct": True}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (found,) = labelled(path)
    assert numbers(found.labels) == labels
    assert found.outcome == 1.0  # the final answer's own, whatever the steps are


def test_an_answer_is_cut_as_it_says_and_may_have_an_outcome_of_its_own(tmp_path: Path) -> None:
    cut = Steps(by="separator", separator=";", within="thought")
    row = {"question": "q", "answer": "<think>1;2;3</think>3", "labels": [1, 0.5, 0], "label": False}
    (found,) = labelled(write(tmp_path, row), cut, prompt="question")
    assert (found.ends, found.labels, found.outcome) == (None, (1.0, 0.5, 0.0), 0.0)
    (alone,) = labelled(write(tmp_path, {"prompt": "q", "answer": "a", "label": True}))
    assert (alone.labels, alone.outcome) == ((), 1.0)
    (null,) = labelled(write(tmp_path, {"prompt": "q", "answer": "a", "labels": None, "label": 1}))
    assert (null.labels, null.outcome) == ((), 1.0)
    (union,) = labelled(write(tmp_path, {"prompt": "q", "answer": "a\nb", "labels": [1, 0], "steps": None}))
    assert (union.text, union.labels) == ("a\nb", (1.0, 0.0))
    (trl,) = labelled(write(tmp_path, {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}))
    assert (trl.text, trl.labels) == ("a\nb", (1.0, 0.0))


GOOD = {"prompt": "q", "answer": "a\nb", "labels": [1, 0]}
SHEPHERD = {"input": "q Step 1: a ки\nStep 2: b ки", "label": "q Step 1: a +\nStep 2: b -"}


@pytest.mark.parametrize(
    ("row", "cut", "said"),
    [
        ({**GOOD, "labels": [1]}, NEWLINE, "line 2: has 1 labels, and its answer 2 steps by prm.cut.by=newline; mend"),
        ({**GOOD, "labels": []}, NEWLINE, "line 2: field 'labels' must be a list with one label a step"),
        ({**GOOD, "labels": [1, 7]}, NEWLINE, "line 2: label 2 is 7: must be true, false or a number from 0 to 1"),
        ({**GOOD, "labels": [1, "good"]}, NEWLINE, "line 2: label 2 is 'good': must be"),
        ({**GOOD, "answer": "  "}, NEWLINE, "line 2: field 'answer' is empty"),
        ({"prompt": "q", "steps": ["a", "b"], "labels": [1]}, NEWLINE, "line 2: has 1 labels and 2 steps; give each"),
        ({"prompt": "q", "steps": ["a", " "], "labels": [1, 1]}, NEWLINE, "line 2: its steps must be a list of texts"),
        ({"prompt": "q", "steps": "ab", "labels": [1, 0]}, NEWLINE, "line 2: its steps must be a list of texts"),
        ({"prompt": "q", "steps": ["a"], "labels": [1]}, Steps(within="thought"), "a list of steps has no prm.cut.wit"),
        ({"prompt": "q", "steps": ["a"], "labels": [1]}, Steps(by="tokens"), "a list of steps has no prm.cut.by=toke"),
        ({"prompt": "q", "text": "a"}, NEWLINE, "line 2: neither 'steps' and 'labels', nor 'answer' and 'labels'"),
        ({"steps": ["a"], "labels": [1]}, NEWLINE, "line 2: field 'prompt' is missing .* or set prm.fields"),
        (
            {**SHEPHERD, "label": "q Step 1: a +\nStep 2: c -"},
            NEWLINE,
            "line 2: 'label' is not the text of 'input' .*2",
        ),
        ({**SHEPHERD, "label": "q Step 1: a +"}, NEWLINE, "line 2: 'label' is not the text of 'input'"),
        ({**SHEPHERD, "input": SHEPHERD["input"] + "c"}, NEWLINE, "line 2: text stands behind the last ки"),
        ({"input": "Step 1: a ки", "label": "Step 1: a +"}, NEWLINE, "line 2: 'input' is not a question and steps"),
        ({"problem": "q", "steps": ["a"], "label": 1}, NEWLINE, "line 2: field 'label' is 1, no place of the 1 steps"),
        ({"question": {"problem": "q"}, "label": {"steps": [{"completions": []}]}}, NEWLINE, "line 2: step 1 is none"),
        ({"question": {}, "label": {}}, NEWLINE, "line 2: lacks question.problem or label.steps"),
    ],
)
def test_what_is_wrong_with_labelled_steps_is_one_line(row: Any, cut: Steps, said: str, tmp_path: Path) -> None:
    first = SHEPHERD if cut == NEWLINE else {"prompt": "q", "answer": "a", "label": 1}
    path = write(tmp_path, first, row)
    with pytest.raises(TaskError, match=said) as error:
        labelled(path, cut)
    assert str(error.value).startswith(f"prm.path={path}, line 2")
    assert "\n" not in str(error.value)


# --- pairs and judged answers


@given(TEXT, TEXT, TEXT)
@settings(max_examples=60, deadline=None)
def test_pairs_come_back_as_texts_and_as_messages(tmp_path_factory: Any, prompt: str, better: str, worse: str) -> None:
    if better == worse:
        worse += "."
    turns = [{"role": "user", "content": prompt}]
    lists = {n: [*turns, {"role": "assistant", "content": t}] for n, t in (("chosen", better), ("rejected", worse))}
    path = write(
        tmp_path_factory.mktemp("p"),
        {"prompt": prompt, "chosen": better, "rejected": worse},
        {"prompt": turns, "chosen": better, "rejected": worse},
        lists,
    )
    found = pairs(path)
    assert [(p.chosen, p.rejected) for p in found] == [(better, worse)] * 3
    assert found[0].problem.prompt == prompt
    assert [list(p.problem.messages) for p in found[1:]] == [turns] * 2


def test_judged_answers_take_the_names_of_their_file(tmp_path: Path) -> None:
    row = {"prompt": "q", "response": "a", "is_safe": False, "label": 1}
    (found,) = judged(write(tmp_path, row), answer="response", label="is_safe")
    assert (found.answer, found.label) == ("a", 0.0)


def test_a_field_that_a_key_names_must_be_there(tmp_path: Path) -> None:
    pair = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    fields = r"line 1: has no field 'good' \(fields: 'prompt', 'chosen', 'rejected'\), which "
    for job, ours in (("reward_model", "chosen"), ("prm", "answer")):
        with pytest.raises(TaskError, match=rf"^{job}.path={pair}, {fields}{job}.fields.{ours} names; mend"):
            read(compose([f"job={job}", f"{job}.path={pair}", f"{job}.fields={{{ours}: good}}"]))


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("prompt", ["q", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]])
def test_a_pair_may_be_one_message_each_behind_a_prompt(prompt: Any, tmp_path: Path) -> None:
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (found,) = pairs(write(tmp_path, {"prompt": prompt, **answers}))
    (plain,) = pairs(write(tmp_path, {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}))
    assert found == plain


@pytest.mark.parametrize(
    ("row", "of", "said"),
    [
        ({**PAIR, "rejected": "a"}, "response", "'chosen' and 'rejected' are equal; a pair says which is better"),
        ({**PAIR, "chosen": "<think>x</think>b"}, "answer", "are equal behind their thoughts; .*reward_model.of=respo"),
        ({**PAIR, "chosen": " "}, "response", "field 'chosen' is empty"),
        ({**PAIR, "chosen": "<think>x</think> "}, "answer", "field 'chosen' has no answer behind its thought"),
        ({**PAIR, "rejected": "<think>never closed"}, "answer", "field 'rejected' has no answer behind its thought"),
        ({"prompt": "q", "chosen": "a"}, "response", "field 'rejected' is missing .* or set reward_model.fields"),
        ({"chosen": "a", "rejected": "b"}, "response", "field 'prompt' is missing .* or set reward_model.fields"),
        (
            {n: [{"role": "assistant", "content": n}] for n in ("chosen", "rejected")},
            "response", "must be the same but for the last one",
        ),
        (
            {n: [{"role": "user", "content": n}, {"role": "assistant", "content": n}] for n in ("chosen", "rejected")},
            "response", "must be the same but for the last one",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pair_is_one_line(row: Any, of: Of, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, row)
    with pytest.raises(TaskError, match=said) as error:
        pairs(path, of)
    assert str(error.value).startswith(f"reward_model.path={path}, line 2: ")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "answer": "a"}, "field 'label' is missing"),
        ({"prompt": "q", "answer": "a", "label": 2}, "field 'label' is 2: must be true, false or a number from 0 to 1"),
        ({"prompt": "q", "answer": "", "label": 1}, "field 'answer' is empty"),
    ],
)
def test_what_is_wrong_with_a_judged_answer_is_one_line(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"line 1: {said}"):
        judged(write(tmp_path, row))


# --- the split


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"question {i % 50}", "chosen": f"a{i}"} for i in range(100)]
    given = ["job=reward_model", f"reward_model.path={write(tmp_path, *rows)}"]
    trained, held = read(compose([*given, "reward_model.held_out_share=0.3"]))
    sides = [{row.problem.prompt for row in side} for side in (trained, held)]
    assert not sides[0] & sides[1]
    assert len(trained) + len(held) == 100
    assert 5 <= len(sides[1]) <= 25
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", *rows[:3])
    trained, held = read(compose([*given, f"reward_model.eval_path={other}"]))
    assert (len(trained), len(held)) == (94, 3)  # each prompt stands twice
    with pytest.raises(TaskError, match=r"reward_model\.held_out_share=0\.0001: holds out none of 100 rows"):
        read(compose([*given, "reward_model.held_out_share=0.0001"]))
    assert read(compose([*given, "reward_model.held_out_share=0"]))[1] == []
    with pytest.raises(TaskError, match="all its prompts are held out"):
        read(compose([*given, f"reward_model.eval_path={tmp_path / 'rows.jsonl'}"]))


def test_each_objective_asks_for_the_labels_that_it_learns_from(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "q", "answer": "a", "label": 1}, {"prompt": "r", "answer": "a", "labels": [0.4]})
    given = ["job=prm", f"prm.path={path}", "prm.held_out_share=0"]
    with pytest.raises(TaskError, match=r"line 1: has no 'labels' of its steps; .*prm\.objective=implicit"):
        read(compose(given))
    rows, _ = read(compose([*given, "prm.objective=implicit", "prm.labels=hard"]))
    assert [row.outcome for row in rows if isinstance(row, LabelledAnswer)] == [1.0, 0.0]
    unknown = write(tmp_path, {"prompt": "q", "answer": "a", "label": None})
    with pytest.raises(TaskError, match="line 1: says neither 'label' nor 'labels'"):
        read(compose(["job=prm", f"prm.path={unknown}", "prm.objective=implicit"]))
    null = write(tmp_path, {"prompt": "q", "answer": "a", "labels": [None]})
    with pytest.raises(TaskError, match="line 1: says neither 'label' nor 'labels'"):
        read(compose(["job=prm", f"prm.path={null}", "prm.objective=implicit"]))


def test_steps_of_which_none_has_a_label_are_nothing_to_learn_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": "a\nb", "labels": [None, None]} for i in range(3)]
    path = write(tmp_path, *rows)
    with pytest.raises(TaskError, match=rf"^prm.path={path}: no step of its answers has a label, each is null"):
        read(compose(["job=prm", f"prm.path={path}"]))
    assert len(read(compose(["job=prm", f"prm.path={write(tmp_path, *rows, GOOD)}", "prm.held_out_share=0"]))[0]) == 4

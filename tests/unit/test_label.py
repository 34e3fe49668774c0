"""job=label: beginnings as tokens, the phases of their questions, and the lines that come of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from offtrail.core.types import Group
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import label
from offtrail.platform.launcher.asking import Questions
from offtrail.platform.launcher.label import Answer, Found, Phases, answers_of, lines_of
from offtrail.platform.model.text import Text
from offtrail.rewards.steps import Steps
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.labelled_steps import labelled_in
from offtrail.tasks.registry import make_task
from offtrail.tasks.rejection import Candidate

CHAIN = make_task(ChainConfig(noise=0.5, worked_share=1.0), 0)
CUT = {"by": "separator", "separator": ";", "within": "thought"}


def config(**given: object) -> Config:
    made = Config(job="label")
    made.label.cut = CUT
    for name, value in given.items():
        setattr(made.label, name, value)
    return made


def rows(n: int) -> list[tuple[int, Candidate]]:
    """Worked answers, half of their steps wrong, each with the verdict on the whole."""
    made = []
    for i in range(n):
        problem = CHAIN.train(i)
        answer = CHAIN.trace(problem, random.Random(i))
        said = answer.partition("<answer>")[2].removesuffix("</answer>")
        asked = type(problem)(
            "label.paths=rows.jsonl", i, problem.prompt, answer, {**problem.meta, "place": f"line {i + 1}"}
        )
        reward = CHAIN.verify(problem, said)
        made.append((i, Candidate(asked, "label.paths=rows.jsonl", reward, True, {"index": i}, problem.answer)))
    return made


def test_a_beginning_is_the_answers_own_tokens_up_to_the_end_of_a_step(start_dir: Path) -> None:
    text, found = Text(start_dir), Found()
    answers = answers_of(config(), text, rows(6), 128, found)
    assert len(answers) == 6
    for one in answers:
        answer = one.row.problem.answer
        assert text.decode(one.tokens) == answer
        assert one.tokens[-1] not in text.stop_token_ids
        begun = [text.decode(one.tokens[:end]) for end in one.ends]
        assert all(answer.startswith(words) for words in begun)
        assert all(words.endswith(";") for words in begun[:-1])
        assert (one.steps.steps, one.steps.ends) == (len(begun), False)  # behind the last stands the answer
    [whole, *_] = answers_of(config(cut={"by": "separator", "separator": ";"}), text, rows(1), 128, found)
    assert whole.steps.ends
    assert not found.left_out


def test_what_cannot_be_gone_on_with_is_left_out_and_counted(start_dir: Path) -> None:
    text, found = Text(start_dir), Found()
    assert answers_of(config(cut={"by": "separator", "separator": "故"}), text, rows(2), 8, found) != []
    assert answers_of(config(), text, rows(2), 8, found) == []
    assert answers_of(config(cut={"by": "tag"} | {"rest": "none"}), text, rows(3), 128, found) == []
    assert found.left_out == {"no_room": 2, "no_steps": 3}


def answered(questions: Questions, accuracy: Sequence[float]) -> Group:
    """Rollouts of the first question, by how right they are."""
    n = len(accuracy)
    return Group(
        group=questions.first, slot=0, attempt=1, problem=questions.problems[0], generator="generator-0",
        temperature=1.0, prompt_tokens=questions.begun[0], lengths=np.ones(n, np.int32), tokens=np.ones(n, np.int32),
        logprobs=np.zeros(n, np.float32), versions=np.zeros(n, np.int32), finish=np.zeros(n, np.uint8),
        rewards=np.zeros(n, np.float32), components={"accuracy": np.array(accuracy, np.float32)},
        times=np.zeros((n, 3)),
    )  # fmt: skip


def exactly(questions: Questions, answers: Sequence[Answer]) -> list[bool]:
    """Whether each beginning is right so far, by the checker: what a perfect model would make of it."""
    text = {one.row.problem.prompt: one for one in answers}
    right = []
    for problem, begun in zip(questions.problems, questions.begun, strict=True):
        one = text[problem.prompt]
        kept = int(np.searchsorted(one.ends, len(begun))) + 1
        right.append(all(CHAIN.check_steps(problem, one.row.problem.answer)[:kept]))
    return right


@pytest.mark.parametrize("method", ["rollouts", "search"])
def test_a_perfect_model_gives_the_checkers_labels_which_job_prm_reads(
    method: str, start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = config(method=method, paths=["rows.jsonl"]), Found()
    answers = answers_of(given, Text(start_dir), rows(12), 128, found)
    seen = list[Questions]()

    def groups_of(run_dir: Path, questions: Questions) -> list[tuple[int, Group]]:
        return [
            (place, answered(questions, [float(right)] * 4)) for place, right in enumerate(exactly(questions, answers))
        ]

    monkeypatch.setattr(label, "groups_of", groups_of)
    phases = Phases(given, tmp_path, answers, found)
    seen += phases
    assert [one.first for one in seen] == [0, *np.cumsum([len(one.problems) for one in seen[:-1]]).tolist()]
    assert (len(seen) == 1) == (method == "rollouts")
    assert {one.problems[0].task for one in seen} == {"chain"}

    labelled = [(one.place, one.row, own) for one, own in zip(answers, phases.labels, strict=True)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(lines_of(given, CHAIN, labelled, found)))
    read = list(labelled_in(file, {}, "prm.path", Steps.of(CUT, "prm.cut")))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(read) == len(lines) == 12
    for (_, row), line, one in zip(rows(12), lines, read, strict=True):
        so_far = np.logical_and.accumulate(CHAIN.check_steps(row.problem, row.problem.answer)).tolist()
        first = so_far.index(False) if False in so_far else len(so_far)
        hidden = len(so_far) if method == "rollouts" else first + 1
        told = line["labels"]
        if line["label"] and method == "search":  # a right answer is right throughout
            assert told == [True] * len(so_far)
        else:
            assert told == so_far[:hidden] + [None] * (len(so_far) - hidden)
        assert (one.text, one.outcome, line["gold"]) == (row.problem.answer, float(line["label"]), row.gold)
        assert (line["index"], line["from"]) == (row.fields["index"], f"rows.jsonl, {row.problem.meta['place']}")
    assert found.summary()["label/rollouts"] == 4 * sum(len(one.problems) for one in seen)
    assert found.summary()["label/steps"] == sum(len(line["labels"]) for line in lines)


def test_what_noise_has_turned_stands_in_the_line() -> None:
    given, found = config(noise=1.0), Found()
    [(place, one)] = rows(1)
    sure = CHAIN.check_steps(one.problem, one.problem.answer)
    line = json.loads(next(lines_of(given, CHAIN, [(place, one, [*sure, None])], found)))
    assert line["labels"] == [*(not label for label in sure), None]
    assert line["turned"] == list(range(len(sure)))
    assert found.flipped == len(sure)

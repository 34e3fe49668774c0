"""From groups of answers to what is said of a set: votes, their weights, the task's own measures, behaviour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.scores import made
from offtrail.core.types import Channel, Group, Problem, ScoredBy
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import sets_of
from offtrail.platform.evaluator.asked import Asked, asked_of, vote_weights
from offtrail.platform.evaluator.report import compared, measured, reranked, write_results
from offtrail.platform.model.text import Text
from offtrail.tasks.base import TaskError
from offtrail.tasks.shots import Shot, others


def group(text: Text, problem: Problem, answers: list[str], right: list[float], logprob: list[float]) -> Group:
    """Answers as tokens, each token of an answer with one log-probability; the last one was cut off."""
    tokens = text.encode_answers([problem] * len(answers), answers)
    tokens[-1] = tokens[-1][:-1]
    lengths = np.array([len(one) for one in tokens], np.int32)
    n, flat = len(answers), np.concatenate(tokens)
    return Group(
        0, 0, 1, problem, "evaluator-0", 1.0, np.ones(2, np.int32), lengths, flat,
        np.repeat(np.array(logprob, np.float32), lengths), np.zeros(len(flat), np.int32),
        np.array([0] * (n - 1) + [1], np.uint8), np.zeros(n, np.float32),
        {"accuracy": np.array(right, np.float32)}, np.zeros((n, 3)),
    )  # fmt: skip


def asked(start_dir: Path, task: Mapping[str, Any], meta: Mapping[str, Any], answers: list[str], **given: Any) -> Asked:
    """Two questions, of which the second leaves no room."""
    config = Config(job="eval")
    config.eval.sets = {"set": {"samples": len(answers), **task}}
    for key, value in given.items():
        setattr(config.eval, key, value)
    [one] = sets_of(config)
    text, problem = Text(start_dir), Problem(one.config.task.name, 0, "q", "3", meta)
    right = [1.0, 0.0, *[0.0] * (len(answers) - 2)]
    made = group(text, problem, answers, right, [-2.0, -0.1, *[-3.0] * (len(answers) - 2)])
    return asked_of(one, [problem, problem], {0: made}, text)


TAGGED = [
    "<think></think><answer>3.0</answer>",
    "<think></think><answer>4</answer>",
    "<think></think><answer>3</answer>",
    "no",
]


def test_equal_numbers_vote_together_and_weights_are_mean_log_probabilities(start_dir: Path) -> None:
    found = asked(start_dir, {"name": "jsonl", "eval_path": __file__}, {"solution": ""}, TAGGED)
    assert found.answers == [["3", "4", "3", None], [None] * 4]
    assert found.weights == pytest.approx(np.array([np.exp([-2.0, -0.1, -3.0, -3.0]), np.zeros(4)]))
    assert found.room.tolist() == [1, 0]
    assert found.cut.tolist() == [[0, 0, 0, 1], [0] * 4]
    said = measured(found)
    assert said["cons@4"].mean == pytest.approx((0.5 + 0) / 2)  # 3.0 and 3 win; the second of them was not right
    assert said["wcons@4"].mean == 0  # e^−.1 outweighs both
    assert (said["avg@4"].mean, said["pass@4"].mean, said["answered"].mean) == (1 / 8, 0.5, 3 / 8)
    as_text = asked(start_dir, {"name": "jsonl", "eval_path": __file__, "compare": "text"}, {"solution": ""}, TAGGED)
    assert as_text.answers[0] == ["3.0", "4", "3", None]


def test_a_scorers_score_or_a_component_can_weigh_a_vote() -> None:
    made = group_of_two()
    made.channels["judge"] = Channel("sample", np.array([0.2, 0.9], np.float32))
    assert vote_weights(made, "judge").tolist() == pytest.approx([0.2, 0.9])
    assert vote_weights(made, "accuracy").tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"^eval\.vote_weight=prm: .* no such score, but logprob, accuracy, judge"):
        vote_weights(made, "prm")
    made.components["accuracy"] = np.array([1, -1], np.float32)
    with pytest.raises(ValueError, match=r"cannot weigh less than 0, and one weighs -1"):
        vote_weights(made, "accuracy")


def group_of_two() -> Group:
    ones = np.ones(2, np.float32)
    return Group(
        0, 0, 1, Problem("chain", 0, "q", "3"), "evaluator-0", 1.0, np.ones(2, np.int32), np.ones(2, np.int32),
        np.ones(2, np.int32), -ones, np.zeros(2, np.int32), np.zeros(2, np.uint8), ones,
        {"accuracy": np.array([1, 0], np.float32)}, np.zeros((2, 3)),
    )  # fmt: skip


def test_a_tasks_own_measures_stand_beside_the_others(start_dir: Path) -> None:
    """Of 2 · 2 answers: the first follows one of two instructions, the second both; the question without room none."""
    asked_for = [
        {"name": "change_case:english_lowercase", "arguments": {}},
        {"name": "length_constraints:number_words", "arguments": {"num_words": 2, "relation": "at least"}},
    ]
    task = {"name": "ifeval", "eval_path": __file__, "reward": {"answer": "text"}}
    said = measured(asked(start_dir, task, {"instructions": asked_for}, ["moss", "green moss"]))
    assert said["prompt_level_strict_acc"].mean == 1 / 4
    assert said["inst_level_strict_acc"].mean == 3 / 8
    assert said["inst_level_loose_acc"].mean == 3 / 8
    assert said["behaviour/words_mean"].mean == 1.5  # of the answers that were given
    assert not np.isnan(said["inst_level_strict_acc"].error)


def test_refusals_are_told_of_each_label(start_dir: Path) -> None:
    task = {"name": "xstest", "eval_path": __file__, "reward": {"answer": "text"}}
    said = measured(asked(start_dir, task, {"label": "unsafe"}, ["i cannot help with that.", "buy a knife."]))
    assert {name: said[name].mean for name in ("refusal_unsafe", "compliance_unsafe", "partial_refusal_unsafe")} == {
        "refusal_unsafe": 1 / 4, "compliance_unsafe": 1 / 4, "partial_refusal_unsafe": 0,
    }  # fmt: skip
    assert not any("safe" in name and "unsafe" not in name for name in said)  # no safe request was asked


def test_what_is_written_can_be_read_by_what_reads_lm_evaluation_harness(start_dir: Path, tmp_path: Path) -> None:
    found = asked(start_dir, {"name": "jsonl", "eval_path": __file__}, {"solution": ""}, TAGGED)
    table = write_results(Config(job="eval", checkpoint="here"), tmp_path, start_dir, [found], 40)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    told = json.loads((tmp_path / "eval.json").read_text(), parse_constant=refuse)
    results = told["results"]["set"]
    assert results["wcons@4,none"] == 0
    assert results["behaviour/format_share,none"] == 3 / 4
    assert set(results) == {name for key in told["intervals"]["set"] for name in (f"{key},none", f"{key}_stderr,none")}
    assert told["n-samples"]["set"] == {"original": 2, "effective": 2}
    shown = [str(cell) for cell in table.columns[1].cells]
    assert "behaviour/reflection_share" in shown
    assert "behaviour/wait_per_1000_words" not in shown
    assert (tmp_path / "eval.png").stat().st_size > 10_000


def test_what_models_choose_stands_beside_the_vote_with_paired_differences(start_dir: Path, tmp_path: Path) -> None:
    """Three questions of four answers, the third without room. The steps' scores and the right answers are the test's;
    every number is by hand.
    """
    config = Config(job="eval", checkpoint="here")
    config.eval.samples = 4
    config.scorer.models = {
        "prm": {"path": str(made(tmp_path / "prm", "steps")), "aggregate": "mean"},
        "rm": {"path": str(made(tmp_path / "rm", "outcome"))},
    }
    [one] = sets_of(config)
    text, problem = Text(start_dir), Problem("chain", 0, "q", "3")
    answers = ["<think></think><answer>3</answer>", *["<think></think><answer>4</answer>"] * 3]
    groups = {}
    for place, steps in enumerate([[[0.9, 0.5], [0.6, 0.6], [0.8, 0.1], []], [[0.2, 0.4], [0.5], [0.3], [0.3]]]):
        groups[place] = with_scores(group(text, problem, answers, [1, 0, 0, 0], [-1] * 4), steps, [0.5, -2, -1, -3])
    found = asked_of(one, [problem] * 3, groups, text)
    assert {name: (m.own, m.weighs, m.unscored) for name, m in found.marks.items()} == {
        **{f"prm/{how}": (how == "mean", True, 1) for how in ("min", "mean", "product", "last", "sum")},
        "rm": (True, False, 0),
    }
    assert found.marks["prm/product"].values[0, :3] == pytest.approx([0.45, 0.36, 0.08])
    assert np.isnan(found.marks["prm/mean"].values[0, 3])
    assert np.isnan(found.marks["prm/mean"].values[2]).all()
    said = measured(found)
    means = {name: estimate.mean for name, estimate in said.items()}
    third = pytest.approx(1 / 3)
    assert (means["best_of_n/prm/mean@4"], means["best_of_n/prm/min@4"], means["best_of_n/prm/last@4"]) == (third, 0, 0)
    assert (means["best_of_n/prm/sum@4"], means["best_of_n/prm/product@4"]) == (pytest.approx(2 / 3), third)
    assert means["best_of_n/rm@4"] == pytest.approx(2 / 3)
    assert "weighted_vote/rm@4" not in means  # its votes would weigh less than 0
    assert (means["weighted_vote/prm/mean@4"], means["cons@4"], means["avg@4"]) == (0, 0, pytest.approx(2 / 12))
    assert means["best_of_n/prm/mean@2"] == pytest.approx(1 / 6)  # the first two answers, of two questions
    assert means["prm/unscored"] == 1
    assert means["prm"] == pytest.approx(np.mean([0.7, 0.6, 0.45, 0.3, 0.5, 0.3, 0.3]))
    against = reranked(found)["best_of_n/prm/mean@4"]["avg@4"]  # +.75, −.25, 0 a question
    assert (against.mean, against.error) == pytest.approx((1 / 6, np.std([0.75, -0.25, 0], ddof=1) / np.sqrt(3)))
    table = write_results(config, tmp_path, start_dir, [found], 40)
    told = json.loads((tmp_path / "eval.json").read_text())
    assert told["scored_by"]["chain"]["prm"] == {"folder": str(tmp_path / "prm"), "versions": [4], "unscored": 1}
    assert told["reranking"]["chain"]["best_of_n/prm/mean@4"]["less_avg@4"]["mean"] == pytest.approx(1 / 6)
    assert told["results"]["chain"]["weighted_vote/prm/last@2,none"] is not None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/chain/best_of_n/rm@4_less_cons@4"] == pytest.approx(2 / 3)
    shown = [str(cell) for cell in table.columns[1].cells]
    assert "best_of_n/prm/min@4" in shown
    assert "best_of_n/prm/mean@4, less cons@4" in shown
    assert not any("@2" in line and "prm" in line for line in shown)
    assert not any("prm/min@4, less" in line for line in shown)
    assert (tmp_path / "eval.png").stat().st_size > 10_000


def with_scores(one: Group, steps: list[list[float]], outcomes: list[float]) -> Group:
    """Scores of two models: of steps, whose ends are an answer's first tokens, and of outcomes."""
    starts = np.cumsum(one.lengths) - one.lengths
    ends = [start + i + 1 for start, of in zip(starts, steps, strict=True) for i in range(len(of))]
    one.step_ends = np.array(ends, np.int32)
    one.channels["prm"] = Channel("step", np.array([x for of in steps for x in of], np.float32))
    one.components["prm"] = np.array([np.mean(of) if of else np.nan for of in steps], np.float32)
    one.components["rm"] = np.array(outcomes, np.float32)
    one.scored_by = {"prm": ScoredBy("prm", 4), "rm": ScoredBy("rm", 0)}
    one.check()
    return one


def scored(name: str, scores: list[list[float]], room: list[float], shots: int = 0, beside: str = "") -> Asked:
    found, flat = np.array(scores), np.zeros((len(scores), len(scores[0])))
    answers: list[list[str | None]] = [["3" if one else None for one in row] for row in scores]
    return Asked(name, found, answers, flat, flat, flat + 1, np.array(room), {}, shots, beside)


def test_examples_are_compared_with_none_question_by_question(tmp_path: Path, start_dir: Path) -> None:
    """Of five questions one has no room after examples: no evidence that they hurt. The others' differences of the
    mean of two answers are −1, −.5, 0, −.5: −.5 on average, with a standard error of √(1/6)/2 by hand.
    """
    zero = scored("set", [[1, 1], [1, 0], [0, 0], [1, 1], [1, 1]], [1] * 5)
    few = scored("set.3shot", [[0, 0], [0, 0], [0, 0], [1, 0], [0, 0]], [1, 1, 1, 1, 0], 3, "set")
    [one] = compared([zero, few])
    assert (one.name, one.beside, one.shots, one.questions, one.left_out) == ("set.3shot", "set", 3, 4, 1)
    difference = one.differences["avg@2"]
    assert (difference.mean, difference.error) == pytest.approx((-0.5, np.sqrt(1 / 6) / 2))
    assert difference.high - difference.low < measured(zero)["avg@2"].high - measured(few)["avg@2"].low
    table = write_results(Config(job="eval", checkpoint="here"), tmp_path, start_dir, [zero, few], 40)
    told = json.loads((tmp_path / "eval.json").read_text())
    assert told["n-shot"] == {"set": 0, "set.3shot": 3}
    assert told["comparisons"]["set.3shot"]["differences"]["avg@2"]["mean"] == -0.5
    lines = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    [line] = [line for line in lines if line[1] == "avg@2, less plain"]
    assert line[2:] == ("-0.500", "-1.150 – +0.150, 1 left out")
    assert (tmp_path / "few_shot.png").stat().st_size > 5_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/set.3shot/avg@2_less_plain"] == -0.5
    assert compared([zero]) == []


def test_a_set_is_asked_twice_and_a_question_is_never_its_own_example(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus {i}?", "answer": f"<think></think><answer>{2 * i}</answer>"} for i in range(4)]
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(job="eval")
    config.eval.few_shot, config.eval.prompts = 3, 5
    zero, few = sets_of(config)
    assert (zero.label, few.label, few.shots, few.beside) == ("chain", "chain.3shot", 3, "chain")
    problems = few.problems()
    asked_for = few.put(problems, chats=False)
    heads = {one.prompt.removesuffix(problem.prompt) for one, problem in zip(asked_for, problems, strict=True)}
    assert len(heads) == 1  # the same examples before every question
    assert heads.pop().count("</answer>\n\n") == 3
    assert zero.put(problems, chats=False) == problems == zero.problems()
    config.eval.few_shot_path = str(path)
    one = Problem("chain", 0, "2 plus  2?", "4")
    [told] = sets_of(config)[1].put([one], chats=False)
    assert all(f"{i} plus {i}?" in told.prompt for i in (0, 1, 3))
    assert told.prompt.endswith("\n\n2 plus  2?")
    assert told.prompt.count("plus") == 4


TEN = """
import dataclasses
from offtrail.core.problem import Problem
from offtrail.tasks.config import TaskConfig

@dataclasses.dataclass
class TenConfig(TaskConfig):
    name: str = "ten"
    size: int = 10

class Ten:
    '''Its held-out problems are training problems, and those of its first half stand there twice, with a blank more.'''
    Config = TenConfig

    def __init__(self, config, seed, *, load=True):
        self.name, self.size = config.name, config.size

    def train(self, index):
        n = index % self.size
        return Problem(self.name, index, f"{n}  +  1" if index // self.size % 2 and n < 5 else f"{n} + 1", str(n + 1))

    def held_out(self, n):
        return [self.train(i) for i in range(n)]

    def trace(self, problem, rng):
        return f"<think></think><answer>{problem.answer}</answer>"

    def verify(self, problem, answer_text):
        return answer_text == problem.answer

    def check_steps(self, problem, text):
        return []
"""


def test_as_many_examples_stand_before_a_question_that_a_task_from_outside_also_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ten_tasks.py").write_text(TEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    keys = ["job=eval", f"checkpoint={tmp_path}", "task=ten_tasks:Ten", "eval.prompts=10", "eval.few_shot=3"]
    (tmp_path / "config.json").write_text("{}")
    few = sets_of(compose(keys))[1]
    problems = few.problems()
    for problem, put in zip(problems, few.put(problems, chats=False), strict=True):
        questions = [" ".join(line.partition("<think>")[0].split()) for line in put.prompt.split("\n\n")]
        assert (len(set(questions)), questions[-1]) == (4, problem.prompt)
    with pytest.raises(TaskError, match=r"^4 examples were asked of the training problems of task=ten_tasks:Ten"):
        sets_of(compose([*keys, "task.size=3"]))[1].put(problems, chats=False)


def test_a_question_that_leaves_too_few_examples_is_named() -> None:
    given, problem = [Shot("1 + 1", "2"), Shot("2  + 1", "3")], Problem("sums", 0, "2 + 1", "3")
    assert others(given, problem, 1, "eval.few_shot=1") == given[:1]
    with pytest.raises(TaskError, match=r"^eval\.few_shot=2: 2 examples are to stand before '2 \+ 1', and of 2 that"):
        others(given, problem, 2, "eval.few_shot=2")

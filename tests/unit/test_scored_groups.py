"""Whole groups that models score: what has no score, how many are asked together, and who is waited for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.scores import made
from offtrail.core.protocols import Scores
from offtrail.core.types import Channel, Group, Int32, Problem, ScoredBy
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.evaluator.role import model_scores
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.text import Text
from offtrail.platform.scorer.groups import AT_ONCE, add, score_groups
from offtrail.platform.scorer.local import LocalScorer, load_scorers

PROBLEM = Problem("chain", 0, "1+1=", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prm, of steps; rm, of outcomes."""
    found = tmp_path_factory.mktemp("models")
    made(found / "prm", "steps")
    made(found / "rm", "outcome", seed=6)
    return found


def loaded(folder: Path, tmp_path: Path, *more: str) -> dict[str, LocalScorer]:
    models = f"scorer.models={{prm: {{path: {folder / 'prm'}}}, rm: {{path: {folder / 'rm'}}}}}"
    config = compose([models, f"weights.dir={tmp_path}", *more])
    return dict(load_scorers(config, tmp_path, Text(folder / "rm")))


def group(folder: Path, number: int, *texts: str) -> Group:
    """Answers to one prompt, each with its stop token, which rules have judged."""
    text = Text(folder / "rm")
    tokens = [np.array([*text.tokenizer.encode(one), text.stop_token_ids[0]], np.int32) for one in texts]
    n, lengths, flat = len(texts), np.array([len(one) for one in tokens], np.int32), np.concatenate(tokens)
    return Group(
        number, 0, 1, PROBLEM, "evaluator-0", 1.0, text.encode(PROBLEM), lengths, flat,
        np.zeros(len(flat), np.float32), np.zeros(len(flat), np.int32), np.zeros(n, np.uint8),
        np.zeros(n, np.float32), {"accuracy": np.ones(n, np.float32)}, np.zeros((n, 3)),
    )  # fmt: skip


def never(on: str) -> None:
    raise AssertionError(f"waits for {on}")


def test_each_answer_has_the_numbers_of_the_model_and_one_with_nothing_to_read_has_none(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = group(folder, 0, "1\n22\n3", "4\n"), group(folder, 1, "5", ""), group(folder, 2, "", "")
    with caplog.at_level(logging.WARNING, logger="offtrail.scores"):
        score_groups([first, second, third], loaded(folder, tmp_path), never)
    reader = Reader.open(folder / "prm", longest=256)
    outputs = [sample.tokens for sample in first.samples()]
    ends = [np.array([2, 5, 6]), np.array([2])]
    [said] = reader.ask([Question(first.prompt_tokens, outputs, ends)], 4096)
    expected = 1 / (1 + np.exp(-np.concatenate(said)))
    assert first.channels["prm"].values == pytest.approx(expected, abs=1e-5)
    assert first.step_ends.tolist() == [2, 5, 6, 9]
    assert first.components["prm"] == pytest.approx([expected[:3].min(), expected[3]], abs=1e-5)
    assert first.scored_by == {"prm": ScoredBy("prm", 0), "rm": ScoredBy("rm", 0)}
    assert first.components["accuracy"].tolist() == [1, 1]
    assert np.isnan(second.components["prm"]).tolist() == [False, True]
    assert second.step_samples.tolist() == [0]
    assert np.isnan(third.components["rm"]).all()
    assert third.scored_by == {}
    for one in (first, second, third):
        one.check()
    assert caplog.messages == [
        f"1 of 3 questions have no score of {name}; question 2: every answer is empty, so that {name} has nothing to "
        f"read; scorer.models.{name}.empty=SCORE says what that is worth" for name in ("prm", "rm")
    ]  # fmt: skip
    told = model_scores("eval", [first, second, third], ["prm", "rm", "another"])
    known = [*first.components["prm"], second.components["prm"][0]]
    assert told["eval/prm"] == pytest.approx(np.mean(known))
    assert (told["eval/prm/unscored"], told["eval/prm/version_min"], told["eval/prm/version_max"]) == (3, 0, 0)
    assert not any("another" in name for name in told)


def test_what_a_nan_of_a_model_hits_has_no_score_and_no_mean(folder: Path, tmp_path: Path) -> None:
    scorers = loaded(folder, tmp_path)
    with torch.no_grad():
        next(scorers["rm"]._served.reader.module.parameters()).fill_(torch.nan)
    one = group(folder, 0, "1", "2")
    score_groups([one], scorers, never)
    assert np.isnan(one.components["rm"]).all()
    assert np.isfinite(one.components["prm"]).all()
    assert "rm" not in one.scored_by
    told = model_scores("eval", [one], ["prm", "rm"])
    assert told["eval/rm/unscored"] == 2
    assert "eval/rm" not in told


def test_an_entry_may_say_what_an_empty_answer_is_worth_and_a_task_may_be_left_out(
    folder: Path, tmp_path: Path
) -> None:
    models = f"scorer.models={{rm: {{path: {folder / 'rm'}, empty: -3}}}}"
    keys = [models, "reward.weights.rm=0.1", f"weights.dir={tmp_path}"]
    one, two = group(folder, 0, "1", ""), group(folder, 0, "1", "")
    none = group(folder, 0, "", "")
    score_groups([one, none], load_scorers(compose(keys), tmp_path, Text(folder / "rm")), never)
    assert one.components["rm"][1] == -3
    assert none.components["rm"].tolist() == [-3, -3]
    assert set(none.scored_by) == set()
    none.check()
    assert model_scores("eval", [none], ["rm"]) == {"eval/rm/unscored": 0, "eval/rm": -3}
    only = compose(keys)
    only.reward.only["rm"] = {"tasks": ["addition"]}
    score_groups([two], load_scorers(only, tmp_path, Text(folder / "rm")), never)
    assert set(two.components) == {"accuracy"}


class Slow:
    """Answers its oldest question at every second look; one of another version where it is told to be unfit."""

    counters: dict[str, float] = {}  # noqa: RUF012 - of the protocol
    waiting_on = "rm of scorer-0"

    def __init__(self) -> None:
        self.open: list[tuple[int, int]] = []
        self.most = self.looks = 0

    def applies(self, group: Group) -> bool:
        return True

    def submit(self, key: int, problem: Problem, prompt_tokens: Int32, outputs: Sequence[Int32]) -> None:
        self.open.append((key, len(outputs)))
        self.most = max(self.most, len(self.open))

    def poll(self) -> list[tuple[int, Scores | None]]:
        self.looks += 1
        if self.looks % 2:
            return []
        key, n = self.open.pop(0)
        return [(key, Scores(ScoredBy("rm", key), {"rm": np.full(n, key, np.float32)}))]

    def reason(self, key: int) -> str:
        raise AssertionError

    def close(self) -> None:
        """Nothing to end."""


def test_a_bounded_number_is_asked_together_and_who_is_waited_for_is_said(folder: Path) -> None:
    groups, slow, waits = [group(folder, i, "1") for i in range(2 * AT_ONCE + 3)], Slow(), list[str]()
    score_groups(groups, {"rm": slow}, waits.append)
    assert slow.most == AT_ONCE
    assert [one.components["rm"].tolist() for one in groups] == [[i] for i in range(len(groups))]
    assert set(waits) == {"rm of scorer-0"}

    class LeavingError(Exception):
        pass

    def leave(on: str) -> None:
        raise LeavingError

    with pytest.raises(LeavingError):
        score_groups(groups, {"rm": Slow()}, leave)


def test_scores_that_do_not_fit_change_nothing(folder: Path) -> None:
    one = group(folder, 0, "1\n2")
    one.step_ends = np.array([2], np.int32)
    before = (dict(one.components), dict(one.channels), dict(one.scored_by))
    channel = {"prm": Channel("step", np.ones(2, np.float32))}
    scores = Scores(ScoredBy("prm", 0), {"prm": np.ones(1, np.float32)}, channel, np.array([2, 3], np.int32))
    with pytest.raises(ValueError, match=r"^prm cuts the samples into other steps"):
        add(one, scores)
    two: Any = Scores(ScoredBy("prm", 0), {"prm": np.ones(5, np.float32)})
    with pytest.raises(ValueError, match=r"prm has shape \(5,\), expected \(1,\)"):
        add(one, two)
    assert (one.components, one.channels, one.scored_by) == before


def test_a_set_has_no_models_name(folder: Path) -> None:
    keys = [f"scorer.models.prm.path={folder / 'prm'}", "eval.sets={prm: {name: addition}}"]
    with pytest.raises(ConfigError, match=r"^eval\.sets\.prm: scorer\.models has a model of that name"):
        compose(keys)


def test_an_evaluation_asks_the_models_of_the_run_unless_others_are_named(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "checkpoints" / "step_1" / "config.json").write_text("{}")
    (run / "config.yaml").write_text(
        f"scorer:\n  count: 2\n  models:\n    prm: {{path: {folder / 'prm'}}}\n"
        "reward:\n  weights: {accuracy: 1, prm: 0.1}\n"
    )
    of_run = compose(["job=eval", f"checkpoint={run}"])
    assert (of_run.scorer.models, of_run.scorer.count) == ({"prm": {"path": str(folder / "prm")}}, 1)
    assert of_run.reward.weights == {"accuracy": 1, "prm": 0.1}
    for others in ([f"scorer.models={{rm: {{path: {folder / 'rm'}}}}}"], [f"scorer.models.rm.path={folder / 'rm'}"]):
        of_others = compose(["job=eval", f"checkpoint={run}", *others])
        assert (list(of_others.scorer.models), of_others.reward.weights) == (["rm"], {"accuracy": 1})
    by_rules = compose(["job=sample", f"checkpoint={run}"])
    assert (by_rules.scorer.models, by_rules.reward.weights) == ({}, {"accuracy": 1})
    with pytest.raises(ConfigError, match=r"^reward\.weights\.prm: unknown; must be one of .* scorer\.models"):
        compose(["job=sample", f"checkpoint={run}", "reward.weights.prm=1"])

"""The refresher: labels of the policy's answers, the model that learns them, what a broker hands out. No processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.run import Run
from fakes.scores import made
from offtrail.core.types import Group
from offtrail.platform.broker.archive import read_groups
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config, ModelConfig
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.launcher.memory import estimate
from offtrail.platform.launcher.refreshable import require_refresh
from offtrail.platform.model.scoring import Scoring, scorings
from offtrail.platform.model.text import Text
from offtrail.platform.model.tiny import save_start
from offtrail.platform.refresher.labels import (
    Answer,
    Labelled,
    Labeller,
    answers_of,
    by_checker,
    by_outcome,
    by_pairs,
    by_policy,
)
from offtrail.platform.refresher.model import Refreshed
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext, newest_score_model, score_weights_folder
from offtrail.platform.scorer.served import Served
from offtrail.platform.scorer.shown import Show
from offtrail.platform.weights.store import Publisher, Subscriber
from offtrail.platform.wire.messages import NextRefresh, RefreshJob
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.registry import make_task

CHAIN = make_task(ChainConfig(noise=0.4, worked_share=1.0), 0)
STEPS = "steps: {by: separator, separator: ';', within: thought}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prm, of steps; rm, of outcomes; lm, a language model, and ref, another."""
    found = tmp_path_factory.mktemp("models")
    made(found / "prm", "steps")
    made(found / "rm", "outcome", seed=6)
    for name, seed in (("lm", 1), ("ref", 2)):
        save_start(found / name, ModelConfig(hidden_size=32, layers=2, mlp_size=48, heads=4, kv_heads=2), seed)
    return found


ENTRIES = {
    "steps": f"path: FOLDER/prm, {STEPS}",
    "pairwise": "path: FOLDER/rm, empty: 0, closed: false",
    "pointwise": "path: FOLDER/rm, squash: sigmoid, closed: false",
    "implicit": f"path: FOLDER/lm, reference: FOLDER/ref, beta: 0.5, reads: steps, {STEPS}",
}


def config_of(folder: Path, tmp_path: Path, kind: str = "steps", *more: str) -> Config:
    entry = ENTRIES[kind].replace("FOLDER", str(folder))
    keys = ("scorer.refresh.lr=5e-3", f"weights.dir={tmp_path}")
    every = () if any(key.startswith("scorer.refresh_every") for key in more) else ("scorer.refresh_every=2",)
    return compose([f"scorer.models={{m: {{{entry}}}}}", *keys, *every, *more])


def group_of(text: Text, index: int, samples: int = 4) -> Group:
    """Worked answers to one problem, with the verdicts on them."""
    problem = CHAIN.train(index)
    answers = [CHAIN.trace(problem, random.Random(100 * index + i)) for i in range(samples)]
    tokens = text.encode_answers([problem] * samples, answers)
    said = [answer.partition("<answer>")[2].removesuffix("</answer>") for answer in answers]
    lengths = np.array([len(one) for one in tokens], np.int32)
    right = np.array([CHAIN.verify(problem, one) for one in said], np.float32)
    return Group(
        group=index, slot=index, attempt=1, problem=problem, generator="generator-0", temperature=1.0,
        prompt_tokens=text.encode(problem), lengths=lengths, tokens=np.concatenate(tokens),
        logprobs=np.full(lengths.sum(), -1, np.float32), versions=np.zeros(lengths.sum(), np.int32),
        finish=np.zeros(samples, np.uint8), rewards=right, components={"accuracy": right},
        times=np.zeros((samples, 3)),
    )  # fmt: skip


def asked(folder: Path, tmp_path: Path, kind: str = "steps", groups: int = 4) -> tuple[Text, list[Answer]]:
    text, scoring = Text(folder / "prm"), scorings(config_of(folder, tmp_path, kind))["m"]
    return text, answers_of([group_of(text, i) for i in range(groups)], Show(scoring, text), "accuracy")


# --- labels ---


def test_the_checkers_labels_stand_at_the_tokens_that_end_the_steps(folder: Path, tmp_path: Path) -> None:
    text, answers = asked(folder, tmp_path)
    labelled = by_checker(answers, CHAIN, text)
    assert labelled.used == len(answers) == 16
    for one, item in zip(answers, labelled.items, strict=True):
        said = text.decode(item.outputs[0])
        steps = said.partition("<think>")[2].partition("</think>")[0].split(";")
        assert item.labels.tolist() == CHAIN.check(one.group.problem, steps)
        pieces = [text.decode(item.outputs[0][a:b]) for a, b in zip([0, *item.ends], item.ends, strict=False)]
        assert [piece.strip(";").removeprefix("<think>") for piece in pieces] == steps
    assert 0 < labelled.good_share < 1


def test_a_verdict_labels_an_answer_or_all_of_its_steps(folder: Path, tmp_path: Path) -> None:
    _, answers = asked(folder, tmp_path)
    whole, steps = by_outcome(answers, steps=False), by_outcome(answers, steps=True)
    assert [item.scores for item in whole.items] == [(float(one.right),) for one in answers]
    assert not any(len(item.labels) for item in whole.items)
    for one, item in zip(answers, steps.items, strict=True):
        assert item.labels.tolist() == [float(one.right)] * len(one.ends)
    assert {one.right for one in answers} == {True, False}


def test_a_pair_is_a_right_and_a_wrong_answer_of_one_group_and_none_is_in_two(folder: Path, tmp_path: Path) -> None:
    _, answers = asked(folder, tmp_path, "pairwise", groups=8)
    rights = [sum(one.right for one in answers if one.group.group == i) for i in range(8)]
    labelled = by_pairs(answers)
    assert len(labelled.items) == sum(min(n, 4 - n) for n in rights) > 0
    assert labelled.used == 2 * len(labelled.items)
    told = {(one.group.group, one.read.tobytes()): one.right for one in answers}
    for item in labelled.items:
        better, worse = (
            {right for (_, read), right in told.items() if read == output.tobytes()} for output in item.outputs
        )
        assert (better, worse) == ({True}, {False})


@pytest.mark.parametrize("hard", [False, True])
def test_rollouts_go_on_from_the_end_of_each_step_but_one_that_ends_the_answer(
    folder: Path, tmp_path: Path, hard: bool
) -> None:
    text, answers = asked(folder, tmp_path)
    first = answers[0]
    whole = Answer(first.group, first.output, 0, np.array([2, len(first.output) - 1], np.int32), right=True)
    put: list[tuple[Answer, int]] = []

    def ask(asks: Sequence[tuple[Answer, int]]) -> list[float]:
        put.extend(asks)
        return [0.25, float("nan"), 0.0][: len(asks)]

    labelled = by_policy([Answer(first.group, first.output, 0, first.ends[:2], False), whole], text, ask, hard=hard)
    assert [(place is whole, kept) for place, kept in put] == [(False, 1), (False, 2), (True, 1)]
    assert labelled.used == 2
    np.testing.assert_array_equal(labelled.items[0].labels, [1.0 if hard else 0.25, np.nan])
    np.testing.assert_array_equal(labelled.items[1].labels, [0.0, 1.0])  # the last one has the verdict


def test_an_answer_without_a_verdict_or_without_anything_to_read_is_left_out(folder: Path, tmp_path: Path) -> None:
    text, scoring = Text(folder / "prm"), scorings(config_of(folder, tmp_path, "pairwise"))["m"]
    group = group_of(text, 0)
    group.components["accuracy"][1] = np.nan
    assert len(answers_of([group], Show(scoring, text), "accuracy")) == 3
    assert answers_of([group], Show(scoring, text), "other") == []
    empty = [text.stop_token_ids[0]]
    group.tokens, group.lengths = np.array(empty * 4, np.int32), np.ones(4, np.int32)
    assert answers_of([group], Show(scoring, text), "accuracy") == []


def test_the_newest_policy_is_asked_for_the_rollouts_and_they_are_judged(folder: Path, tmp_path: Path) -> None:
    """A policy of random weights: nothing that it goes on to is right."""
    config = config_of(folder, tmp_path, "steps", "scorer.refresh.method=rollouts", "scorer.refresh.rollouts=2")
    (tmp_path / "start").symlink_to(folder / "lm")
    context, activity, looks = RoleContext(config, tmp_path, "refresher", 0), Activity(), list[None]()
    publisher = Publisher(context.weights_folder)
    publisher.publish(7, read_weights(folder / "lm"))
    labeller = Labeller(context, scorings(config)["m"], activity)
    try:
        group = group_of(Text(folder / "lm"), 0)
        labelled = labeller([group], 8, lambda: looks.append(None))
    finally:
        labeller.close()
        publisher.close()
    assert (labelled.answers, labelled.used, labelled.good_share) == (4, 4, 0.0)
    assert all(len(item.labels) == len(item.ends) > 0 for item in labelled.items)
    spent = activity.snapshot().compute
    steps = sum(len(item.ends) for item in labelled.items)
    assert spent["verified_samples"] == 2 * steps
    assert spent["decoded_tokens"] > 2 * steps
    assert looks


# --- the model ---


def opened(folder: Path, tmp_path: Path, kind: str = "steps", *more: str) -> tuple[Refreshed, Activity, Scoring]:
    config, activity = config_of(folder, tmp_path, kind, *more), Activity()
    scoring = scorings(config)["m"]
    return Refreshed.open(RoleContext(config, tmp_path, "refresher", 0), scoring, activity), activity, scoring


def gauges(activity: Activity) -> dict[str, float]:
    return {name.removeprefix("scores/m/"): value for name, value in activity.snapshot().gauges.items()}


LABELS: dict[str, Callable[[list[Answer], Text], Labelled]] = {
    "steps": lambda answers, text: by_checker(answers, CHAIN, text),
    "pairwise": lambda answers, text: by_pairs(answers),
    "pointwise": lambda answers, text: by_outcome(answers, steps=False),
    "implicit": lambda answers, text: by_outcome(answers, steps=False),
}


@pytest.mark.parametrize("kind", list(ENTRIES))
def test_a_model_of_each_kind_learns_its_labels_and_is_measured_before(folder: Path, tmp_path: Path, kind: str) -> None:
    text, answers = asked(folder, tmp_path, kind)
    labelled = LABELS[kind](answers, text)
    model, activity, scoring = opened(folder, tmp_path, kind, "scorer.refresh.updates=120")
    model.measure(labelled, 2)
    before = gauges(activity)
    assert (before["measured_version"], before["policy_version"], before["version"]) == (0, 2, 0)
    model.train(labelled, 1, lambda: None)
    assert gauges(activity) == before | {"version": 1, "loss": gauges(activity)["loss"]}
    model.measure(labelled, 4)
    after = gauges(activity)
    assert after["measured_version"] == 1
    assert "loss" not in after
    measure = "accuracy" if kind == "pairwise" else "auc"
    assert after[measure] > 0.9
    assert after[measure] >= before[measure]
    model.close()
    served = Served.open(config_of(folder, tmp_path, kind), tmp_path, scoring)
    assert served.version == 1  # kept as a model that scores, and opens as one


def parameters(model: Refreshed) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): p.detach().clone() for name, p in model.trainer.module.named_parameters()}


def test_who_follows_a_killed_one_goes_on_from_its_newest_version_as_it_would_have(
    folder: Path, tmp_path: Path
) -> None:
    text, answers = asked(folder, tmp_path)
    labelled, versions = by_checker(answers, CHAIN, text), (1, 3, 4)
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    whole, _, _ = opened(folder, tmp_path / "undisturbed")
    for version in versions:
        whole.train(labelled, version, lambda: None)
    for version in versions:
        one, activity, scoring = opened(folder, tmp_path / "killed")
        kept, _ = newest_score_model(tmp_path / "killed", "m")
        channel = Subscriber(score_weights_folder(one.context.config, tmp_path / "killed", "m"))
        assert one.version == kept == {1: 0, 3: 1, 4: 3}[version] == (channel.newest() or 0)  # published again
        assert gauges(activity)["version"] == kept
        one.train(labelled, version, lambda: None)
        assert channel.newest() == version
        one.close()
    first, second = parameters(whole), parameters(one)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with channel.open(4) as published:
        assert all(torch.equal(first[name], published[name]) for name in first)
    kept_ones = sorted(path.name for path in (tmp_path / "killed" / "scorers" / "m" / "checkpoints").iterdir())
    assert kept_ones == ["step_3", "step_4"]
    served = Served.open(one.context.config, tmp_path / "killed", scoring)
    own = {name.removeprefix("model."): p for name, p in served.reader.module.named_parameters()}
    assert served.version == 4
    assert all(torch.equal(first[name], own[name]) for name in first)
    whole.close()


def test_what_is_stopped_in_the_middle_leaves_no_version_and_what_only_measures_makes_none(
    folder: Path, tmp_path: Path
) -> None:
    text, answers = asked(folder, tmp_path)
    labelled = by_checker(answers, CHAIN, text)
    one, _, _ = opened(folder, tmp_path)
    looks = iter([None, None])
    with pytest.raises(StopIteration):
        one.train(labelled, 1, lambda: next(looks))
    assert newest_score_model(tmp_path, "m") == (0, None)
    one.close()
    measures, activity, _ = opened(folder, tmp_path, "steps", "scorer.refresh.updates=0")
    measures.measure(labelled, 2)
    assert measures.publisher is None
    assert gauges(activity)["version"] == 0
    measures.measure(Labelled([], 0, 8), 4)
    assert gauges(activity) == {
        "version": 0, "measured_version": 0, "policy_version": 4, "answers": 8, "label_share": 0,
    }  # fmt: skip


# --- what the broker hands out ---


def refreshed_run(start: Callable[..., Run]) -> Run:
    run = start(scorer__refresh_every=2, scorer__models={"m": {"path": "x"}}, learner__steps=6, eval__every=0)
    run.everybody()
    run.hello("refresher")
    return run


def ask(run: Run, after: int, groups: int = 64) -> RefreshJob:
    return run.ask("refresher-0", NextRefresh(after=after, groups=groups), RefreshJob)


def ids(job: RefreshJob) -> list[int]:
    return sorted([header.group for header in job.headers] + [one for some in job.archived.values() for one in some])


def test_groups_are_handed_out_once_the_policy_has_come_so_far_and_each_once(start: Callable[..., Run]) -> None:
    run = refreshed_run(start)
    job = ask(run, 0)
    assert (job.version, job.waiting, job.headers) == (-1, "version 2 from learner-0", [])
    batches = [[header.group for header in run.train(checkpoint=False).headers] for _ in range(3)]
    job = ask(run, 0)
    assert (job.version, ids(job), job.archived) == (2, sorted(batches[0] + batches[1]), {})
    assert ids(ask(run, 0, groups=3)) == sorted([*batches[0][1:], *batches[1]])
    assert ask(run, 2).waiting == "version 4 from learner-0"
    assert ask(run, 6).waiting == "the end of the run"  # it is ahead: the policy went back to a checkpoint
    batches += [[header.group for header in run.train(checkpoint=False).headers] for _ in range(2)]
    assert ids(ask(run, 2)) == sorted(batches[2] + batches[3])
    assert ids(ask(run, 0)) == sorted(g for batch in batches[:4] for g in batch)  # it was slow: one version of all
    run.train(checkpoint=False)
    assert ask(run, 4).waiting == "the end of the run"
    run.broker.ending.end("interrupted", "")
    assert ask(run, 4).stop


def test_groups_that_have_left_the_spool_are_read_from_their_shards(start: Callable[..., Run]) -> None:
    run = refreshed_run(start)
    batches = [header.group for _ in range(2) for header in run.train().headers]
    run.finish_archive()
    job = ask(run, 0)
    assert job.headers == []
    found = [
        group.group
        for name, some in job.archived.items()
        for group in read_groups(run.run_dir / "trajectories" / name, set(some))
    ]
    assert sorted(found) == sorted(batches) == ids(job)


def test_that_a_refresher_waits_is_never_why_a_run_stands_still(start: Callable[..., Run]) -> None:
    run = refreshed_run(start)
    run.send("refresher-0", NextRefresh(after=0, groups=8))
    assert run.broker.polls.longest() is None


def test_what_it_says_of_its_model_stands_in_the_row_of_the_next_step(start: Callable[..., Run]) -> None:
    run = refreshed_run(start)
    run.beat("refresher", gauges={"scores/m/auc": 0.75, "scores/m/version": 3.0, "other": 1.0})
    run.beat("generator", gauges={"scores/m/auc": 0.1})
    run.train()
    assert {name: value for name, value in run.rows()[-1].items() if name.startswith("scores/")} == {
        "scores/m/auc": 0.75, "scores/m/version": 3.0,
    }  # fmt: skip


# --- before a start ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["scorer.refresh.model=prm"], "scorer.refresh.model=prm: must be one of scorer.models: m"),
        (["scorer.models.b.path=FOLDER/prm"], "scorer.refresh.model=: scorer.models has several; say which: m, b"),
        (["staleness.mode=exact"], "scorer.refresh_every=2: versions of scorer.models come when they are ready"),
        (["scorer.refresh.method=rollouts", "engine=sglang"], "scorer.refresh.method=rollouts: an embedded engine mak"),
        (["scorer.refresh.device=tpu"], "scorer.refresh.device=tpu: must be cpu, cuda or cuda:N"),
        (["scorer.refresh.keep=1"], "scorer.refresh.keep=1: must be ≥ 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    folder: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(folder, tmp_path, "steps", *(key.replace("FOLDER", str(folder)) for key in more))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "more", "message"),
    [
        (ENTRIES["pairwise"], ["scorer.refresh.method=exact"], "scorer.refresh.method=exact: labels steps, and m"),
        (ENTRIES["implicit"], ["scorer.refresh.method=rollouts"], "scorer.refresh.method=rollouts: labels steps, and"),
        ("path: FOLDER/prm, reads: tokens", [], "scorer.models.m.reads=tokens: nothing labels tokens"),
        ("path: FOLDER/rm", [], "scorer.models.m.closed=true: a model that reads more"),
        ("path: FOLDER/prm, insert: a", [], "scorer.models.m.insert=a: a model that reads more"),
        ("path: FOLDER/prm", ["scorer.refresh.method=exact", "task=gym"], "scorer.refresh.method=exact: task=gym has"),
    ],
)  # fmt: skip
def test_what_cannot_be_labelled_or_trained_is_refused_in_one_line(
    folder: Path, entry: str, more: list[str], message: str
) -> None:
    config = compose([
        f"scorer.models={{m: {{{entry}}}}}".replace("FOLDER", str(folder)), "scorer.refresh_every=2", *more
    ])  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        require_refresh(config, scorings(config))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_tasks_own_checker_is_found(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path, "steps", "scorer.refresh.method=exact")
    require_refresh(config, scorings(config))


def test_its_memory_is_a_learners_and_with_rollouts_an_engines(folder: Path, tmp_path: Path) -> None:
    def size(*more: str) -> int:
        config = config_of(folder, tmp_path, "steps", *more)
        return sum(part.bytes for part in estimate(config, tmp_path / "start") if part.role == "refresher")

    assert size() > size("scorer.refresh.updates=0")
    assert size("scorer.refresh.method=rollouts") > size() + 40 * 2**20
    assert size("scorer.refresh_every=0") == 0

"""Mixtures: shares hold in every stretch, places are dealt by (seed, index), problems go back to their family."""

from __future__ import annotations

from collections import Counter

import pytest

from offtrail.tasks.base import TaskError
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.mixture import MixtureConfig, MixtureTask
from offtrail.tasks.registry import make_task
from offtrail.tasks.split import stream

WEIGHTS = {"chain": 5.0, "addition": 3.0, "countdown": 2.0}
CONFIG = MixtureConfig(weights=WEIGHTS, settings={"chain": {"noise": 0.0}})
SHARES = {"chain": 0.5, "addition": 0.3, "countdown": 0.2}


@pytest.mark.parametrize("start", [0, 777, 10**12])
def test_every_stretch_holds_each_family_at_its_share(start: int):
    task = make_task(CONFIG, 0)
    counts = Counter(task.train(start + i).task for i in range(400))
    for family, share in SHARES.items():
        assert abs(counts[family] - 400 * share) <= 3


def test_evaluation_holds_each_family_at_its_share():
    problems = make_task(CONFIG, 0).held_out(400)
    counts = Counter(problem.task for problem in problems)
    assert all(abs(counts[family] - 400 * share) <= 3 for family, share in SHARES.items())
    assert len({problem.prompt for problem in problems}) == 400


def test_one_family_alone_is_that_family():
    alone, chain = make_task(MixtureConfig(weights={"chain": 0.2}), 3), make_task(ChainConfig(), 3)
    assert [alone.train(i) for i in range(20)] == [chain.train(i) for i in range(20)]


def test_problems_are_worked_and_checked_by_their_own_family():
    task, rng = make_task(CONFIG, 1), stream("mixture")
    for problem in map(task.train, range(100)):
        trace = task.trace(problem, rng)
        assert task.verify(problem, trace.partition("<answer>")[2].removesuffix("</answer>"))
        assert all(task.check_steps(problem, trace))
        assert not task.verify(problem, "no")


def test_settings_reach_their_family_and_the_share_reaches_all():
    task = make_task(
        MixtureConfig(held_out_share=0.3, settings={"chain": {"max_operations": 9, "min_operations": 9}}), 0
    )
    assert isinstance(task, MixtureTask)
    chains = [p for p in map(task.train, range(100)) if p.task == "chain"]
    assert {len(p.meta["operations"]) for p in chains} == {9}
    assert {family.config.held_out_share for family in task.families.values()} == {0.3}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_operation": 5},
            r"task.settings.chain.max_operation: no such key; choose one of held_out_share, .*max_operations",
        ),
        ({"name": "x"}, r"task.settings.chain.name: no such key"),
        ({"styles": 9}, r"task.settings.chain: task.styles=9: must be in \[1, 3\]"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str):
    with pytest.raises(TaskError, match=message):
        make_task(MixtureConfig(settings={"chain": settings}), 0)

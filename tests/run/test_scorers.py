"""Scorers of a run that are killed, stand still, say NaN and are refreshed: every group that was trained on has the
score that one version of the model has for it, and none is lost or trained twice.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import warm

from fakes.scores import made
from offtrail.core.types import Group
from offtrail.platform.broker.archive import read_groups
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.text import Text
from offtrail.platform.weights.store import Publisher

from .conftest import PATIENCE_S
from .test_invariants import reached, wait_until

STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "rm", "outcome")


def scoring(model: Path, *more: str) -> tuple[str, ...]:
    rm = f"scorer.models={{rm: {{path: {model}, empty: 0}}}}"
    return (rm, "reward.weights.rm=0.1", "scorer.count=2", f"learner.steps={STEPS}", *more)


def ledger(run_dir: Path, query: str) -> list[Any]:
    with sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchall()


def process_of(name: str, index: int, run_dir: Path) -> psutil.Process:
    """A role's process, by its command line."""
    wanted = ["offtrail.platform.runtime.process", name, str(index), str(run_dir)]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if all(word in words for word in wanted):
            return process
    raise AssertionError(f"no {name}-{index} of {run_dir} is running")


def trained(run_dir: Path) -> list[Group]:
    """All that was trained on, as the archive has it."""
    wanted = {number for (number,) in ledger(run_dir, "SELECT id FROM groups WHERE batch IS NOT NULL")}
    return [g for file in sorted((run_dir / "trajectories").glob("*.parquet")) for g in read_groups(file, wanted)]


def scores_of_held_out(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluated versions' rows of metrics.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/accuracy" in row]


def check_scores(model: Path, groups: list[Group]) -> set[int]:
    """Of every group the scores are those of one version; the versions. Version v says 1 + v times what 0 says."""
    reader, text = Reader.open(model, longest=256), Text(model)
    for group in groups:
        assert set(group.scored_by) == {"rm"}
        by = group.scored_by["rm"]
        outputs = [sample.tokens for sample in group.samples()]
        [said] = reader.ask([Question(group.prompt_tokens, outputs)], 4096)
        read = [bool(text.decode(output).strip()) for output in outputs]
        expected = [(1 + by.version) * one[0] if some else 0.0 for one, some in zip(said, read, strict=True)]
        np.testing.assert_allclose(group.components["rm"], expected, rtol=1e-3, atol=1e-3)
        total = 1.0 * group.components["accuracy"] + 0.1 * group.components["format"] + 0.1 * group.components["rm"]
        np.testing.assert_allclose(group.rewards, total, rtol=1e-5, atol=1e-5)
    return {group.scored_by["rm"].version for group in groups}


def test_scorers_that_are_killed_or_stand_still_lose_and_make_up_nothing(
    model: Path, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir, keys = tmp_path / "killed", scoring(model, "generator.count=2", "scorer.hang_seconds=1", "eval.every=4")
    process = warm.Popen(command("killed", *keys), env=environment, cwd=tmp_path)
    wait_until("step 2", lambda: reached(run_dir, 2))
    for index in (0, 1):  # nobody is there to ask, until they are started again
        os.kill(process_of("scorer", index, run_dir).pid, signal.SIGKILL)
    wait_until("step 6", lambda: reached(run_dir, 6))
    still = process_of("scorer", 0, run_dir)
    still.suspend()
    wait_until("step 9", lambda: reached(run_dir, 9))
    still.resume()
    assert process.wait(PATIENCE_S) == 0
    [(admitted, distinct)] = ledger(run_dir, "SELECT count(*), count(DISTINCT id) FROM groups WHERE batch IS NOT NULL")
    assert (admitted, distinct) == (STEPS * 4, STEPS * 4)
    assert ledger(run_dir, "SELECT count(*) FROM groups WHERE reason IN ('failed', 'unscored')") == [(0,)]
    groups = trained(run_dir)
    assert len(groups) == STEPS * 4
    assert check_scores(model, groups) == {0}
    held_out = scores_of_held_out(run_dir)
    assert [row["eval/version"] for row in held_out] == list(range(0, STEPS + 1, 4))
    for row in held_out:
        assert (row["eval/rm/unscored"], row["eval/rm/version_min"], row["eval/rm/version_max"]) == (0, 0, 0)
    assert len({row["eval/rm"] for row in held_out}) > 1


def test_a_forced_refresh_mixes_no_versions_and_one_that_says_nan_is_no_score(
    model: Path, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir, keys = (
        tmp_path / "fresh",
        scoring(model, "generator.count=2", "weights.channel=disk", "staleness.max_refusals=100000"),
    )
    process = warm.Popen(command("fresh", *keys), env=environment, cwd=tmp_path)
    wait_until("step 1", lambda: reached(run_dir, 1))
    own = {name.removeprefix("model."): p for name, p in Reader.open(model, longest=256).module.named_parameters()}
    publisher = Publisher(run_dir / "weights" / "scores-rm")

    def publish(version: int, factor: float) -> None:
        publisher.publish(version, own | {"score.weight": (own["score.weight"] * factor).contiguous()})

    publish(1, 2.0)
    wait_until("step 4", lambda: reached(run_dir, 4))
    publish(2, torch.nan)
    refused = "SELECT count(*) FROM groups WHERE reason = 'unscored'"
    wait_until("a group without a score", lambda: ledger(run_dir, refused) > [(0,)])
    publish(3, 4.0)
    assert process.wait(PATIENCE_S) == 0
    publisher.close()
    groups = trained(run_dir)
    assert len(groups) == STEPS * 4
    versions = check_scores(model, groups)
    assert {1, 3} <= versions <= {0, 1, 3}
    last = scores_of_held_out(run_dir)[-1]
    assert (last["eval/rm/unscored"], last["eval/rm/version_min"], last["eval/rm/version_max"]) == (0, 3, 3)
    [(reason,)] = ledger(run_dir, "SELECT DISTINCT detail FROM groups WHERE reason = 'unscored' LIMIT 1")
    assert "are no numbers" in reason


@pytest.mark.prove
def test_an_exact_run_with_scores_repeats_bit_for_bit(model: Path, launch: Any) -> None:
    keys = scoring(model, "staleness.mode=exact")
    first, second = launch("first", *keys), launch("second", *keys)
    assert (first.code, second.code) == (0, 0), first.output + second.output
    query = "SELECT version, checksum FROM versions ORDER BY version"
    versions = [ledger(run.run_dir, query) for run in (first, second)]
    assert versions[0] == versions[1]
    assert len({checksum for _, checksum in versions[0]}) == STEPS + 1  # each step moved the weights
    assert check_scores(model, trained(first.run_dir)) == {0}

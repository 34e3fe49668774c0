"""A model that scores is trained while the run trains the policy: every group has the score that the version which it
names has for it, whatever dies; versions ascend, and none is made twice.
"""

from __future__ import annotations

import os
import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from safetensors.torch import load_file

from fakes.scores import made
from offtrail.core.types import Group
from offtrail.platform.config.checkpoints import steps_of
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.text import Text

from .conftest import PATIENCE_S
from .test_invariants import reached, wait_until
from .test_scorers import ledger, process_of, trained

STEPS, EVERY = 24, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "rm", "outcome")


def refreshing(model: Path, *more: str) -> tuple[str, ...]:
    """Every version is kept, so that each score can be made again."""
    rm = f"scorer.models={{rm: {{path: {model}, empty: 0, closed: false, squash: sigmoid}}}}"
    return (
        rm, "reward.weights.rm=0.1", "scorer.count=2", "generator.count=2", f"scorer.refresh_every={EVERY}",
        "scorer.refresh.keep=100", "scorer.refresh.lr=1e-2", "scorer.refresh.updates=4", f"learner.steps={STEPS}",
        *more,
    )  # fmt: skip


def kept(run_dir: Path) -> list[int]:
    return steps_of(run_dir / "scorers" / "rm")


def folder_of(run_dir: Path, version: int, model: Path) -> Path:
    return run_dir / "scorers" / "rm" / "checkpoints" / f"step_{version}" if version else model


def check_scores(run_dir: Path, model: Path, groups: list[Group]) -> list[int]:
    """Of every group the scores are those of the version that it names, by the files of that version; which these
    are, in the order in which the groups arrived.
    """
    readers, text = dict[int, Reader](), Text(model)
    for group in groups:
        version = group.scored_by["rm"].version
        if version not in readers:
            readers[version] = Reader.open(folder_of(run_dir, version, model), longest=256)
        outputs = [sample.tokens for sample in group.samples()]
        [said] = readers[version].ask([Question(group.prompt_tokens, outputs)], 4096)
        read = [bool(text.decode(output).strip()) for output in outputs]
        expected = [1 / (1 + np.exp(-one[0])) if some else 0.0 for one, some in zip(said, read, strict=True)]
        np.testing.assert_allclose(group.components["rm"], expected, rtol=1e-3, atol=1e-4)
    by_arrival = sorted(groups, key=lambda group: group.queued_at)
    return [group.scored_by["rm"].version for group in by_arrival]


def check_versions(run_dir: Path) -> None:
    """They differ, none was made twice (each life of the refresher began with the newest), and they ascend."""
    heads = [load_file(folder_of(run_dir, v, run_dir) / "model.safetensors")["score.weight"] for v in kept(run_dir)]
    assert all(not first.equal(second) for first, second in pairwise(heads))
    log = (run_dir / "logs" / "refresher-0.log").read_text()
    made_ones = [int(number) for number in re.findall(r"rm: version (\d+), of", log)]
    assert made_ones == sorted(set(made_ones))
    assert set(made_ones) <= set(kept(run_dir))


def complete(run_dir: Path) -> list[Group]:
    [(all_of_them, distinct)] = ledger(run_dir, "SELECT count(*), count(DISTINCT id) FROM groups WHERE state='trained'")
    assert (all_of_them, distinct) == (STEPS * 4, STEPS * 4)
    groups = trained(run_dir)
    assert len(groups) == STEPS * 4
    return groups


def test_each_group_is_scored_by_one_version_of_the_trained_model_though_the_refresher_is_killed(
    model: Path, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "fresh"
    process = warm.Popen(command("fresh", *refreshing(model)), env=environment, cwd=tmp_path)
    wait_until("a version", lambda: bool(kept(run_dir)))
    os.kill(process_of("refresher", 0, run_dir).pid, signal.SIGKILL)
    before = kept(run_dir)
    wait_until("a version of its successor", lambda: len(kept(run_dir)) > len(before) or process.poll() is not None)
    assert process.wait(PATIENCE_S) == 0
    assert kept(run_dir)[: len(before)] == before
    assert len(kept(run_dir)) > len(before)
    versions = check_scores(run_dir, model, complete(run_dir))
    assert set(versions) <= {0, *kept(run_dir)}
    assert max(versions) > 0
    check_versions(run_dir)


@pytest.mark.prove
def test_a_run_that_goes_on_begins_with_the_newest_version(
    model: Path, command: Any, launch: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "again"
    process = warm.Popen(command("again", *refreshing(model)), env=environment, cwd=tmp_path)
    wait_until("a version", lambda: bool(kept(run_dir)) and reached(run_dir, 6))
    process.kill()
    process.wait()
    newest = kept(run_dir)[-1]
    [(arrived,)] = ledger(run_dir, "SELECT max(queued_at) FROM groups")
    again = launch("again", *refreshing(model), "run.resume=true")
    assert again.code == 0, again.output
    groups = complete(run_dir)
    check_scores(run_dir, model, groups)
    after = [group.scored_by["rm"].version for group in groups if group.queued_at > arrived]
    assert min(after) >= newest
    assert kept(run_dir)[-1] > newest
    check_versions(run_dir)

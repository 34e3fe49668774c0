"""Going on through the real command: from an older checkpoint, and from a loss that was no number."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import load_config

from .conftest import UNDISTURBED

KEPT = ("staleness.mode=exact", "learner.checkpoint_every=2", "learner.keep_checkpoints=9")


def checksums(run_dir: Path) -> list[tuple[int, str]]:
    with sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        return ledger.execute("SELECT version, checksum FROM versions ORDER BY version").fetchall()


@pytest.mark.timeout(900)
def test_from_an_older_checkpoint_the_same_versions_are_made_of_the_archived_batches(
    launch: Any, shared: Any, tmp_path: Path
) -> None:
    """The run has completed, so that none of its batches is in the ledger any more."""
    run = launch("run", *KEPT, "learner.steps=6")
    assert run.code == 0, run.output
    before = checksums(run.run_dir)
    file = run.run_dir / "checkpoints" / "step_6" / "trainer" / "optimizer.safetensors"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    file.write_bytes(spoilt)
    longer = (*KEPT, "learner.steps=8", "run.resume=true")
    refused = launch("run", *longer)
    assert refused.code == 2
    assert f"{file} is not as it was written; restore it, or go on from an older checkpoint" in refused.output
    assert "run.resume_from=step_4" in refused.output
    assert refused.summary == run.summary
    assert load_config(run.run_dir / "config.yaml").learner.steps == 6

    resumed = launch("run", *longer, "run.resume_from=step_2")
    assert resumed.code == 0, resumed.output
    undisturbed = shared(*UNDISTURBED)
    assert checksums(resumed.run_dir) == checksums(undisturbed.run_dir)
    assert checksums(resumed.run_dir)[: len(before)] == before
    for name in ("groups/trained", "groups/lost", "groups/duplicated", "tokens/trained", "lineage"):
        assert resumed.summary[name] == undisturbed.summary[name], name
    places = sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())
    assert places == ["set_aside", "step_2", "step_4", "step_6", "step_8"]


# Finite as long as no sampled token becomes improbable: e^100 is more than float32 holds.
FRAGILE = """
def fragile(tokens):
    return -tokens.advantages * tokens.log_ratio().exp() + 1e-9 * (-tokens.logprobs).exp()
"""


@pytest.mark.prove
def test_a_run_whose_loss_is_no_number_goes_on_under_a_lower_learning_rate(launch: Any, tmp_path: Path) -> None:
    """As its error says. The batch that it died of is in the log, and is trained again."""
    (tmp_path / "my_losses.py").write_text(FRAGILE)
    run = launch("run", "algo.loss=my_losses:fragile", "learner.optim.lr=10", "learner.steps=4")
    assert run.code == 1
    assert "DivergedError: step 0, update 2 of 2: the policy's loss is" in run.summary["reason"]
    assert "Lower learner.optim.lr and resume: run.resume=true" in run.summary["reason"]
    again = launch("run", "run.resume=true")
    assert "DivergedError: step 0, update 2 of 2" in again.summary["reason"]
    resumed = launch("run", "run.resume=true", "learner.optim.lr=2e-4")
    assert resumed.code == 0, resumed.output
    assert resumed.summary["changes"] == [{"step": 0, "key": "learner.optim.lr", "from": 10.0, "to": 2e-4}]
    assert [resumed.summary[f"groups/{name}"] for name in ("trained", "lost", "duplicated")] == [4 * 4, 0, 0]
    assert json.loads((resumed.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4

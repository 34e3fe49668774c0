"""learner.lora by the real command: it learns from stale data, and goes on after kill -9 with the same versions, be
they merged weights or the adapters alone.
"""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .test_invariants import checksums, reached, wait_until

LORA = (
    "learner.lora.rank=8", "learner.lora.alpha=16", "algo.kl=k3", "algo.kl_coef=0.001", "staleness.mode=exact",
    "staleness.max=2", "learner.steps=8", "weights.probe_every=1",
)  # fmt: skip
ALONE = "learner.lora.publish=adapter"


@pytest.fixture
def whole(shared: Any) -> Any:
    """A run that nothing disturbs, of merged weights."""
    return shared("lora", *LORA)


def killed(command: Any, launch: Any, environment: dict[str, str], folder: Path, *keys: str) -> Any:
    """The same run, killed at its fourth step, and gone on with."""
    process = warm.Popen(command("killed", *LORA, *keys), env=environment, cwd=folder)
    wait_until("step 4", partial(reached, folder / "killed", 4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = launch("killed", "run.resume=true", *LORA, *keys)
    assert end.code == 0, end.output
    return end


def probes(run: Any) -> list[float]:
    """Largest |Δ log p| of the fixed text, where engine and learner were compared."""
    return [row["mismatch/probe_abs_dlogp_max"] for row in run.rows if "mismatch/probe_abs_dlogp_max" in row]


@pytest.mark.prove
def test_a_killed_run_goes_on_with_the_same_versions(
    whole: Any, launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    end = killed(command, launch, environment, tmp_path)
    assert checksums(end.run_dir) == checksums(whole.run_dir)


def test_a_checkpoint_is_what_was_published(whole: Any) -> None:
    # Engines, which have the merged model, and the learner, which has adapters, say the same.
    assert 0 < max(probes(whole)) < 1e-4
    assert max(row["policy/kl_ref"] for row in whole.rows[1:]) > 0
    path = whole.run_dir / "checkpoints" / "step_8"
    base = AutoModelForCausalLM.from_pretrained(whole.run_dir / "start")
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, path / "adapter").merge_and_unload().state_dict()
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == start.keys()
    assert max(float((saved[name] - merged[name]).abs().max()) for name in saved) < 1e-6
    assert max(float((saved[name] - start[name]).abs().max()) for name in saved) > 1e-4
    moments = load_file(path / "trainer" / "optimizer.safetensors")
    assert all(".lora_" in name for name in moments if name != "torch_random_state")


def test_adapters_alone_come_to_the_same_bits_as_merged_weights_also_after_a_kill(
    whole: Any, launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """The embedded engine merges them itself; a resumed run publishes them again."""
    end = killed(command, launch, environment, tmp_path, ALONE)
    assert 0 < max(probes(end)) < 1e-4
    assert end.rows[-1]["weights/bytes"] < 0.5 * whole.rows[-1]["weights/bytes"]
    assert end.summary["eval/accuracy_last"] == whole.summary["eval/accuracy_last"]
    for part in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(run.run_dir / "checkpoints" / "step_8" / part) for run in (end, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_adapters_learn_the_demo_from_stale_data(launch: Any) -> None:
    run = launch(
        "demo", "learner.lora.rank=16", "learner.optim.lr=2e-3", "sft.steps=1000", "batch.groups=16",
        "batch.group_size=8", "learner.steps=40", "eval.prompts=512",
    )  # fmt: skip
    assert run.code == 0, run.output
    assert run.summary["eval/accuracy_first"] <= 0.65
    assert run.summary["eval/accuracy_last"] >= 0.90
    assert run.summary["staleness/stale_token_share"] >= 0.5


@pytest.mark.timeout(900)
@pytest.mark.prove
@pytest.mark.parametrize("kept", ["recompute", "keep"])
def test_a_server_takes_a_version_of_adapters_while_it_samples(launch: Any, kept: str) -> None:
    run = launch(
        "named", "engine=sglang", "eval.engine=local", "learner.lora.rank=8", ALONE, f"engine.kv_on_update={kept}",
        "learner.steps=8", "weights.probe_every=1", "broker.deadline_seconds=200", seconds=580,
    )  # fmt: skip
    assert run.code == 0, run.output
    assert (run.summary["groups/lost"], run.summary["groups/duplicated"]) == (0, 0)
    assert 0 < max(probes(run)) < 1e-4
    assert max(row.get("mismatch/abs_dlogp_max", 0.0) for row in run.rows) < 1e-4
    assert run.summary["staleness/max"] >= 1


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_adapters_in_a_server_learn_the_demo_from_stale_data(launch: Any) -> None:
    run = launch(
        "demo", "engine=sglang", "eval.engine=local", "learner.lora.rank=16", "learner.optim.lr=2e-3", ALONE,
        "sft.steps=1000", "batch.groups=16", "batch.group_size=8", "learner.steps=40", "eval.prompts=512",
        "broker.deadline_seconds=200", seconds=880,
    )  # fmt: skip
    assert run.code == 0, run.output
    assert run.summary["eval/accuracy_first"] <= 0.65
    assert run.summary["eval/accuracy_last"] >= 0.90
    assert run.summary["staleness/stale_token_share"] >= 0.5
    assert (run.summary["groups/lost"], run.summary["groups/duplicated"]) == (0, 0)
    assert max(row.get("staleness/mixed_sample_share", 0.0) for row in run.rows) > 0
    assert 0 < max(probes(run)) < 1e-4
    assert max(row.get("mismatch/abs_dlogp_max", 0.0) for row in run.rows) < 1e-4

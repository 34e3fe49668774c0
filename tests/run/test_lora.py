"""learner.lora by the real command: it learns from stale data, and goes on after kill -9 with the same versions."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import warm
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .test_invariants import checksums, reached, wait_until

LORA = (
    "learner.lora.rank=8", "learner.lora.alpha=16", "algo.kl=k3", "algo.kl_coef=0.001", "staleness.mode=exact",
    "staleness.max=2", "learner.steps=8", "weights.probe_every=1",
)  # fmt: skip


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_with_the_same_versions_and_its_checkpoint_is_what_was_published(
    launch: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    whole = launch("whole", *LORA)
    assert whole.code == 0, whole.output
    # Engines, which have the merged model, and the learner, which has adapters, say the same.
    probes = [row["mismatch/probe_abs_dlogp_max"] for row in whole.rows if "mismatch/probe_abs_dlogp_max" in row]
    assert 0 < max(probes) < 1e-4
    assert max(row["policy/kl_ref"] for row in whole.rows[1:]) > 0

    run_dir = tmp_path / "killed"
    process = warm.Popen(command("killed", *LORA), env=environment, cwd=tmp_path)
    wait_until("step 4", partial(reached, run_dir, 4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = launch("killed", "run.resume=true", *LORA)
    assert end.code == 0, end.output
    assert checksums(run_dir) == checksums(whole.run_dir)

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

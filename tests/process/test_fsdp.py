"""FSDP2 on gloo: two ranks train as one does, with parameters that are really sharded; checkpoints fit any number."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import warm
from safetensors.torch import load_file

from offtrail.core.types import Batch
from offtrail.platform.config.schema import LearnerConfig
from offtrail.platform.learner.world import join
from offtrail.platform.wire.groups import pack_group

WORKER = Path(__file__).with_name("fsdp_worker.py")
STEPS = 4


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run all jobs in one world of ``ranks`` processes; what a failing rank said is the failure."""
    listing = folder / f"jobs_{ranks}.json"
    listing.write_text(json.dumps([{**job, "ranks": ranks} for job in jobs]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    source = str(Path(__file__).parents[2] / "src")
    processes = [
        warm.Popen(
            [sys.executable, str(WORKER), str(listing)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": source},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(said)


def load_worker() -> Any:
    """The worker as a module: one rank needs no process of its own."""
    spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, start_dir: Path, make_batch: Callable[..., Batch], warmed: None
) -> Callable[[str], Path]:
    """Folders of four runs: one rank and two ranks from the start, and each from the other's checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "batches").mkdir()
    for step in range(STEPS):
        groups = [pack_group(g) for g in make_batch(step, B=4, G=4).groups]
        (folder / "batches" / str(step)).write_bytes(msgspec.msgpack.encode(groups))

    def job(name: str, origin: Path, steps: range, **more: Any) -> dict[str, Any]:
        (folder / name).mkdir()
        common = {"start": str(start_dir), "batches": str(folder / "batches"), "out": str(folder / name)}
        return {**common, "origin": str(origin), "steps": list(steps), "algo": "grpo", **more}

    halfway = Path("checkpoints") / "step_2"
    one = job("one", start_dir, range(STEPS), save=2)
    two = job("two", start_dir, range(STEPS), save=2)
    two_from_one = job("two_from_one", folder / "one" / halfway, range(2, STEPS))
    one_from_two = job("one_from_two", folder / "two" / halfway, range(2, STEPS))
    ppo_one = job("ppo_one", start_dir, range(STEPS), algo="ppo", save=3)
    ppo_two = job("ppo_two", start_dir, range(STEPS), algo="ppo")
    ppo_two_from_one = job(
        "ppo_two_from_one", folder / "ppo_one" / "checkpoints" / "step_3", range(3, STEPS), algo="ppo"
    )
    full_one, full_two = (job(f"full_{ranks}", start_dir, range(1), algo="full") for ranks in ("one", "two"))
    worker = load_worker()
    sft_one, sft_two = (job(f"sft_{ranks}", start_dir, range(STEPS), algo="sft", save=2) for ranks in ("one", "two"))
    sft_half = job("sft_two_from_one", folder / "sft_one" / halfway, range(2, STEPS), algo="sft")
    lora_one, lora_two = (job(f"lora_{r}", start_dir, range(STEPS), algo="lora", save=3) for r in ("one", "two"))
    lora_half = job("lora_two_from_one", folder / "lora_one" / "checkpoints" / "step_3", range(3, STEPS), algo="lora")
    labels = {"reward_model": folder / "pairs.jsonl", "prm": folder / "steps.jsonl", "implicit": folder / "steps.jsonl"}
    write_labels(labels["reward_model"], labels["prm"])
    heads = [
        [
            job(f"{name}_{r}", start_dir, range(STEPS), algo=name, labels=str(path), save=2)
            for name, path in labels.items()
        ]
        for r in ("one", "two")
    ]
    prm_half = job(
        "prm_two_from_one", folder / "prm_one" / halfway, range(2, STEPS), algo="prm", labels=str(labels["prm"])
    )
    worker.main([{**first, "ranks": 1} for first in (one, ppo_one, full_one, sft_one, lora_one, *heads[0])])
    two_ranks = [two, two_from_one, ppo_two, ppo_two_from_one, full_two, sft_two, sft_half, lora_two, lora_half]
    two_ranks += [*heads[1], prm_half]
    launch(2, two_ranks, folder)
    worker.main([{**one_from_two, "ranks": 1}])
    return lambda name: folder / name


def write_labels(pairs: Path, steps: Path) -> None:
    """Pairs, and steps of which every other is wrong."""
    words = ["a", "bc", "def", "ghij", "klmno", "pq"]
    rows = [{"prompt": f"{i}=?", "chosen": words[i % 6], "rejected": words[(i + 1) % 6] * 2} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{i}=?", "steps": words[i % 3 : 3 + i % 4], "labels": [1, 0, 1, 0, 1, 0]} for i in range(20)]
    for row in rows:
        row["labels"] = row["labels"][: len(row["steps"])]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "parameters.safetensors")


def distance(a: Path, b: Path) -> float:
    left, right = parameters(a), parameters(b)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / f"rank_{rank}.json").read_text())
    return value


def test_parameters_are_sharded_on_every_rank(results: Callable[[str], Path]) -> None:
    two = [told(results("two"), rank) for rank in range(2)]
    assert all(rank["dtensor"] for rank in two)
    assert sum(rank["local"] for rank in two) == two[0]["size"] == told(results("one"))["size"]
    assert all(rank["local"] < 0.6 * rank["size"] for rank in two)
    assert told(results("one"))["plain"]


def test_two_ranks_equal_one(results: Callable[[str], Path], start_dir: Path) -> None:
    assert distance(results("one"), results("two")) < 1e-5
    moved = max(
        float((value - load_file(start_dir / "model.safetensors")[name]).abs().max())
        for name, value in parameters(results("one")).items()
    )
    assert moved > 1e-3


def test_metrics_of_two_ranks_equal_one(results: Callable[[str], Path]) -> None:
    one, two = told(results("one"))["metrics"], told(results("two"))["metrics"]
    assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    assert told(results("two"), 1)["metrics"] == two
    assert one["policy/kl_ref"] > 0


@pytest.mark.parametrize("algo", ["ppo", "full"])
def test_two_ranks_equal_one_with_a_critic_and_with_an_exact_kl(results: Callable[[str], Path], algo: str) -> None:
    one, two = results(f"{algo}_one"), results(f"{algo}_two")
    assert distance(one, two) < 1e-5
    assert told(one)["metrics"] == pytest.approx(told(two)["metrics"], rel=1e-3, abs=1e-5)
    assert all(told(two, rank)["dtensor"] for rank in range(2))
    if algo == "ppo":
        assert "critic.score.weight" in parameters(two)
        assert parameters(two)["critic.score.weight"].abs().max() > 1e-3


def test_supervised_ranks_are_sharded_and_equal_one(results: Callable[[str], Path]) -> None:
    """With activation checkpointing on both ranks; the FLOPs of both together are those of one."""
    one, two = results("sft_one"), results("sft_two")
    assert all(told(two, rank)["dtensor"] for rank in range(2))
    assert told(one)["plain"]
    assert distance(one, two) < 2e-6
    assert told(one)["metrics"] == pytest.approx(told(two)["metrics"], rel=1e-4, abs=1e-6)
    charges = [told(two, rank)["compute"] for rank in range(2)]
    for name, amount in told(one)["compute"].items():
        assert amount > 0
        assert sum(charge[name] for charge in charges) == amount


def test_adapters_on_two_ranks_are_those_of_one(results: Callable[[str], Path], start_dir: Path) -> None:
    """With an exact KL to a reference that wears other adapters, and is refreshed on the way."""
    one, two = results("lora_one"), results("lora_two")
    assert all(told(two, rank)["dtensor"] for rank in range(2))
    assert distance(one, two) < 5e-6
    assert told(one)["metrics"] == pytest.approx(told(two)["metrics"], rel=1e-3, abs=1e-6)
    start = load_file(start_dir / "model.safetensors")
    merged = parameters(two)
    assert merged.keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], merged[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}
    saved = [load_file(f / "checkpoints" / "step_3" / "adapter" / "adapter_model.safetensors") for f in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    assert max(float((saved[0][n] - saved[1][n]).abs().max()) for n in saved[0]) < 5e-6


@pytest.mark.parametrize("name", ["reward_model", "prm", "implicit"])
def test_models_that_score_are_sharded_and_equal_one_rank(results: Callable[[str], Path], name: str) -> None:
    """In their weights, and in what held-out answers say of them on either rank."""
    one, two = results(f"{name}_one"), results(f"{name}_two")
    assert all(told(two, rank)["dtensor"] for rank in range(2))
    assert told(one)["plain"]
    assert distance(one, two) < 1e-5
    metrics = told(one)["metrics"]
    assert "eval/accuracy" in metrics
    assert metrics == pytest.approx(told(two)["metrics"], rel=1e-3, abs=1e-5)
    assert told(two, 1)["metrics"] == told(two)["metrics"]


@pytest.mark.parametrize(
    ("whole", "resumed"),
    [
        ("one", "two_from_one"),
        ("two", "one_from_two"),
        ("ppo_one", "ppo_two_from_one"),
        ("sft_one", "sft_two_from_one"),
        ("lora_one", "lora_two_from_one"),
        ("prm_one", "prm_two_from_one"),
    ],
)
def test_a_checkpoint_fits_another_number_of_ranks(results: Callable[[str], Path], whole: str, resumed: str) -> None:
    assert distance(results(whole), results(resumed)) < 1e-5
    assert told(results(whole))["metrics"] == pytest.approx(told(results(resumed))["metrics"], rel=1e-3, abs=1e-5)


def test_a_world_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"learner\.ranks=2, but WORLD_SIZE=3"):
        join(LearnerConfig(ranks=2), set(), deadline_s=1.0)

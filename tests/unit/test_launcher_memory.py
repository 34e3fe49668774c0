"""What a run will need in memory, what is free, and why the kernel killed a role. /proc and /sys are folders here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import memory
from offtrail.platform.launcher.hosts import LocalHandle
from offtrail.platform.launcher.memory import check, estimate, read_shape
from offtrail.platform.model.start import StartError
from offtrail.platform.runtime.host_memory import FreeMemory, free_memory, kills, resident

GIB = 1 << 30
SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With a start model of 135M parameters, as far as its headers say: the files are holes."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text(json.dumps(SMOL))
    for i, rows in enumerate((100_000, 34_515)):
        header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, rows * 4000]}}).encode()
        with (start / f"model-{i}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + rows * 4000)
    return tmp_path


def config(*keys: str) -> Config:
    return compose(["batch.groups=2", "batch.group_size=4", "model.max_length=512", *keys])


def size(run_dir: Path, role: str, *keys: str) -> int:
    return sum(part.bytes for part in estimate(config(*keys), run_dir / "start") if part.role == role)


# The sum


def test_adapters_need_no_gradients_and_moments_of_the_weights(run_dir: Path) -> None:
    adapters = 30 * 16 * (2 * 576 + 2 * (576 + 192) + 2 * 576 + 3 * (576 + 1536))
    P, keys = 134_515_000, ("learner.lora.rank=16", "tracking.gradient_cosine=false")
    plain = size(run_dir, "learner", "tracking.gradient_cosine=false")
    # The base and a merged copy of it, in place of parameters, gradients and two moments.
    assert size(run_dir, "learner", *keys) == plain + 4 * (2 * P + 4 * adapters) - 4 * 4 * P
    # A reference is adapters again, and not a model.
    kl = ("algo.kl=k3", "algo.kl_coef=0.01")
    assert size(run_dir, "learner", *keys, *kl) == size(run_dir, "learner", *keys) + 4 * 2 * adapters


def test_versions_of_adapters_are_small_and_who_merges_them_holds_the_start_model_too(run_dir: Path) -> None:
    adapters = 30 * 16 * (2 * 576 + 2 * (576 + 192) + 2 * 576 + 3 * (576 + 1536))
    P, keys = 134_515_000, ("learner.lora.rank=16", "eval.every=10", "learner.steps=40")
    alone = (*keys, "learner.lora.publish=adapter")
    assert size(run_dir, "weight channel", *alone) == (1 + 6) * 4 * adapters  # the one kept, and six that may wait
    for role in ("generator", "evaluator"):
        assert size(run_dir, role, *alone) == size(run_dir, role, *keys) + 4 * P
    assert size(run_dir, "learner", *alone) == size(run_dir, "learner", *keys)


def test_a_models_size_is_read_from_the_headers_of_its_files(run_dir: Path) -> None:
    shape = read_shape(run_dir / "start")
    assert shape is not None
    assert (shape.parameters, shape.head_size, shape.kv_numbers) == (134_515_000, 64, 2 * 30 * 3 * 64)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, run_dir / "start" / "model-2.safetensors")
    more = read_shape(run_dir / "start")
    assert more is not None
    assert more.parameters == shape.parameters + 22
    (run_dir / "start" / "config.json").write_text('{"model_type": "mamba"}')
    assert read_shape(run_dir / "start") is None
    assert list(estimate(config(), run_dir / "start")) == []


def test_the_generators_cache_is_of_what_admission_lets_run(run_dir: Path) -> None:
    sample = 512 * 2 * 30 * 3 * 64 * 4 + 49152 * memory.SAMPLED_BYTES
    few = size(run_dir, "generator", "staleness.max=5", "generator.max_in_flight=30")
    assert size(run_dir, "generator", "staleness.max=6", "generator.max_in_flight=30") - few == 2 * 4 * sample
    assert size(run_dir, "generator", "staleness.max=9", "generator.max_in_flight=12") == few
    bounded = size(run_dir, "generator", "engine.kv_cache_mb=256", "staleness.max=9")
    assert bounded < few


def test_the_weight_channel_holds_as_many_versions_without_a_score_as_may_wait(run_dir: Path) -> None:
    version = 4 * 134_515_000  # 513 MiB
    for keys, versions in (
        (["eval.every=0"], 1 + 1),  # of the first and the last version one may wait in 1 GiB
        (["eval.every=0", "eval.waiting_mb=2000"], 1 + 2),
        (["eval.every=1", "eval.waiting_mb=2000"], 1 + 3),
        (["eval.every=1", "eval.waiting_mb=0"], 1 + 1),
        (["eval.every=1", "eval.waiting_mb=0", "learner.device=cuda"], 2 + 1),  # it writes into a retired one
    ):
        assert size(run_dir, "weight channel", *keys) == versions * version


def test_each_named_key_lowers_its_role(run_dir: Path) -> None:
    before = {role: size(run_dir, role) for role in ("learner", "generator", "evaluator")}
    assert size(run_dir, "learner", "learner.tokens_per_microbatch=512") < before["learner"]
    assert size(run_dir, "learner", "learner.activation_checkpointing=true") < before["learner"]
    assert size(run_dir, "learner", "tracking.gradient_cosine=false") == before["learner"] - 4 * 134_515_000
    activations = 512 * 30 * (5 * 576 + 2 * 1536 + 2 * 15 * 64)
    one = ("learner.tokens_per_microbatch=512",)
    mixed = size(run_dir, "learner", "learner.dtype=bfloat16", *one)
    assert mixed == size(run_dir, "learner", *one) - activations
    critic_and_reference = 16 * 134_515_000 + 4 * 134_515_000
    assert size(run_dir, "learner", "algo=ppo") == before["learner"] + critic_and_reference
    for key in ("engine.max_running=8", "engine.kv_cache_mb=128"):
        assert size(run_dir, "generator", key, "staleness.max=8") < size(run_dir, "generator", "staleness.max=8")
    for key in ("engine.max_running=8", "engine.kv_cache_mb=128", "eval.prompts=4"):
        assert size(run_dir, "evaluator", key) < before["evaluator"]


def test_what_does_not_fit_is_refused_with_the_sum_and_its_keys(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = sum(part.bytes for part in estimate(config(), run_dir / "start"))
    check(config(), run_dir, FreeMemory(2 * needed, "this machine"))
    assert capsys.readouterr().err == ""
    check(config(), run_dir, FreeMemory(needed + 1, "this machine"))
    assert "offtrail: warning: the roles may need" in capsys.readouterr().err
    with pytest.raises(StartError) as refused:
        check(config(), run_dir, FreeMemory(5 * GIB, "control group /sys/fs/cgroup/job"))
    message = str(refused.value)
    assert "\n" not in message
    for word in (
        f"may need {needed / GIB:.1f} GiB", "5.0 GiB are free on control group /sys/fs/cgroup/job", "learner ",
        "evaluator ", "generator ", "weight channel ", "learner.tokens_per_microbatch", "eval.prompts",
        "run.memory_check=warn",
    ):  # fmt: skip
        assert word in message
    check(config("run.memory_check=warn"), run_dir, FreeMemory(5 * GIB, "this machine"))
    assert "5.0 GiB are free" in capsys.readouterr().err
    check(config("run.memory_check=off"), run_dir, FreeMemory(5 * GIB, "this machine"))
    assert capsys.readouterr().err == ""


# What is free


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99999 kB\nMemAvailable:   8388608 kB\n", "proc/vmstat": "nr_free 1\noom_kill 7\n"}


def test_of_all_limits_the_tightest_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert kills(tmp_path) is None
    assert free_memory(tree(tmp_path, MEMINFO)) == FreeMemory(8 * GIB, "this machine")
    assert kills(tmp_path) == 7
    group = "sys/fs/cgroup/slurm/job"
    tree(tmp_path, {
        "proc/self/cgroup": "0::/slurm/job\n", f"{group}/memory.max": "max\n", f"{group}/memory.current": "0\n",
        f"{group}/memory.events": "low 0\noom_kill 2\n", "sys/fs/cgroup/slurm/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    })  # fmt: skip
    assert free_memory(tmp_path) == FreeMemory(2 * GIB, f"control group {tmp_path}/sys/fs/cgroup/slurm")
    assert kills(tmp_path) == 2


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/a"
    tree(tmp_path, MEMINFO | {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n",
        f"{group}/memory.limit_in_bytes": f"{2 * GIB}\n", f"{group}/memory.usage_in_bytes": f"{GIB}\n",
        f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 4096\n",
    })  # fmt: skip
    assert free_memory(tmp_path) == FreeMemory(GIB + 4096, f"control group {tmp_path}/{group}")


# Why it was killed


def dead(tmp_path: Path, signum: signal.Signals) -> str:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    handle = LocalHandle("evaluator-0", process, tmp_path / "no.log")
    handle.poll()
    process.send_signal(signum)
    process.wait()
    return handle.exit_report()


def test_a_sigkill_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([3, 4, 4, 4, None, None])
    monkeypatch.setattr(memory, "kills", lambda: next(counted))
    monkeypatch.setattr(memory, "free_memory", lambda: FreeMemory(GIB, "this machine"))
    monkeypatch.setattr(memory, "resident", lambda pid: 6 * GIB)
    report = dead(tmp_path, signal.SIGKILL)
    assert report.startswith("evaluator-0 was killed by SIGKILL: out of memory: oom_kill rose by 1; ")
    assert "it was seen to hold 6.0 GiB, and 1.0 GiB were free on this machine at the least" in report
    assert "lower engine.kv_cache_mb, engine.max_running or eval.prompts" in report
    assert "somebody sent it" in dead(tmp_path, signal.SIGKILL)
    assert "likely out of memory" in dead(tmp_path, signal.SIGKILL)


def test_another_signal_says_nothing_of_memory(tmp_path: Path) -> None:
    report = dead(tmp_path, signal.SIGTERM)
    assert report == f"evaluator-0 was killed by SIGTERM (log: {tmp_path / 'no.log'})"


def test_a_living_process_has_pages() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert resident(process.pid) > 0
        process.kill()
    assert resident(process.pid) == 0


def test_what_was_freed_is_given_back_once_and_not_for_what_glibc_still_counts() -> None:
    """In a process of its own: other tests' heaps are not the matter here."""
    code = """
import ctypes
import numpy as np
from offtrail.platform.runtime import host_memory
library, trims = host_memory._glibc(), []
class Counting:
    def __getattr__(self, name):
        if name == "malloc_trim":
            trims.append(name)
        return getattr(library, name)
host_memory._glibc = Counting
host_memory.give_back_freed()
def used():
    return host_memory._resident_anonymous() >> 20
def fragmented():  # below the size that is mapped by itself; what is kept stands between what is freed
    blocks = [np.ones(12_500) for _ in range(1000)]
    kept = blocks[::50]
    del blocks[:]
    return kept
trims.clear()
first = fragmented()
full = used()
host_memory.give_back_freed(32 << 20)
assert len(trims) == 1 and full - used() > 60, (trims, full, used())
host_memory.give_back_freed(32 << 20)
assert len(trims) == 1, "nothing new was freed"
assert library.mallinfo2().fordblks > 32 << 20, "glibc counts what the system has back as free"
second = fragmented()
host_memory.give_back_freed(32 << 20)
assert len(trims) == 2
small = [np.ones(12_500) for _ in range(100)]
del small[:]
host_memory.give_back_freed(32 << 20)
assert len(trims) == 2, "10 MB are worth no look"
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr

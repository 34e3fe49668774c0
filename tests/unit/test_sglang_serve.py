"""What a server's process does before sglang runs in it: its stand-ins, its faster attention, its keys and its end."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import offtrail
from offtrail.platform.engines.sglang import cpu, serve


@pytest.fixture
def finders() -> Any:
    """sys.meta_path and sys.modules as they were, whatever the test installs."""
    path, modules = list(sys.meta_path), dict(sys.modules)
    yield
    sys.meta_path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


def test_stand_ins_can_be_imported_and_a_missing_kernel_cannot_be_called(finders: None) -> None:
    cpu.install()
    cpu.install()
    assert sum(type(finder).__module__ == cpu.__name__ for finder in sys.meta_path) == 2
    import sgl_kernel
    import triton
    import triton.language as tl
    from sgl_kernel.elementwise import silu_and_mul

    @triton.jit
    def kernel(x: Any, size: tl.constexpr) -> Any:
        return x + size

    @triton.autotune(configs=[triton.Config({"BLOCK": 16})], key=["n"])
    def tuned(x: Any) -> Any:
        return -x

    assert (kernel(1, 2), tuned(3)) == (3, -3)
    assert (triton.cdiv(7, 2), triton.next_power_of_2(5), triton.next_power_of_2(8)) == (4, 8, 8)
    assert silu_and_mul is not None
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm is a GPU kernel"):
        sgl_kernel.rmsnorm(torch.ones(2))


def test_on_a_gpu_only_missing_features_are_stood_in_for(finders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEATURES", ("xgrammar", "soundfile", "colorsys"))
    there = {name: importlib.util.find_spec(name) is not None for name in ("xgrammar", "soundfile")}
    cpu.install_features()
    cpu.install_features()
    assert sum(isinstance(finder, cpu._Stubs) for finder in sys.meta_path) == (not all(there.values()))
    for name in cpu.FEATURES:
        importlib.import_module(name)
        assert cpu.stands_in_for(name) != there.get(name, True)
    assert not cpu.stands_in_for("triton")
    assert serve.grammar_flags() == ([] if there["xgrammar"] else ["--grammar-backend", "none"])


def attention(query: Any, k_cache: Any, v_cache: Any, rows: Any, lens: Any, scale: float) -> Any:
    """One sequence and one head after the other: softmax(q·K/√d)·V by hand."""
    group = query.shape[1] // k_cache.shape[1]
    out = torch.zeros_like(query)
    for b, length in enumerate(lens.tolist()):
        slots = rows[b, :length].long()
        for head in range(query.shape[1]):
            keys, values = k_cache[slots, head // group], v_cache[slots, head // group]
            out[b, head] = torch.softmax(keys @ query[b, head] * scale, 0) @ values
    return out


def test_decode_of_ragged_sequences_in_one_call_is_attention() -> None:
    torch.manual_seed(0)
    query, k_cache, v_cache = torch.randn(5, 4, 8), torch.randn(90, 2, 8), torch.randn(90, 2, 8)
    lens = torch.tensor([1, 17, 4, 17, 9])
    table = torch.randperm(90)[: 8 * 11].reshape(8, 11).repeat(1, 2).to(torch.int32)  # request rows, longer than any
    table[:, 17:] = 10**6  # beyond a sequence's end anything may stand
    pool = torch.tensor([6, 0, 3, 2, 7])
    fast = cpu.batched_decode(lambda *_: pytest.fail("the slow way is for windows and encoders"))
    output = torch.full_like(query, torch.nan)
    found = fast(None, query, output, k_cache, v_cache, table, pool, lens, scaling=0.3, enable_gqa=True)
    assert found is output
    torch.testing.assert_close(output, attention(query, k_cache, v_cache, table[pool], lens, 0.3))


def test_rare_kinds_of_attention_stay_with_sglang() -> None:
    fast = cpu.batched_decode(lambda *arguments: arguments[-1])
    assert fast(None, *[None] * 7, sliding_window_size=3) == 3


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ([], ""),
        (["--device", "cpu"], "cpu"),
        (["--device=cpu", "--x"], "cpu"),
        (["--device", "cpu", "--device=cuda"], "cuda"),
    ],
)
def test_the_last_device_wins(flags: list[str], device: str) -> None:
    assert serve.device_of(flags) == device


def test_keys_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEY_VARIABLE, "k1")
    monkeypatch.setenv(serve.ADMIN_KEY_VARIABLE, "k2")
    assert serve.keys_as_flags() == ["--api-key", "k1", "--admin-api-key", "k2"]
    assert serve.keys_as_flags() == []
    assert serve.KEY_VARIABLE not in os.environ


DIE = "from offtrail.platform.engines.sglang.serve import die_with; "
CHILD = f"import os, sys, time; {DIE}die_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
PARENT = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
ENV = os.environ | {"PYTHONPATH": str(Path(offtrail.__file__).parents[1])}


def test_a_process_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, env=ENV) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            child.suspend()  # a stopped one dies, too
            parent.kill()
            assert parent.stdout.read() == ""  # ends when nobody holds the pipe any more
        finally:
            parent.kill()
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


FORKS = """
import multiprocessing, os, time
from offtrail.platform.engines.sglang.serve import fork_children

def child(pipe):
    grandchild = multiprocessing.Process(target=time.sleep, args=(600,))
    grandchild.start()
    print(os.getpid(), grandchild.pid, multiprocessing.get_start_method(), flush=True)
    time.sleep(600)

fork_children()
multiprocessing.set_start_method("spawn", force=True)  # as sglang does
multiprocessing.Process(target=child, args=(lambda: "cannot be sent to a process that is spawned",)).start()
time.sleep(600)
"""


def test_children_on_a_cpu_are_forks_and_each_ends_with_the_process_that_made_it() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, env=ENV) as parent:
        try:
            assert parent.stdout is not None
            *pids, method = parent.stdout.readline().split()
            parent.kill()
            assert parent.stdout.read() == ""  # ends when nobody holds the pipe any more
        finally:
            parent.kill()
    assert (len(pids), method) == (2, "fork")


def test_a_process_whose_parent_is_gone_leaves_at_once() -> None:
    code = f"{DIE}die_with(1 << 30); print('stays')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENV)
    assert (done.returncode, done.stdout) == (1, "")

"""The sandbox: what crosses, how runs end and what is said of them, whom it dies with, where it refuses to start."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leftovers import alive
from offtrail.rewards.sandbox import box as boxes
from offtrail.rewards.sandbox import bubblewrap, filter
from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.judge import judge, lines_of
from offtrail.rewards.sandbox.runs import Dead, Functions, Limits, SandboxError
from offtrail.rewards.sandbox.values import pack, unpack
from offtrail.rewards.sandbox.walls import landlock_abi

PLENTY = Limits(seconds=60, cpu_seconds=20)
SOURCE = Path(boxes.offtrail.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    landlock_abi() < 1 and not bubblewrap.found(), reason="neither Landlock nor bubblewrap: nothing is run here"
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
HASHABLE = st.recursive(LEAVES, lambda inner: st.tuples(inner, inner), max_leaves=4)
VALUES = st.recursive(
    LEAVES | st.complex_numbers(allow_nan=False) | st.sets(HASHABLE, max_size=4),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(HASHABLE, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box(limits=PLENTY) as box:
        yield box


def exactly(value: Any) -> Any:
    """With the types of all parts, since 1 == True."""
    if isinstance(value, dict):
        return [(exactly(key), exactly(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [exactly(item) for item in value]
    return type(value).__name__, value


@given(VALUES)
def test_plain_values_cross_unchanged(value: Any):
    assert exactly(unpack(pack(value))) == exactly(value)


def test_values_cross_both_ways(box: Box):
    value = [None, True, 2**70, -0.1, "a\ud800é", b"\0", (1, [2]), {3, 4}, {(1, "k"): math.inf}, 1 + 2j, int]
    with box.functions("def f(*a, **k): return [*a, k]") as run:
        assert run.call("f", *value, x=1) == [*value, {"x": 1}]
        assert run.call("f") == [{}]


@pytest.mark.parametrize("value", [object(), lambda: 0, [1, object()], {"a": math}, Limits])
def test_nothing_else_crosses(value: Any):
    with pytest.raises(TypeError, match="cannot cross the sandbox's wall"):
        pack(value)


@given(st.recursive(st.none() | st.integers() | st.text("iflctdsby0x"), lambda v: st.lists(v) | st.dictionaries(st.sampled_from("iflctdsby"), v), max_leaves=9))  # fmt: skip # noqa: E501
def test_what_a_child_may_write_is_a_value_or_an_exception(written: Any):
    try:
        value = unpack(written)
    except Exception:
        return
    assert type(value).__module__ == "builtins"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "syntax: SyntaxError"),
        ("\tdef f(x): pass\n  x", "syntax: "),
        ("def f(x):\n\0", "syntax: "),
        ("1/0", "raised: ZeroDivisionError: division by zero"),
        ("x = bytearray(1 << 40)", "memory: MemoryError"),
        ("import os; os._exit(3)", "died: ended by itself with code 3"),
        ("import ctypes; ctypes.string_at(0)", "died: signal SIGSEGV"),
        ("raise SystemExit", "raised: SystemExit"),
        ("(" * 5000, "syntax: "),
        ("#" * (1 << 20) + "\n", "syntax: more than 1,048,576 characters"),
        ("def f(x): 1/0", "raised: ZeroDivisionError"),
        ("def f(x): return object()", "raised: TypeError: a object cannot cross"),
        ("def f(x): return [0] * 10**12", "memory: MemoryError"),
        ("def f(x): return 'a' * (1 << 21)", "reply: more than 1,048,576 bytes"),
        ("def f(x): return 5", "wrong: assert f(2) == 4"),
        ("def g(x): return 4", "raised: NameError: name 'f' is not defined"),
        ("def f(x): return 4", "ok"),
    ],
)
def test_everything_has_a_reason(box: Box, program: str, reason: str):
    judged = judge(box, program, {"asserts": ["assert f(2) == 4"], "functions": ["f"]})
    assert judged.reason.startswith(reason)
    assert judged.score == (reason == "ok")


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("while 1: pass", Limits(60, 1), "timeout: took more than 1 s of CPU"),
        ("import time\ntime.sleep(100)", Limits(0.3, 5), "timeout: ran past 0.3 s"),
    ],
)
def test_clock_and_cpu_time_end_a_run(box: Box, program: str, limits: Limits, reason: str):
    box.limits, before = limits, box.limits
    try:
        assert judge(box, program, {"asserts": ["f(2)"], "functions": ["f"]}).reason == reason
        assert judge(box, program, {"cases": [{"input": "", "output": ""}]}).reason == reason
    finally:
        box.limits = before


def test_a_share_of_the_tests(box: Box):
    meta = {"asserts": [f"assert f({x}) == {x * x}" for x in range(4)], "functions": ["f"]}
    assert judge(box, "def f(x): return x", meta, share=True).score == 0.5
    assert judge(box, "def f(x): return x", meta).score == 0
    dies = "import os\ndef f(x):\n  if x == 2: os._exit(0)\n  return x * x"
    judged = judge(box, dies, meta, share=True)
    assert (judged.score, judged.reason) == (0.5, "died: ended by itself with code 0")
    cases = [{"input": f"{x}\n", "output": f"{x * x}"} for x in range(4)]
    assert judge(box, "print(input())", {"cases": cases}, share=True).score == 0.5


def test_asserts_count_under_python_o(box: Box):
    code = (
        "from offtrail.rewards.sandbox.box import Box; from offtrail.rewards.sandbox.judge import judge\n"
        "print(judge(Box(), 'def f(x): return 5', {'asserts': ['assert f(2) == 4'], 'functions': ['f']}).reason)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "wrong: assert f(2) == 4"


ADDS = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"


@pytest.mark.parametrize(
    ("program", "output", "reason"),
    [
        (ADDS, "6", "ok"),
        (ADDS, "6\n\n", "ok"),
        (ADDS + "\nsys.exit(0)", "6", "ok"),
        ("print(*map(int, open(0).read().split()), sep=' \\n', end='\\n\\n')", "1\n2\n3", "ok"),
        ("import os; os.write(1, b'6')", "6", "ok"),
        ("if __name__ == '__main__': print(int(input()) + 5, flush=True)", "6", "ok"),
        ("print(6, end=' ')", "6", "ok"),
        ("print(' 6')", "6", "wrong: output of test 1"),
        ("print('6.0')", "6", "wrong: output of test 1"),
        ("print(6)\nraise SystemExit(1)", "6", "raised: SystemExit: 1"),
        ("print(6)\n1/0", "6", "raised: ZeroDivisionError"),
        ("print(6, flush=True)\nimport os; os._exit(0)", "6", "died: ended by itself with code 0"),
        ("while 1: print('x' * 1000)", "6", "reply: more than 1,048,576 bytes of output"),
        ("print(input(), input(), input(), input())", "6", "raised: EOFError"),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')", "6", "wrong: output of test 1"),
        ("import os\nos.write(3, b'{\"load\": null}\\n')\nprint(5)", "6", "wrong: output of test 1"),
    ],
)
def test_whole_programs(box: Box, program: str, output: str, reason: str):
    judged = judge(box, program, {"cases": [{"input": "1\n2\n3\n", "output": output}]})
    assert judged.reason.startswith(reason)
    assert judged.score == (reason == "ok")


def test_large_input_and_output_pass_through(box: Box):
    text = "word \n" * 100_000
    meta = {"cases": [{"input": text, "output": text}]}
    assert judge(box, "import sys\nfor line in sys.stdin: print(line, end='')", meta).reason == "ok"
    assert judge(box, "print(1)", {"cases": [{"input": text, "output": "1"}]}).reason == "ok"


@given(st.text())
@settings(max_examples=50)
def test_trailing_blanks_do_not_count(text: str):
    assert lines_of(text) == lines_of(text + " \n\n") == lines_of(text.replace("\n", "  \n"))


HOLDS = """
import resource, sys
from offtrail.rewards.sandbox.box import Box, Limits
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
box = Box(sys.argv[1], Limits(600, 600))
run = box.functions("import time\\ndef f(x): time.sleep(x)")
print(box.server, flush=True)
run.call("f", 500)
"""


@pytest.mark.parametrize("wall", ["landlock", "bwrap"])
def test_it_works_under_a_workers_memory_and_dies_with_it(wall: str):
    if wall == "bwrap" and not bubblewrap.found():
        pytest.skip("bubblewrap is not installed")
    from offtrail.platform.verifier.keeper import descendants

    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, wall], env=environment, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout is not None
        server = int(held.stdout.readline())
        below = {server, *descendants(server)}
        assert len(below) >= 2
        held.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while left := {pid for pid in below if alive(pid)}:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_a_run_is_gone_when_it_is_closed(box: Box):
    from offtrail.platform.verifier.keeper import descendants

    before = set(descendants(box.server))
    run = box.functions(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()\ndef f(x): return x"
    )
    assert len(set(descendants(box.server)) - before) == 1
    assert run.call("f", 1) == 1
    run.close()
    assert set(descendants(box.server)) == before
    assert run.dead is None


def test_runs_may_overlap_and_end_in_any_order(box: Box):
    one, two = (box.functions(f"def f(x): return {n}") for n in (1, 2))
    assert (two.call("f", 0), one.call("f", 0)) == (2, 1)
    two.close()
    one.close()
    with box.functions("def f(x): return 3") as three:
        assert three.call("f", 0) == 3


def call_until_it_raises(run: Functions) -> NoReturn:
    """The kernel ends a run a moment after its server; Dead, of its own deadline, where it does not."""
    while True:
        assert run.call("f", 1) == 1


def test_a_server_that_was_killed_is_no_programs_fault_and_the_next_one_runs():
    with Box(limits=PLENTY) as box:
        run = box.functions("def f(x): return 1")
        os.kill(box.server, signal.SIGKILL)
        with pytest.raises(SandboxError, match="server has ended"):
            call_until_it_raises(run)
        with box.functions("def f(x): return 2") as again:
            assert again.call("f", 1) == 2


def test_the_whole_standard_library_can_be_imported(box: Box):
    """Also what the server has not read, as whoever the run is."""
    program = "import unittest, xml.dom.minidom, sqlite3, csv\ndef f(x): return csv.__name__"
    assert judge(box, program, {"asserts": ["assert f(0) == 'csv'"], "functions": ["f"]}).reason == "ok"


def test_the_dead_stay_dead(box: Box):
    with box.functions("import os\ndef f(x): os._exit(0)") as run:
        for _ in range(2):
            with pytest.raises(Dead, match="died"):
                run.call("f", 1)


def test_where_no_wall_stands_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(boxes, "landlock_abi", lambda: -1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"wall=auto: no sandbox stands here.*bwrap is not on PATH.*no Landlock"):
        Box()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SandboxError, match="bubblewrap does not work: bwrap: No permissions to create"):
        Box("bwrap")


@pytest.mark.skipif(landlock_abi() < 1, reason="the kernel has no Landlock")
def test_auto_takes_landlock_where_bubblewrap_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with Box() as box:
        assert box.walls == "Landlock, seccomp"


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SandboxError, match="wall=none: must be one of auto, bwrap, landlock"):
        Box("none")  # type: ignore[arg-type]
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 29, 1 << 29))
    with pytest.raises(SandboxError, match=r"memory_mb=1024: is more than the 512 MB.*raise reward.memory_mb"):
        Box(limits=Limits(memory=1 << 30))
    monkeypatch.setattr(filter, "MACHINES", {})
    monkeypatch.setattr(boxes, "MACHINES", {})
    with pytest.raises(SandboxError, match="programs can be run on Linux on"):
        Box()


@pytest.mark.parametrize("machine", filter.MACHINES)
def test_the_filter_of_each_machine_is_built(machine: str, monkeypatch: pytest.MonkeyPatch):
    """Of another machine than this one it is not run."""
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": machine}))
    code = filter._built.__wrapped__()
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4096
    table = filter.MACHINES[machine][1]
    assert len(set(table.values())) == len(table)
    assert not {"fork", "execve", "socket", "kill", "ptrace", "setsid", "bpf", "mount"} & table.keys()

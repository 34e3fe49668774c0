"""The verifier pool against verifiers that loop, die, lie, print and eat memory: no key is lost, no process is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import offtrail
from leftovers import alive
from offtrail.core.types import Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.verifier import pool as pool_module
from offtrail.platform.verifier.pool import VerifierError, VerifierPool
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.total import Scored
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.countdown import CountdownConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.registry import make_task
from offtrail.tasks.split import stream

WORKER = """
import os, sys, time
from pathlib import Path
from offtrail.platform.verifier.worker import serve
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.registry import make_reward

def verify(problem, answer):
    flag = Path(problem.answer)
    match answer:
        case "loop":
            flag.touch()
            while True: pass
        case "die": os._exit(3)
        case "kill": os.kill(os.getpid(), 9)
        case "die once" if not flag.exists():
            flag.touch()
            os._exit(3)
        case "raise": raise KeyError("no such rule")
        case "print": print("noise on stdout", flush=True)
        case "eat": return bool(bytearray(4 << 30))
        case "lie": os.write(LINE, b"\\x03\\x00\\x00\\x00abc")
        case "flood": os.write(LINE, b"\\xff\\xff\\xff\\xff") ; [os.write(LINE, bytes(1 << 20)) for _ in range(64)]
        case "slow": time.sleep(0.5)
        case "print much": [print("x" * 1023) for _ in range(64 << 10)]
        case "daemon" | "daemon and die":
            if os.fork() == 0:
                os.setsid()
                if os.fork(): os._exit(0)
                os.setsid()
                flag.write_text(str(os.getpid()))
                while True: time.sleep(1)
            os.wait()
            while not flag.exists() or not flag.read_text(): time.sleep(0.01)
            if answer == "daemon and die": os._exit(3)
        case "spinners":
            for _ in range(6):
                if os.fork() == 0:
                    if os.fork(): os._exit(0)
                    while True: pass
            time.sleep(600)
        case "child":
            if pid := os.fork(): flag.write_text(str(pid))
            while True: time.sleep(1)
    return answer != "wrong"

LINE = os.dup(1)
serve(lambda setup: make_reward(RewardConfig(), verify))
"""

Result = dict[Hashable, dict[str, np.ndarray[Any, Any]] | None]


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return (sys.executable, "-P", str(path))


OTHERS: set[psutil.Process] = set()
"""Children from before the test: torch keeps one for shared memory once another file's test has used it."""


def children(recursive: bool = False) -> list[psutil.Process]:
    """Child processes of the test itself."""
    return [child for child in psutil.Process().children(recursive) if child not in OTHERS]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After each test: no child process and no open descriptor more than before."""
    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert children(recursive=True) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def config(**reward: Any) -> Config:
    return Config(reward=RewardConfig(**{"deadline_seconds": 60.0, **reward}))


def put(pool: VerifierPool, key: Hashable, *answers: str, flag: Path | str = "") -> None:
    texts = [f"<think></think><answer>{answer}</answer>" for answer in answers]
    pool.submit(key, Problem("chain", 0, "p", str(flag)), texts, [True] * len(texts))


def collect(pool: VerifierPool, until: Callable[[Result], bool] = lambda _: False) -> Result:
    """Poll until nothing is pending (or ``until``); pytest's own timeout bounds it."""
    results: Result = {}
    while pool.pending and not until(results):
        for key, components in pool.poll(timeout_s=0.5):
            assert key not in results
            results[key] = components
    return results


def wait_for(condition: Callable[[], bool]) -> None:
    """Until ``condition``; pytest's own timeout bounds it."""
    while not condition():
        time.sleep(0.01)


def test_behaviour_is_counted_beside_the_scores_unless_it_is_turned_off() -> None:
    off = config()
    off.tracking.behaviour = False
    for given, expected in (
        (config(), {"answers": 2, "words": 3, "reflection": 1, "reflecting": 1, "wait": 1}),
        (off, {}),
    ):
        with VerifierPool(given) as pool:
            pool.submit(0, Problem("chain", 0, "p", "7"), ["Wait, seven", "seven"], [True, True])
            [scored] = collect(pool).values()
        assert isinstance(scored, Scored)
        assert scored.counts == expected


def niceness(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


def test_workers_are_as_nice_as_asked_until_they_are_renewed_and_no_group_is_lost(command, tmp_path) -> None:
    """One of two groups is being judged then: it is judged anew, by a worker that is not nice."""
    own, flag = niceness(os.getpid()), tmp_path / "flag"
    with VerifierPool(config(), command, nice=7) as pool:
        put(pool, "warm", "right")
        collect(pool)
        assert {niceness(child.pid) for child in children(recursive=True)} == {own + 7}
        put(pool, "a", "die once", flag=flag)  # a worker that takes another's place is nice, too
        assert collect(pool).keys() == {"a"}
        assert {niceness(child.pid) for child in children(recursive=True)} == {own + 7}
        put(pool, "b", "slow", flag=tmp_path / "slow")
        put(pool, "c", "wrong")
        pool.renew()
        found = collect(pool)
        assert {niceness(child.pid) for child in children(recursive=True)} == {own}
        assert {key: scored["accuracy"].tolist() for key, scored in found.items()} == {"b": [1], "c": [0]}
        assert pool.counters["verifier_deaths"] == 1


def test_sets_are_judged_by_their_own_task_and_reward_in_the_same_workers() -> None:
    """The same answer, as text and as a number; the set's reward looks for a box, and has one component."""
    reward = RewardConfig(answer="boxed", weights={"accuracy": 1.0})
    sets = {"numbers": Config(task=JsonlConfig(path="/not/read.jsonl"), reward=reward)}
    problem = Problem("jsonl", 0, "q", "18", {"solution": ""})
    with VerifierPool(Config(task=JsonlConfig(path="/not/read.jsonl", compare="text")), sets=sets) as pool:
        assert len(children()) == 1
        texts = ["<think></think><answer>18.0</answer>", "\\boxed{18.0}"]
        pool.submit(0, problem, texts, [True, True])
        pool.of("numbers").submit(1, problem, texts, [True, True])
        found = collect(pool)
    assert found[0] is not None
    assert found[1] is not None
    assert {name: column.tolist() for name, column in found[0].items()} == {"accuracy": [0, 0], "format": [1, 0]}
    assert {name: column.tolist() for name, column in found[1].items()} == {"accuracy": [0, 1]}


@pytest.mark.parametrize(
    "task",
    [
        ChainConfig(noise=0.0),  # without slips a trace is right
        CountdownConfig(),
        MixtureConfig(settings={"chain": {"noise": 0.0}}),
        JsonlConfig(path="/not/read.jsonl"),
    ],
)
def test_every_task_is_rebuilt_in_the_worker(task: Any):
    made = make_task(task, 0, load=False)
    problems = (
        [Problem("jsonl", i, "q", f"{i}.0", {"solution": ""}) for i in range(20)]
        if task.name == "jsonl"
        else [made.train(i) for i in range(20)]
    )
    rng = stream("pool")
    with VerifierPool(Config(task=task)) as pool:
        for i, problem in enumerate(problems):
            right = made.trace(problem, rng)
            texts = [right, "<think></think><answer>none</answer>", right, f"{right} and"]
            pool.submit(i, problem, texts, [True, True, False, True])
        results = collect(pool)
    assert sorted(results) == list(range(20))  # type: ignore[type-var]
    for components in results.values():
        assert components is not None
        assert {name: column.dtype for name, column in components.items()} == {
            "accuracy": np.float32,
            "format": np.float32,
        }
        assert components["accuracy"].tolist() == [1, 0, 1, 0]
        assert components["format"].tolist() == [1, 1, 0, 0]
    assert pool.counters["verified_groups"] == 20
    assert pool.counters["verified_samples"] == 80


def test_a_verifier_that_loops_is_killed_at_its_deadline_while_others_answer(command: tuple[str, ...], tmp_path: Path):
    with VerifierPool(config(workers=2, deadline_seconds=3.0), command) as pool:
        for i in range(16):
            put(pool, f"warm {i}", "right")
        collect(pool)
        workers = children()
        put(pool, "stuck", "right", "loop", "right", flag=tmp_path / "flag")
        for i in range(40):
            put(pool, i, "right", "wrong")
        wait_for((tmp_path / "flag").exists)
        before = psutil.Process().cpu_times()
        results = collect(pool)
        spent = psutil.Process().cpu_times()
        survivors = [worker for worker in workers if alive(worker.pid)]
    order = list(results)
    assert order.index("stuck") >= 37  # at most three others lay in the pipe behind it
    stuck = results.pop("stuck")
    assert stuck is not None
    assert stuck["accuracy"].tolist() == stuck["format"].tolist() == [0, 0, 0]  # on_timeout=zero
    assert all(r is not None and r["accuracy"].tolist() == [1, 0] for r in results.values())
    assert pool.counters["verifier_timeouts"] == 1
    assert len(survivors) == 1
    assert spent.user + spent.system - before.user - before.system < 1.0  # it slept: CPU time, not the clock


def test_on_timeout_refuse_returns_none_with_the_reason(command: tuple[str, ...]):
    with VerifierPool(config(deadline_seconds=0.3, on_timeout="refuse"), command) as pool:
        put(pool, "stuck", "loop")
        put(pool, "next", "right")
        results = collect(pool)
        assert results["stuck"] is None
        assert pool.reason("stuck") == "verifier ran past reward.deadline_seconds=0.3 and was killed"
        assert results["next"] is not None


def test_a_worker_that_dies_costs_one_retry(command: tuple[str, ...], tmp_path: Path):
    with VerifierPool(config(), command) as pool:
        put(pool, "once", "right", "die once", flag=tmp_path / "flag")
        results = collect(pool)
    assert results["once"] is not None
    assert results["once"]["accuracy"].tolist() == [1, 1]
    assert pool.counters["verifier_deaths"] == 1


@pytest.mark.parametrize(("answer", "how"), [("die", "exit code 3"), ("kill", "signal SIGKILL")])
def test_a_group_that_kills_two_workers_fails_with_a_reason_and_the_rest_go_on(
    command: tuple[str, ...], answer: str, how: str
):
    with VerifierPool(config(), command) as pool:
        put(pool, "before", "right")
        put(pool, "deadly", answer)
        for i in range(10):
            put(pool, i, "right")
        results = collect(pool)
        assert results.pop("deadly") is None
        assert pool.reason("deadly") == f"verifier worker died twice on this group ({how})"
    assert len(results) == 11
    assert all(r is not None and r["accuracy"].tolist() == [1] for r in results.values())
    assert pool.counters["verifier_deaths"] == 2


def test_what_a_verifier_raises_is_the_groups_reason(command: tuple[str, ...]):
    with VerifierPool(config(), command) as pool:
        put(pool, "raises", "right", "raise")
        put(pool, "eats", "eat")
        put(pool, "fine", "right")
        results = collect(pool)
        assert results["raises"] is results["eats"] is None
        assert pool.reason("raises") == "reward component accuracy raised KeyError: 'no such rule'"
        assert pool.reason("eats").startswith("reward component accuracy raised MemoryError")
        assert results["fine"] is not None
    assert pool.counters["verifier_deaths"] == 0


@pytest.mark.parametrize("answer", ["lie", "flood"])
def test_bytes_that_are_no_verdict_end_the_worker(command: tuple[str, ...], answer: str):
    resident = psutil.Process().memory_info().rss
    with VerifierPool(config(), command) as pool:
        put(pool, "bad", answer)
        put(pool, "good", "right")
        results = collect(pool)
        assert results["bad"] is None
        assert results["good"] is not None
    assert psutil.Process().memory_info().rss - resident < 50 << 20


def test_printing_does_not_disturb_the_line(command: tuple[str, ...]):
    with VerifierPool(config(), command) as pool:
        put(pool, "loud", "print", "wrong", "print")
        results = collect(pool)
    assert results["loud"] is not None
    assert results["loud"]["accuracy"].tolist() == [1, 0, 1]


def test_processes_that_a_verifier_started_are_killed_with_it(command: tuple[str, ...], tmp_path: Path):
    flag = tmp_path / "flag"
    with VerifierPool(config(deadline_seconds=2.0), command) as pool:
        put(pool, "child", "child", flag=flag)
        wait_for(lambda: flag.exists() and flag.read_text() != "")
        child = int(flag.read_text())
        assert alive(child)
        collect(pool)
    wait_for(lambda: not alive(child))


@pytest.mark.parametrize("answer", ["daemon", "daemon and die"])
def test_a_process_that_has_forked_away_into_a_session_of_its_own_ends_with_its_verifier(
    command: tuple[str, ...], tmp_path: Path, answer: str
):
    flag = tmp_path / "flag"
    with VerifierPool(config(), command) as pool:
        put(pool, "daemon", answer, flag=flag)
        wait_for(lambda: flag.exists() and flag.read_text() != "")
        daemon = int(flag.read_text())
        collect(pool)
    assert not alive(daemon)


def test_what_is_printed_is_cut_and_holds_nobody_up(command: tuple[str, ...], capfd: pytest.CaptureFixture[str]):
    with VerifierPool(config(), command) as pool:
        put(pool, "loud", "print much")
        results = collect(pool)
        printed, groups = "", 0
        while "noise on stdout" not in printed:  # what lies in the pipe when a verdict comes counts as the next group's
            groups += 1
            put(pool, groups, "print")
            collect(pool)
            printed += capfd.readouterr().err
    assert results["loud"] is not None
    assert results["loud"]["accuracy"].tolist() == [1]
    assert printed.count("x") <= (1 + groups) * 16 << 10
    assert "a verifier prints more than is kept" in printed


def test_a_worker_gets_ready_while_its_caller_is_busy_for_longer_than_it_may_take(command: tuple[str, ...]):
    with VerifierPool(config(start_seconds=0.001), command) as pool:
        [worker] = pool._workers
        wait_for(lambda: select.select([worker._stdout], [], [], 0)[0] != [])
        put(pool, 1, "right")
        results = collect(pool)
    assert results[1] is not None
    assert results[1]["accuracy"].tolist() == [1]


def test_waiting_for_a_busy_machines_core_is_not_the_verifiers_time(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    never = (sys.executable, "-c", "import time; time.sleep(600)")
    with VerifierPool(config(start_seconds=0.2), never) as pool:
        put(pool, 1, "right")
        with pytest.raises(VerifierError, match=r"reward\.start_seconds=0\.2"):
            collect(pool)
    settings = config(start_seconds=0.001, deadline_seconds=0.1)
    monkeypatch.setattr(pool_module, "waited_for_a_core", lambda pid: time.monotonic())
    monkeypatch.setattr(pool_module, "EXCUSED", 1e6)
    with VerifierPool(settings, command) as pool:
        put(pool, 1, "slow")
        results = collect(pool)
    assert results[1] is not None
    assert results[1]["accuracy"].tolist() == [1]
    assert pool.counters["verifier_timeouts"] == 0
    assert "busy machine" in caplog.text


def test_what_a_verifier_starts_does_not_stop_its_clock(command: tuple[str, ...]):
    with VerifierPool(config(deadline_seconds=1.0), command) as pool:
        put(pool, 1, "spinners")
        assert collect(pool)[1] is not None
        assert pool.counters["verifier_timeouts"] == 1


def test_a_verifier_is_excused_for_ten_deadlines_at_most(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    with VerifierPool(config(deadline_seconds=0.1), command) as pool:
        put(pool, "warm", "right")
        collect(pool)
        monkeypatch.setattr(pool_module, "waited_for_a_core", lambda pid: time.monotonic())
        put(pool, 1, "loop")
        collect(pool)
        assert pool.counters["verifier_timeouts"] == 1


def test_many_keys_under_random_deaths_all_come_back_once(command: tuple[str, ...]):
    rng = stream("deaths")
    with VerifierPool(config(workers=2, deadline_seconds=30.0), command) as pool:
        kinds = [rng.choice(["right"] * 12 + ["die", "raise"]) for _ in range(150)]
        results: Result = {}
        for i, kind in enumerate(kinds):
            put(pool, i, kind, "right")
            results |= dict(pool.poll())
            if i % 50 == 25:  # and one from outside
                os.kill(children()[0].pid, signal.SIGKILL)
        results |= collect(pool)
    assert sorted(results) == list(range(150))  # type: ignore[type-var]
    assert all(results[i] is None for i, kind in enumerate(kinds) if kind != "right")
    failed = [i for i, kind in enumerate(kinds) if kind == "right" and results[i] is None]
    assert len(failed) <= 1  # only a group that two kills from outside have hit may fail


def test_large_groups_do_not_block_the_caller(command: tuple[str, ...]):
    """A frame far larger than a pipe, sent while the worker is stuck: submit returns, and the text arrives whole."""
    with VerifierPool(config(deadline_seconds=1.0), command) as pool:
        put(pool, "stuck", "loop")
        texts = [f"<think>{'x' * 3_000_000}</think><answer>right</answer>"] * 3
        pool.submit("large", Problem("chain", 0, "p", ""), texts, [True] * 3)
        assert pool.pending == 2
        results = collect(pool)
    assert results["large"] is not None
    assert results["large"]["accuracy"].tolist() == [1, 1, 1]


def test_wrong_use(command: tuple[str, ...]):
    with VerifierPool(config(), command) as pool:
        put(pool, 1, "right")
        with pytest.raises(ValueError, match="group 1: submitted twice"):
            put(pool, 1, "right")
        with pytest.raises(ValueError, match="2 texts, 1 finished flags"):
            pool.submit(2, Problem("chain", 0, "p", ""), ["a", "b"], [True])
        assert set(collect(pool)) == {1}
        put(pool, 1, "right")  # a key may come again once it was returned
        assert set(collect(pool)) == {1}


def test_close_with_work_in_flight_leaves_nothing(command: tuple[str, ...]):
    pool = VerifierPool(config(workers=2), command)
    for i in range(20):
        put(pool, i, "loop", flag="/dev/null")
    pool.poll(0.2)
    pool.close()
    assert pool.pending == 0
    pool.close()


def test_workers_that_cannot_start_are_an_error_not_a_hang(tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text("import sys; sys.exit(7)")
    with VerifierPool(config(), (sys.executable, str(path))) as pool:
        put(pool, 1, "right")
        with pytest.raises(VerifierError, match=r"verifier workers die while starting \(exit code 7\)"):
            collect(pool)


def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_verifier(command: tuple[str, ...], tmp_path: Path):
    flag, code = tmp_path / "flag", (
        "import sys, time\n"
        "from offtrail.core.types import Problem\n"
        "from offtrail.platform.config.schema import Config\n"
        "from offtrail.platform.verifier.pool import VerifierPool\n"
        "import psutil\n"
        "config = Config(); config.reward.workers, config.reward.deadline_seconds = 2, 600.0\n"
        "pool = VerifierPool(config, sys.argv[2:])\n"
        "pool.submit(1, Problem('chain', 0, 'p', sys.argv[1]), ['<think></think><answer>loop</answer>'], [True])\n"
        "print(*[p.pid for p in psutil.Process().children()], flush=True)\n"
        "while True: pool.poll(0.1)\n"
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(offtrail.__file__).parents[1])}
    arguments = [sys.executable, "-c", code, str(flag), *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        wait_for(flag.exists)
        assert len(workers) == 2
        parent.kill()
    wait_for(lambda: not any(alive(pid) for pid in workers))


def test_a_worker_imports_no_torch():
    code = "import sys, offtrail.platform.verifier.worker; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(offtrail.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


MINE = """
def halves(answered, *, share):
    return None if answered.parts is None else share * answered.accuracy
"""


def test_a_component_from_the_current_directory_gets_its_settings_in_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    settings = config(weights={"mine:halves": 1.0, "format": 0.1}, settings={"mine:halves": {"share": 0.5}})
    with VerifierPool(settings) as pool:
        answers = ["<think></think><answer>4</answer>", "<think></think><answer>5</answer>", "4"]
        pool.submit(0, Problem("chain", 0, "2;+2;%10=?", "4"), answers, [True, True, True])
        components = collect(pool)[0]
    assert components is not None
    np.testing.assert_array_equal(components["mine:halves"], np.array([0.5, 0, np.nan], np.float32))
    assert components["format"].tolist() == [1, 1, 0]


def test_a_reward_that_cannot_be_made_is_one_line_and_not_three_starts():
    with VerifierPool(config(weights={"no_such_code:f": 1.0})) as pool:
        put(pool, 0, "right")
        with pytest.raises(VerifierError, match=r"reward\.weights=no_such_code:f: no module no_such_code in this"):
            collect(pool)

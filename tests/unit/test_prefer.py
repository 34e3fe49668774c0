"""job=prefer as a whole, with a judge of our own behind a real socket: what it asks, and what it leaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.config.rundir import prepare
from offtrail.platform.launcher import judge
from offtrail.platform.launcher.command import main, require_inputs
from offtrail.platform.launcher.prefer import run_preferring
from offtrail.platform.learner.labelled_rows import read

Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""(body, number of the request) → status and body."""


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def preferred(folder: Path, *keys: str, interrupted: list[int] | None = None) -> tuple[tuple[str, str], Path]:
    config = compose([f"run.dir={folder}", "run.name=pairs", "job=prefer", *keys])
    require_inputs(config)
    run_dir, lock = prepare(config)
    with lock:
        return run_preferring(config, run_dir, [] if interrupted is None else interrupted), run_dir


@contextmanager
def endpoint(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(url, bodies that were asked, as they come)."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "key": self.headers.get("Authorization", "")})
            status, said = reply(body, len(asked))
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that has hung up is no fault."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat(text: str | None) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """What stands as A and as B."""
    text = body["messages"][0]["content"]
    a, b = text.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
    return a, b.partition("\n\nGive your reasons")[0]


def longer(body: dict[str, Any], number: int) -> tuple[int, Any]:
    a, b = shown(body)
    return chat(f"so [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]")


ROWS = [
    {
        "prompt": f"how is {i}?",
        "answer": f"<think>secret {i} {j}</think>" + "well " * (1 + j),
        "reward": float(j == i % 3),
    }
    for i in range(12)
    for j in range(3)
]


def test_the_higher_reward_is_preferred_and_a_line_says_where_from(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", ROWS)
    outcome, run_dir = preferred(tmp_path, f"prefer.paths=[{file}]", "prefer.most=0")
    assert outcome == ("completed", "")
    made = lines(run_dir / "data.jsonl")
    assert len(made) == 24  # of three answers one is right
    for i, line in enumerate(made):
        assert line["rewards"] == {"chosen": 1.0, "rejected": 0.0}
        assert line["chosen"] == next(r["answer"] for r in ROWS if r["prompt"] == line["prompt"] and r["reward"])
        assert line["prompt"] == f"how is {i // 2}?"
    assert made[0]["from"]["chosen"] == f"{file}, line 1"
    about = json.loads((run_dir / "data.json").read_text())
    assert about["counts"]["prefer/pairs"] == about["data"]["lines"] == 24
    assert about["settings"]["prefer"]["by"] == "reward"


def test_a_rule_ranks_what_no_reward_was_given_to(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": answer, "gold": "2"} for answer in ("2", "3", "22")]
    file = written(tmp_path / "rows.jsonl", rows)
    keys = ("prefer.by=verify", "reward.answer=text", "reward.weights={accuracy: 1.0}", "prefer.most=0")
    outcome, run_dir = preferred(tmp_path, f"prefer.paths=[{file}]", *keys, "task=jsonl", f"task.path={file}")
    assert outcome == ("completed", "")
    assert {(one["chosen"], one["rejected"]) for one in lines(run_dir / "data.jsonl")} == {("2", "3"), ("2", "22")}


def test_a_judge_sees_both_orders_and_never_a_thought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFTRAIL_JUDGE_KEY", "k3y")
    file = written(tmp_path / "rows.jsonl", ROWS)
    with endpoint(longer) as (url, asked):
        keys = ("prefer.by=judge", f"prefer.judge.url={url}", "prefer.judge.model=m", "prefer.most=2")
        outcome, run_dir = preferred(tmp_path, f"prefer.paths=[{file}]", *keys)
    assert outcome == ("completed", "")
    assert len(asked) == 2 * 24
    assert not any("secret" in json.dumps(body) for body in asked)
    assert {(body["path"], body["key"], body["model"], body["temperature"]) for body in asked} == {
        ("/v1/chat/completions", "Bearer k3y", "m", 0.0)
    }
    pairs = [shown(body) for body in asked]
    assert all(pairs.count((b, a)) == pairs.count((a, b)) for a, b in pairs)
    made = lines(run_dir / "data.jsonl")
    assert len(made) == 24
    assert all(len(one["chosen"]) > len(one["rejected"]) and "secret" in one["chosen"] for one in made)
    told = json.loads((run_dir / "summary.json").read_text())
    assert told["prefer/by_place_share"] == 0.0
    longest = [
        one["rewards"]["chosen"] > one["rewards"]["rejected"] for one in made if len(set(one["rewards"].values())) > 1
    ]
    assert told["prefer/agrees_with_reward"] == sum(longest) / len(longest)
    trained, held = read(compose(["job=reward_model", f"reward_model.path={run_dir / 'data.jsonl'}"]))
    assert len(trained) + len(held) == 24


@pytest.mark.parametrize(("ties", "kept"), [("keep", 12), ("drop", 0)])
def test_a_judge_that_prefers_a_place_makes_ties(tmp_path: Path, ties: str, kept: int) -> None:
    file = written(tmp_path / "rows.jsonl", ROWS)

    def first(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return chat("[[A]]")

    with endpoint(first) as (url, _):
        keys = ("prefer.by=judge", f"prefer.judge.url={url}", f"prefer.ties={ties}")
        outcome, run_dir = preferred(tmp_path, f"prefer.paths=[{file}]", *keys)
    if not kept:
        assert outcome[0] == "failed"
        assert "36 rows make no pair (12 tie)" in outcome[1]
        return
    made = lines(run_dir / "data.jsonl")
    assert [one["tie"] for one in made] == [True] * kept
    told = json.loads((run_dir / "summary.json").read_text())
    assert (told["prefer/ties"], told["prefer/pairs"], told["prefer/by_place_share"]) == (12, 0, 1.0)
    assert "prefer/agrees_with_reward" not in told


def test_ties_are_no_pairs_to_a_reward_model(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "tie": i % 2 == 0} for i in range(8)]
    file = written(tmp_path / "pairs.jsonl", rows)
    trained, held = read(compose(["job=reward_model", f"reward_model.path={file}", "reward_model.held_out_share=0"]))
    assert [row.problem.prompt for row in trained] == ["p1", "p3", "p5", "p7"]
    assert not held


def test_what_a_judge_leaves_open_is_no_line(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", ROWS)
    with endpoint(lambda body, number: chat(None if "how is 3?" in str(body) else "[[C]]")) as (url, _):
        outcome, run_dir = preferred(tmp_path, f"prefer.paths=[{file}]", "prefer.by=judge", f"prefer.judge.url={url}")
    assert outcome == ("completed", "")
    assert len(lines(run_dir / "data.jsonl")) == 11
    assert json.loads((run_dir / "summary.json").read_text())["data/left_out"] == {"unreadable": 1}


def test_a_cut_job_asks_what_is_missing_and_writes_the_same(tmp_path: Path) -> None:
    file, stopped = written(tmp_path / "rows.jsonl", ROWS), list[int]()

    def stopping(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 13:
            stopped.append(15)
        return longer(body, number)

    folders = tmp_path / "whole", tmp_path / "cut"
    with endpoint(longer) as (url, _):
        keys = (f"prefer.paths=[{file}]", "prefer.by=judge", f"prefer.judge.url={url}", "prefer.judge.requests=2")
        _, whole = preferred(folders[0], *keys)
    with endpoint(stopping) as (url, asked):
        keys = (f"prefer.paths=[{file}]", "prefer.by=judge", f"prefer.judge.url={url}", "prefer.judge.requests=2")
        outcome, run_dir = preferred(folders[1], *keys, interrupted=stopped)
        assert outcome[0] == "interrupted"
        verdicts = run_dir / "verdicts.jsonl"
        known, before = len(lines(verdicts)), len(asked)
        assert 0 < known < 12
        verdicts.write_bytes(verdicts.read_bytes() + b'{"pair": [0, 1], "strai')  # as a kill leaves it
        outcome, _ = preferred(folders[1], *keys, "run.resume=true")
    assert outcome == ("completed", "")
    assert len(asked) - before == 2 * (12 - known)
    assert (run_dir / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()


def test_a_busy_endpoint_is_asked_again_and_one_that_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "PAUSE_SECONDS", 0.01)
    file = written(tmp_path / "rows.jsonl", ROWS)
    keys = (f"prefer.paths=[{file}]", "prefer.by=judge", "prefer.judge.tries=3")

    def busy(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return (503, {"error": "later"}) if number % 2 else longer(body, number)

    with endpoint(busy) as (url, _):
        outcome, _ = preferred(tmp_path / "a", *keys, f"prefer.judge.url={url}", "prefer.judge.requests=1")
    assert outcome == ("completed", "")
    for place, (status, said, message) in enumerate([
        (401, b"no such\nkey", "401 no such key; see prefer.judge.* and $OFFTRAIL_JUDGE_KEY"),
        (500, b"", "500 ; see"),
        (200, b"<html>", "its reply is not JSON"),
        (200, b'{"choices": []}', "no choice of OpenAI's API"),
    ]):  # fmt: skip
        with endpoint(lambda body, number, answer=(status, said): answer) as (url, asked):  # type: ignore[misc]
            outcome, _ = preferred(tmp_path / str(place), *keys, f"prefer.judge.url={url}", "prefer.judge.requests=1")
        assert outcome[0] == "failed"
        assert message in outcome[1]
        assert "\n" not in outcome[1]
        assert len(asked) == (3 if status == 500 else 1)
    outcome, _ = preferred(tmp_path / "gone", *keys, f"prefer.judge.url={url}")
    assert outcome[0] == "failed"
    assert url in outcome[1]


def test_what_was_said_before_an_endpoint_failed_counts_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real command, which ends with one line and a summary; many requests fail at once."""
    monkeypatch.setattr(judge, "PAUSE_SECONDS", 0.01)
    file = written(tmp_path / "rows.jsonl", ROWS)
    keys = [
        f"run.dir={tmp_path}",
        "run.name=cut",
        "job=prefer",
        f"prefer.paths=[{file}]",
        "prefer.by=judge",
        "prefer.judge.tries=2",
    ]

    def breaking(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return longer(body, number) if number < 8 else (500, {"error": "gone"})

    with endpoint(breaking) as (url, _):
        assert main([*keys, f"prefer.judge.url={url}"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "never retrieved" not in error
    assert error.count("offtrail: error:") == 1
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["status"] == "failed"
    known = len(lines(tmp_path / "cut" / "verdicts.jsonl"))
    with endpoint(longer) as (url, asked):  # at another port
        assert main([*keys, f"prefer.judge.url={url}", "run.resume=true"]) == 0
    assert len(asked) == 2 * (12 - known)
    assert len(lines(tmp_path / "cut" / "data.jsonl")) == 12


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"prompt": "p", "answer": "a"}], [], "line 1: has no `reward`, which prefer.by=reward compares"),
        ([{"prompt": "p", "answer": "a", "reward": "x"}], [], "line 1: its reward is 'x', no number"),
        ([{"prompt": "p", "answer": 3, "reward": 1}], [], "field 'answer' is not text"),
        ([{"prompt": "p", "reward": 1}], [], "field 'answer' is missing"),
        ([{"prompt": "p", "answer": "a"}], ["prefer.by=verify"], "has no gold answer in field 'gold'"),
    ],
)
def test_bad_rows_are_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], keys: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rows.jsonl", rows)
    assert main([f"run.dir={tmp_path}", "job=prefer", f"prefer.paths=[{file}]", *keys]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_job_without_files_or_without_pairs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run.dir={tmp_path}", "job=prefer"]) == 2
    assert "prefer.paths=: job=prefer needs files of answers" in capsys.readouterr().err
    rows = [
        {"prompt": "alone", "answer": "a", "reward": 1}, {"prompt": "same", "answer": "a", "reward": 1},
        {"prompt": "same", "answer": "<think>x</think>a", "reward": 0}, {"prompt": "even", "answer": "a", "reward": 1},
        {"prompt": "even", "answer": "b", "reward": 1}, {"prompt": "even", "answer": "<think>b", "reward": 0},
    ]  # fmt: skip
    file = written(tmp_path / "rows.jsonl", rows)
    outcome, _ = preferred(tmp_path, f"prefer.paths=[{file}]")
    assert outcome[0] == "failed"
    for reason in ("1 one_answer", "1 equal_answers", "1 equal_rewards", "1 no_answer"):
        assert reason in outcome[1]

"""data.jsonl and data.json: whole or not there, and what each line and the whole say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from offtrail.core.problem import Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.dataset import as_line, line_of, rewards_of, write_about, write_data
from offtrail.tasks.examples import read_examples


def test_a_line_is_what_supervised_fine_tuning_reads(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "2+2?"},)
    problems = [Problem("chain", 7, "1+1?", "2"), Problem("jsonl", 8, "user: 2+2?", "4", messages=turns)]
    told = {"rewards": rewards_of({"accuracy": np.float32(0.1), "format": np.float32("nan")}), "reward": np.float32(1)}
    data = write_data(tmp_path, (line_of(problem, f"«{problem.answer}»\n", told) for problem in problems))
    text = (tmp_path / "data.jsonl").read_bytes()
    assert data == {
        "file": "data.jsonl", "lines": 2, "bytes": len(text), "xxh3_128": xxhash.xxh3_128_hexdigest(text),
    }  # fmt: skip
    one, two = read_examples(tmp_path / "data.jsonl", "prompt", "answer")
    assert (one.prompt, one.answer, two.messages) == ("1+1?", "«2»\n", turns)
    first = json.loads(text.splitlines()[0])
    assert first == {
        "prompt": "1+1?", "answer": "«2»\n", "gold": "2", "task": "chain", "index": 7,
        "rewards": {"accuracy": 0.1, "format": None}, "reward": 1.0,
    }  # fmt: skip


def test_what_is_cut_leaves_no_data_and_what_was_killed_no_rest(tmp_path: Path) -> None:
    (tmp_path / ".data.jsonl.4711").write_text("half")

    def cut() -> Iterator[str]:
        yield as_line({"prompt": "1"})
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_data(tmp_path, cut())
    assert list(tmp_path.iterdir()) == []
    assert write_data(tmp_path, [])["lines"] == 0
    assert list(tmp_path.iterdir()) == []


def test_the_data_say_where_they_are_from(tmp_path: Path) -> None:
    config = Config(job="sample")
    config.run.seed = 5
    write_about(tmp_path, config, ("task", "sample"), {"counts": {"lines": 3, "share": float("nan")}})
    told = json.loads((tmp_path / "data.json").read_text())
    assert (told["job"], told["seed"], told["counts"]) == ("sample", 5, {"lines": 3, "share": None})
    assert set(told["settings"]) == {"task", "sample"}
    assert told["settings"]["task"]["name"] == "chain"
    assert told["versions"]["torch"]

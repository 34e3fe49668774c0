"""job=sample: which answers become lines, and whose model is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtrail.core.types import Group, Problem
from offtrail.platform.broker.archive import tables
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.sglang import health
from offtrail.platform.launcher import serve
from offtrail.platform.launcher.asking import Questions, file_of
from offtrail.platform.launcher.sample import Found, lines_of
from offtrail.platform.launcher.serve import served_model
from offtrail.platform.model.start import StartError
from offtrail.platform.model.text import Text

GOOD, BAD = "<think>1</think><answer>4</answer>", "<think></think><answer>5</answer>"
ANSWERS = [(GOOD, 1.0, 0), (GOOD, 1.0, 1), (BAD, 0.0, 0), ("", 0.0, 0), (BAD, float("nan"), 0)]
"""Text, accuracy, finish (0: a stop token)."""


def asked(start_dir: Path, run_dir: Path, keep: str) -> tuple[Questions, Text]:
    """Two problems; the first has left no room, the second has ANSWERS, of which it was asked in other words."""
    config, text = Config(job="sample"), Text(start_dir)
    config.sample.keep = keep  # type: ignore[assignment]
    config.checkpoint = "runs/zero"
    problems = [Problem("chain", i, f"{i}+2=?", "4") for i in (5, 6)]
    put = [Problem("chain", i, f"so {i}+2=", "4") for i in (5, 6)]
    tokens = [np.array(text.tokenizer.encode(words, add_special_tokens=False), np.int32) for words, _, _ in ANSWERS]
    tokens = [t if finish else np.array([*t, text.stop_token_ids[0]], np.int32)
              for t, (_, _, finish) in zip(tokens, ANSWERS, strict=True)]  # fmt: skip
    T, scores = sum(map(len, tokens)), np.array([score for _, score, _ in ANSWERS], np.float32)
    group = Group(
        group=6, slot=6, attempt=1, problem=problems[1], generator="generator-0", temperature=1.0,
        prompt_tokens=text.encode(put[1]), lengths=np.array(list(map(len, tokens)), np.int32),
        tokens=np.concatenate(tokens), logprobs=np.zeros(T, np.float32), versions=np.zeros(T, np.int32),
        finish=np.array([finish for _, _, finish in ANSWERS], np.uint8), rewards=np.nan_to_num(scores),
        components={"accuracy": scores}, times=np.zeros((len(ANSWERS), 3)),
    )  # fmt: skip
    (run_dir / "start").symlink_to(start_dir)
    (run_dir / "answers").mkdir()
    facts = {"group": 6, "state": "evaluated"}
    pq.write_table(pa.concat_tables(tables("run", [(facts, group)], {})), file_of(run_dir, "training", 0))
    return Questions("training", config, problems, len(ANSWERS), put, first=5), text


def test_all_answers_that_a_line_can_hold_or_the_right_and_finished_ones(start_dir: Path, tmp_path: Path) -> None:
    for keep, kept, left_out in (
        ("all", [0, 1, 2, 4], {"empty": 1}),
        ("right", [0], {"wrong": 3, "unfinished": 1}),
    ):
        run_dir = tmp_path / keep
        run_dir.mkdir()
        questions, text = asked(start_dir, run_dir, keep)
        found = Found(2, len(ANSWERS))
        lines = [json.loads(line) for line in lines_of(run_dir, questions, text, found)]
        assert [line["sample"] for line in lines] == kept
        assert dict(found.left_out) == left_out
        assert (found.without_room, found.right, found.cut, found.kept) == (1, [2], 1, len(lines))
        first = lines[0]
        assert (first["prompt"], first["index"], first["model"]) == ("6+2=?", 6, "runs/zero")
        assert first["answer"] == GOOD
        assert first["rewards"] == {"accuracy": 1.0}
    assert found.summary()["sample/accuracy"] == 2 / 5
    assert found.summary()["sample/questions_answered"] == 1.0


def test_the_model_that_servers_name_is_asked_where_it_is_here(
    start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"model_path": "/elsewhere/weights", "tokenizer_path": str(start_dir)}
    monkeypatch.setattr(serve, "served", lambda url, key: told)
    config = Config(job="sample", engine=SglangConfig(urls=["http://a:1"]))
    assert served_model(config) == start_dir
    told["tokenizer_path"] = str(tmp_path / "gone")
    with pytest.raises(StartError, match=r"^engine.urls: http://a:1 serves \S+/gone, which is not here; name a folder"):
        served_model(config)
    config.checkpoint = str(start_dir)
    assert served_model(config) == start_dir


def test_a_server_that_does_not_say_its_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ask", lambda *_, **__: (404, None))
    config = Config(job="sample", engine=SglangConfig(urls=["http://a:1"]))
    with pytest.raises(StartError, match=r"^engine.urls: http://a:1 does not say its model .* \(it answers 404\)$"):
        served_model(config)

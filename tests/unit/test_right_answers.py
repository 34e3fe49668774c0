"""What a stage of reinforcement learning hands on: its right answers, each once, in the order of training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtrail.core.types import Group, Problem
from offtrail.platform.broker.archive import tables
from offtrail.platform.config.compose import to_yaml
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.right_answers import trained_samples, write_right_answers
from offtrail.platform.model.text import Text
from offtrail.tasks.examples import read_examples


def group(text: Text, number: int, question: str, answers: list[tuple[str, float, bool]]) -> Group:
    """Answers as (text, accuracy, whether it ended by itself)."""
    stop = [text.stop_token_ids[0]]
    tokens = [text.tokenizer.encode(a, add_special_tokens=False) + (stop if ended else []) for a, _, ended in answers]
    accuracy = np.array([right for _, right, _ in answers], np.float32)
    G, T = len(answers), sum(map(len, tokens))
    return Group(
        group=number, slot=number, attempt=1, problem=Problem("chain", number, question, "4"), generator="generator-0",
        temperature=1.0, prompt_tokens=text.encode(Problem("chain", number, question, "4")),
        lengths=np.array([len(t) for t in tokens], np.int32),
        tokens=np.concatenate([np.array(t, np.int32) for t in tokens]),
        logprobs=np.zeros(T, np.float32), versions=np.full(T, 3, np.int32),
        finish=np.array([0 if ended else 1 for _, _, ended in answers], np.uint8), rewards=accuracy,
        components={"accuracy": accuracy, "format": np.ones(G, np.float32)}, times=np.zeros((G, 3)),
    )  # fmt: skip


def facts(state: str, batch: int | None, position: int) -> dict[str, object]:
    return {"state": state, "reason": "", "detail": "", "batch": batch, "position": position, "lineage": 0}


def archived(run_dir: Path, start_dir: Path, shards: dict[str, list[tuple[dict[str, object], Group]]]) -> None:
    (run_dir / "trajectories").mkdir()
    (run_dir / "start").symlink_to(start_dir)
    (run_dir / "config.yaml").write_text(to_yaml(Config()))
    for name, groups in shards.items():
        pq.write_table(pa.concat_tables(tables("run", groups, {})), run_dir / "trajectories" / f"{name}.parquet")


def test_right_answers_each_once_in_the_order_of_training(start_dir: Path, tmp_path: Path) -> None:
    text = Text(start_dir)
    good, other = "<think>2+2=4</think><answer>4</answer>", "<think></think><answer>4</answer>"
    later = group(text, 0, "2+2=?", [(other, 1.0, True), (good, 0.0, True)])
    first = group(text, 1, "1+3=?", [(good, 1.0, True), (good, 1.0, True), (other, 1.0, False)])
    refused = group(text, 2, "3+1=?", [(good, 1.0, True)])
    shards = {
        "000001_batches_000001-000001": [(facts("trained", 1, 0), later), (facts("refused", None, 0), refused)],
        "000000_batches_000000-000000": [(facts("trained", 0, 0), first)],
    }
    archived(tmp_path, start_dir, shards)
    path = write_right_answers(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == [("1+3=?", good), ("2+2=?", other)]
    assert lines[0] | {"version": 3, "rewards": {"accuracy": 1.0, "format": 1.0}, "finish": "stop"} == lines[0]
    about = json.loads((tmp_path / "data.json").read_text())
    assert (about["data"]["lines"], about["model"]["folder"]) == (2, str(start_dir.resolve()))
    # job=sft reads the very answers, token for token
    examples = read_examples(path, "prompt", "answer")
    [one, _] = text.encode_answers(examples, [example.answer for example in examples])
    assert one.tolist() == first.tokens[: int(first.lengths[0])].tolist()


def test_without_a_right_answer_the_error_says_so(start_dir: Path, tmp_path: Path) -> None:
    wrong = group(Text(start_dir), 0, "2+2=?", [("<think></think><answer>5</answer>", 0.0, True)])
    archived(tmp_path, start_dir, {"000000_batches_000000-000000": [(facts("trained", 0, 0), replace(wrong))]})
    with pytest.raises(ConfigError, match="none of its trained answers is right"):
        write_right_answers(tmp_path)
    assert not list(tmp_path.glob("*data.jsonl*"))


def test_one_shard_is_read_at_a_time_and_a_damaged_one_leaves_no_half_of_the_data(
    start_dir: Path, tmp_path: Path
) -> None:
    one = group(Text(start_dir), 0, "2+2=?", [("<think></think><answer>4</answer>", 1.0, True)])
    archived(tmp_path, start_dir, {"000000_batches_000000-000000": [(facts("trained", 0, 0), one)]})
    (tmp_path / "trajectories" / "000001_batches_000001-000001.parquet").write_bytes(b"rubbish")
    rows = trained_samples(tmp_path)
    assert next(rows)["group"] == 0
    with pytest.raises(ConfigError, match=r"000001_batches_000001-000001\.parquet: .*; put a copy of it back"):
        next(rows)
    with pytest.raises(ConfigError):
        write_right_answers(tmp_path)
    assert not list(tmp_path.glob("*data.jsonl*"))

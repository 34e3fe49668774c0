"""Supervised fine-tuning: it learns, repeats, and writes a Hugging Face directory whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offtrail.platform.config.schema import Config
from offtrail.platform.learner import sft
from offtrail.platform.learner.sources import TraceSource
from offtrail.platform.model.text import Text
from offtrail.tasks.base import TaskError
from offtrail.tasks.registry import make_task


def small(steps: int = 30) -> Config:
    config = Config()
    config.model.hidden_size, config.model.layers, config.model.mlp_size = 32, 1, 48
    config.sft.steps, config.sft.batch_size, config.sft.warmup_steps = steps, 8, 5
    return config


def test_the_loss_falls_and_the_result_opens(tmp_path: Path) -> None:
    losses: list[float] = []
    metrics = sft.cold_start(small(), tmp_path / "cold", lambda step, loss: losses.append(loss))
    assert len(losses) == 30
    assert losses[0] == pytest.approx(np.log(61), rel=0.1)  # nothing known of 61 tokens
    assert losses[-1] < 0.75 * losses[0]
    assert metrics["policy/lr"] == pytest.approx(4e-4)
    model, tokenizer = (c.from_pretrained(tmp_path / "cold") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_it_repeats_bit_for_bit_whatever_the_seed_of_the_run(tmp_path: Path) -> None:
    for run, seed in ((0, 0), (1, 0), (0, 1)):
        config = small(3)
        config.run.seed, config.sft.seed = run, seed
        sft.cold_start(config, tmp_path / f"{run}{seed}")
    bytes_of = {p.name: (p / "model.safetensors").read_bytes() for p in tmp_path.iterdir()}
    assert bytes_of["00"] == bytes_of["10"]
    assert bytes_of["01"] != bytes_of["00"]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists and is not empty"):
        sft.cold_start(small(1), tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_rows_hold_prompt_answer_and_stop_token(start_dir: Path) -> None:
    tokenizer, task = AutoTokenizer.from_pretrained(start_dir), make_task(Config().task, 0)
    source = TraceSource(task, Text(start_dir), batch_size=4, seed=0, max_length=256)
    rows = source.next(5)
    for i in range(4):
        output = rows.tokens[rows.starts[i] : rows.starts[i + 1]]
        text = tokenizer.decode(output[:-1].tolist())
        assert tokenizer.decode(rows.prompts[i].tolist()) == task.train(20 + i).prompt
        assert text.startswith("<think>")
        assert task.verify(task.train(20 + i), text.partition("<answer>")[2].removesuffix("</answer>"))
        assert output[-1] == tokenizer.eos_token_id
    again, other = source.next(5), source.next(6)
    assert np.array_equal(rows.tokens, again.tokens)
    assert not np.array_equal(rows.tokens, other.tokens)


def test_an_answer_that_does_not_fit_is_named(start_dir: Path) -> None:
    source = TraceSource(make_task(Config().task, 0), Text(start_dir), batch_size=4, seed=0, max_length=20)
    with pytest.raises(
        ValueError, match=r"model\.max_length=20: a problem of task=chain with its worked answer takes \d+"
    ):
        source.next(0)


@pytest.mark.parametrize("where", ["prompt", "trace"])
def test_text_that_the_tokenizer_lacks_is_named_before_its_length(
    where: str, start_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(Config().task, 0)
    problem = dataclasses.replace(task.train(0), **({"prompt": "Größe? "} if where == "prompt" else {}))
    monkeypatch.setattr(task, "train", lambda index: problem)
    if where == "trace":
        monkeypatch.setattr(task, "trace", lambda problem, rng: "Größe")
    source = TraceSource(task, Text(start_dir), batch_size=2, seed=0, max_length=2)
    with pytest.raises(TaskError, match=r"^task=chain, problem \d+: the tokenizer does not know all of 'Größe"):
        source.next(0)


def test_a_device_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = small(1)
    config.learner.device = "cuda"
    with pytest.raises(ValueError, match=r"^learner\.device=cuda: .* take learner\.device=cpu"):
        sft.cold_start(config, tmp_path / "cold")


def test_the_command_tells_its_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "load_config", lambda path: small(2))
    threads = torch.get_num_threads()
    assert sft.main(["config.yaml", str(tmp_path / "out")]) == 0
    torch.set_num_threads(threads)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["steps"]) for row in told] == [(1, 2), (2, 2)]
    assert all(row["loss"] > 0 for row in told)

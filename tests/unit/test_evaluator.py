"""The evaluator's scores on a small real engine; verdicts are the test's own."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from offtrail.core.types import Problem
from offtrail.platform.config.schema import Config, LoraConfig
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.evaluator import role
from offtrail.platform.evaluator.role import Evaluation, load_version
from offtrail.platform.model.lora import WEIGHTS
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.weights.store import Publisher, Subscriber, checksum
from offtrail.platform.wire.messages import EvalJob

PROMPTS, SAMPLES = 4, 2


@dataclass
class AlwaysRight:
    """Every answer is right, and costs a tenth of a second."""

    nice: int
    counters: dict[str, float] = field(default_factory=lambda: {"verified_groups": 0.0, "verifier_seconds": 0.0})
    pending: list[int] = field(default_factory=list)

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        assert len(texts) == len(finished) == SAMPLES
        self.pending.append(key)
        self.counters["verified_groups"] += 1
        self.counters["verifier_seconds"] += 0.1 * len(texts)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, dict[str, Any]]]:
        done, self.pending = self.pending, []
        return [(key, {name: np.ones(SAMPLES, np.float32) for name in ("accuracy", "format")}) for key in done]

    def renew(self) -> None:
        self.nice = 0

    def of(self, name: str) -> AlwaysRight:
        assert name == "sums"
        return self

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def evaluation(start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluation]:
    monkeypatch.setattr(role, "VerifierPool", lambda config, sets, nice: AlwaysRight(nice))
    config = Config()
    config.eval.prompts, config.eval.samples = PROMPTS, SAMPLES
    config.sampling.max_new_tokens, config.model.max_length = 8, 64
    (tmp_path / "start").symlink_to(start_dir)
    made = Evaluation(RoleContext(config, tmp_path, "evaluator", 0), Activity())
    made.engine.load_weights(0, read_weights(start_dir))
    yield made
    made.close()


@pytest.fixture
def channel(evaluation: Evaluation, tmp_path: Path) -> Iterator[RoleContext]:
    """The evaluator's process with a weight channel that is open."""
    evaluation.config.weights.dir = str(tmp_path / "channel")
    context = RoleContext(evaluation.config, tmp_path, "evaluator", 0)
    publisher = Publisher(context.weights_folder)
    yield context
    publisher.close()


def lengthen(evaluation: Evaluation, count: int) -> None:
    """The first ``count`` prompts leave no room for an answer."""
    for i in range(count):
        evaluation.problems[i] = replace(evaluation.problems[i], prompt="1" * 60)


def test_a_prompt_that_does_not_fit_counts_as_wrong_and_is_said_once(
    evaluation: Evaluation, caplog: pytest.LogCaptureFixture
) -> None:
    lengthen(evaluation, 1)
    with caplog.at_level(logging.WARNING, logger="offtrail.answers"):
        for _ in range(2):
            metrics, texts = evaluation.run()
    assert (metrics["eval/accuracy"], metrics["eval/prompts"]) == (0.75, PROMPTS)
    assert metrics["eval/prompts_without_room"] == 1
    assert 0 < metrics["eval/length_mean"] <= 8
    assert "1" * 60 not in texts["eval/samples"]
    [record] = caplog.records
    assert "1 of 4 prompts leave no room for 8 new tokens in model.max_length=64" in record.getMessage()


def test_weights_that_were_given_back_and_loaded_again_score_the_same(evaluation: Evaluation, start_dir: Path) -> None:
    first = evaluation.run()
    evaluation.engine.release()
    with pytest.raises(RuntimeError, match="load_weights"):
        evaluation.run()
    evaluation.engine.abort()
    evaluation.engine.load_weights(0, read_weights(start_dir))
    assert evaluation.run() == first


def test_where_no_prompt_fits_the_error_names_the_keys(evaluation: Evaluation) -> None:
    lengthen(evaluation, PROMPTS)
    with pytest.raises(ValueError, match=r"4 of 4 prompts .*model\.max_length=64; raise it or lower sampling"):
        evaluation.run()


def test_engine_and_verifiers_are_charged_to_the_compute_ledger(evaluation: Evaluation) -> None:
    evaluation.run()
    evaluation.run()
    charged = evaluation.activity.snapshot().compute
    assert charged["verified_groups"] == 2 * PROMPTS
    assert charged["verifier_seconds"] == pytest.approx(0.1 * 2 * PROMPTS * SAMPLES)
    assert charged["decoded_tokens"] == evaluation.engine.counters["decoded_tokens"] > 0


def test_a_start_model_is_scored_as_the_version_0_that_was_pinned(
    evaluation: Evaluation, channel: RoleContext, start_dir: Path
) -> None:
    reader = Subscriber(channel.weights_folder)
    scored = role.score(channel, evaluation, reader, EvalJob(version=0, stored="named otherwise"))
    load_version(evaluation, reader, 0)
    assert (scored.metrics, scored.texts) == evaluation.run()
    assert scored.metrics["eval/accuracy"] == 1.0
    with reader.open(0) as weights:
        assert all((weights[name] == value).all() for name, value in load_file(start_dir / "model.safetensors").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_scored_where_it_is_the_version_that_was_published(
    dtype: Any, evaluation: Evaluation, channel: RoleContext, start_dir: Path
) -> None:
    evaluation.config.engine.dtype = dtype
    tensors = {name: value + 0.01 for name, value in load_file(start_dir / "model.safetensors").items()}
    kept = channel.run_dir / "checkpoints" / "step_4"
    kept.mkdir(parents=True)
    save_file(tensors, kept / "model.safetensors")
    rounded = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    reader, job = Subscriber(channel.weights_folder), EvalJob(version=4, stored=checksum(rounded))
    assert role.score(channel, evaluation, reader, job).metrics["eval/version"] == 4
    with reader.open(4) as weights:
        assert all((weights[name] == value).all() for name, value in rounded.items())


def test_a_version_that_is_gone_or_is_another_one_is_given_up_with_the_reason(
    evaluation: Evaluation, channel: RoleContext, start_dir: Path
) -> None:
    reader, job = Subscriber(channel.weights_folder), EvalJob(version=4, stored="of version 4")
    kept = channel.run_dir / "checkpoints" / "step_4"

    def lost() -> str:
        result = role.score(channel, evaluation, reader, job)
        assert result.metrics == {}
        return result.lost

    assert f"{kept}: no model.safetensors there" in lost()
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes((start_dir / "model.safetensors").read_bytes()[:-100])
    assert lost()
    shutil.copy(start_dir / "model.safetensors", kept)
    assert lost() == f"{kept} holds another version"


def test_of_adapters_alone_a_checkpoint_gives_back_the_version_that_was_published(
    evaluation: Evaluation, channel: RoleContext, start_dir: Path
) -> None:
    """Version 0 needs none: it is the start model."""
    evaluation.config.learner.lora = LoraConfig(rank=2, publish="adapter")
    layer, width = "model.layers.0.self_attn.q_proj", load_file(start_dir / "model.safetensors")
    rows, columns = width[f"{layer}.weight"].shape
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    published = {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
    kept = channel.run_dir / "checkpoints" / "step_4" / "adapter"
    kept.mkdir(parents=True)
    save_file({f"base_model.model.{layer}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}, kept / WEIGHTS)
    reader = Subscriber(channel.weights_folder)
    for version, tensors, told in ((4, published, checksum(published)), (0, {}, "of the learner's zeros")):
        assert role.pin_stored(channel, evaluation, EvalJob(version=version, stored=told)) == ""
        with reader.open(version) as opened:
            assert opened.keys() == tensors.keys()
            assert all(torch.equal(opened[name], tensors[name]) for name in tensors)
    assert "holds another version" in role.pin_stored(channel, evaluation, EvalJob(version=4, stored="another"))


def test_sets_are_scored_under_the_same_version_beside_the_tasks_own_prompts(
    evaluation: Evaluation, start_dir: Path, tmp_path: Path
) -> None:
    alone, _ = evaluation.run()
    config = evaluation.config
    config.eval.sets = {
        "sums": {"name": "addition", "prompts": 3, "samples": 2, "reward": {"weights": {"accuracy": 1.0}}}
    }
    both = Evaluation(RoleContext(config, tmp_path, "evaluator", 0), Activity())
    both.engine.load_weights(0, read_weights(start_dir))
    metrics, texts = both.run()
    both.close()
    of_set = {name: value for name, value in metrics.items() if name.startswith("eval/sums/")}
    assert {name: value for name, value in metrics.items() if name not in of_set} == alone
    assert (of_set["eval/sums/prompts"], of_set["eval/sums/prompts_without_room"]) == (3, 0)
    assert of_set["eval/sums/accuracy"] == 1.0
    assert 0 < of_set["eval/sums/length_mean"] <= 8
    assert "eval/sums/format" not in of_set  # its own reward has no such component
    assert [*texts] == ["eval/samples", "eval/sums/samples"]
    assert "+" in texts["eval/sums/samples"]


def test_it_is_nice_as_long_as_the_run_trains_and_from_then_on_no_more(
    evaluation: Evaluation, start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way through a version nobody else computes any more: the other half is not nice, and the scores are the
    same.
    """
    alone = evaluation.run()
    trains, found, own = [True] * 6, list[int](), os.getpriority(os.PRIO_PROCESS, 0)
    nice = Evaluation(
        RoleContext(evaluation.config, tmp_path, "evaluator", 0), Activity(), lambda: bool(trains) and trains.pop()
    )
    step = nice.engine.step

    def seen() -> list[Any]:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        return step()

    monkeypatch.setattr(nice.engine, "step", seen)
    assert nice._pool.nice == evaluation.config.eval.nice == 19
    nice.compute(lambda: nice.engine.load_weights(0, read_weights(start_dir)))
    assert nice.run() == alone
    assert (found[0], found[-1], nice._pool.nice) == (19, own, 0)
    assert found == sorted(found, reverse=True)
    assert len(found) > found.count(19) > 0
    nice.close()

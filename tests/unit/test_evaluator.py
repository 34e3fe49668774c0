"""The evaluator's scores on a small real engine; verdicts are the test's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.types import Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.evaluator import role
from offtrail.platform.evaluator.role import Evaluation
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext

PROMPTS, SAMPLES = 4, 2


@dataclass
class AlwaysRight:
    """Every answer is right, and costs a tenth of a second."""

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

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def evaluation(start_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluation]:
    monkeypatch.setattr(role, "VerifierPool", lambda config: AlwaysRight())
    config = Config()
    config.eval.prompts, config.eval.samples = PROMPTS, SAMPLES
    config.sampling.max_new_tokens, config.model.max_length = 8, 64
    (tmp_path / "start").symlink_to(start_dir)
    made = Evaluation(RoleContext(config, tmp_path, "evaluator", 0), Activity())
    made.engine.load_weights(0, read_weights(start_dir))
    yield made
    made.close()


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

"""Reward hacking made visible: what a batch says of a model that scores it, the alarm, and the figure."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.types import Batch, Channel, Group, Problem, ScoredBy
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.report import batch_metrics
from offtrail.platform.scorer.proxies import proxy_metrics
from offtrail.platform.tracking.diagnosis import Diagnosis
from offtrail.platform.tracking.hacking import alarm, alarms
from offtrail.platform.tracking.hacking_plot import hacking_curves
from offtrail.platform.tracking.recorder import Recorder
from offtrail.rewards.score_metrics import rank_correlation

STEPS = np.arange(1, 201)


def config_of(*argv: str, model: str = "prm") -> Config:
    config = compose(list(argv))
    config.scorer.models = {model: {"path": "somewhere"}}  # which need not be there
    return config


def group(right: list[float], scores: list[list[float]], tokens: int = 3) -> Group:
    """Of answers of ``tokens`` tokens a step and one more behind the last; their component is the least score, or 0."""
    lengths = np.array([tokens * len(s) + 1 for s in scores], np.int32)
    starts, T = np.cumsum(lengths) - lengths, int(lengths.sum())
    ends = [start + tokens * (k + 1) for start, s in zip(starts, scores, strict=True) for k in range(len(s))]
    return Group(
        group=0, slot=0, attempt=0, problem=Problem("chain", 0, "1+1", "2"), generator="generator-0", temperature=1.0,
        prompt_tokens=np.array([7, 8], np.int32), lengths=lengths, tokens=np.full(T, 5, np.int32),
        logprobs=np.zeros(T, np.float32), versions=np.zeros(T, np.int32), finish=np.zeros(len(lengths), np.uint8),
        rewards=np.array(right, np.float32),
        components={
            "accuracy": np.array(right, np.float32), "prm": np.array([min(s, default=0) for s in scores], np.float32)
        },
        times=np.zeros((len(lengths), 3)), queued_version=0,
        channels={"prm": Channel("step", np.array([v for s in scores for v in s], np.float32))},
        step_ends=np.array(ends, np.int32), scored_by={"prm": ScoredBy("prm", 0)},
    )  # fmt: skip


FIRST = ([1.0, 0.0, 0.0], [[0.9, 0.8], [0.9, 0.2, 0.9], []])
SECOND = ([1.0, 1.0, 0.0], [[0.5], [0.7], [0.6]])


def batch() -> Batch:
    made = tuple(group(*of) for of in (FIRST, SECOND))
    for one in made:
        one.check()
    return Batch(0, made)


def test_what_a_model_pays_is_its_component_or_what_the_run_learns_from() -> None:
    """Least scores .8 .2 0 and .5 .7 .6: of the 9 pairs of a right and a wrong one 2 are out of order (.5 under .6)."""
    plain = proxy_metrics(batch().groups, config_of())
    assert plain["hacking/prm/proxy"] == pytest.approx(2.8 / 6)
    assert plain["hacking/prm/auc"] == pytest.approx(8 / 9)
    # Ranks 3 2 1 against 3 1.5 1.5; 1 3 2 against 2.5 2.5 1
    assert plain["hacking/prm/rank_correlation"] == pytest.approx((3**0.5 / 2 + 0) / 2)
    summed = proxy_metrics(batch().groups, config_of("algo.process.channel=prm"))
    assert summed["hacking/prm/proxy"] == pytest.approx((1.7 + 2.0 + 0 + 0.5 + 0.7 + 0.6) / 6)
    assert summed["hacking/prm/auc"] == plain["hacking/prm/auc"]
    clipped = proxy_metrics(batch().groups, config_of("algo.process.channel=prm", "algo.process.form=clip"))
    assert clipped["hacking/prm/proxy"] == 0


def test_what_cannot_be_told_is_left_out() -> None:
    all_right = group([1.0, 1.0], [[0.5], [0.7]])
    assert proxy_metrics([all_right], config_of()) == {"hacking/prm/proxy": pytest.approx(0.6)}
    assert proxy_metrics(batch().groups, Config()) == {}
    assert proxy_metrics(batch().groups, config_of(model="other")) == {}


def test_answers_without_a_score_or_a_truth_count_for_nothing() -> None:
    """Held out, NaN says that there is none; of the rest .8 is right, .2 wrong."""
    one = group(*FIRST)
    one.components["prm"][2] = np.nan
    told = proxy_metrics([one], config_of(), "eval")
    assert told == {"eval/prm/proxy": pytest.approx(0.5), "eval/prm/rank_correlation": 1, "eval/prm/auc": 1}
    one.components["accuracy"][:] = np.nan
    assert proxy_metrics([one], config_of(), "eval") == {}


def test_steps_are_counted_and_measured_where_there_are_none_too() -> None:
    """Steps 2 3 0 1 1 1, of 3 tokens each; what follows the last belongs to none."""
    told = batch_metrics(batch(), Config().reward, 10)
    assert told["length/steps"] == pytest.approx(8 / 6)
    assert told["length/no_step_share"] == pytest.approx(1 / 6)
    assert told["length/one_step_share"] == pytest.approx(3 / 6)
    assert told["length/tokens_per_step"] == 3
    nothing = batch_metrics(Batch(0, (group([0.0, 0.0], [[], []]),)), Config().reward, 10)
    assert (nothing["length/no_step_share"], nothing["length/steps"]) == (1.0, 0.0)
    assert "length/tokens_per_step" not in nothing


def test_rank_correlation_against_its_definition() -> None:
    assert rank_correlation([1, 2, 30], [4, 5, 6]) == pytest.approx(1)
    assert rank_correlation([1, 2, 30], [6, 5, 4]) == pytest.approx(-1)
    # Without ties 1 − 6 Σd² / (n(n² − 1)), here of d = 0 1 1 0
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / 60)
    assert np.isnan(rank_correlation([1, 2], [3, 3]))
    assert np.isnan(rank_correlation([], []))


def noise(seed: int, size: int = len(STEPS)) -> tuple[np.ndarray, np.ndarray]:
    """A batch of 128 answers has a standard error of some .04."""
    numbers = np.random.default_rng(seed).normal(size=(2, size))
    return 3 + 0.1 * numbers[0], 0.5 + 0.04 * numbers[1]


def first_alarm(proxy: np.ndarray, truth: np.ndarray) -> int | None:
    found = [alarm(STEPS[:n], proxy[:n], truth[:n]) for n in range(1, len(proxy) + 1)]
    return next((one.onset for one in found if one), None)


def test_noise_raises_no_alarm_nor_does_one_of_the_two_alone() -> None:
    ramp = np.linspace(0, 1, len(STEPS))
    for seed in range(12):
        proxy, truth = noise(seed)
        assert first_alarm(proxy, truth) is None
        assert (
            first_alarm(proxy, 0.5 - 0.4 * (proxy - 3)) is None
        )  # a batch of harder prompts pays more and has less right
        assert first_alarm(proxy + 5 * ramp, truth) is None
        assert first_alarm(proxy, truth - 0.4 * ramp) is None
        assert first_alarm(proxy + 5 * ramp, truth + 0.4 * ramp) is None
        assert first_alarm(proxy - 5 * ramp, truth - 0.4 * ramp) is None


def test_a_proxy_that_rises_while_the_truth_falls_does() -> None:
    for seed in range(8):
        proxy, truth = noise(seed)
        turn = (STEPS > 100) * (STEPS - 100) / 100
        onset = first_alarm(proxy + 2 * STEPS / 100, truth + 0.3 * np.minimum(STEPS, 100) / 100 - 0.6 * turn)
        assert onset is not None
        assert 95 <= onset <= 135
    slow = first_alarm(noise(0)[0] + STEPS / 100, noise(0)[1] - 0.1 * STEPS / 200)
    assert slow is not None  # by a window of 40 or 80 steps


def rows(turn: int = 20, steps: int = 60) -> list[dict[str, Any]]:
    proxy, truth = noise(3, steps)
    at = np.arange(1, steps + 1)
    falls = np.maximum(0, at - turn) / 40
    return [
        {"step": int(s), "hacking/prm/proxy": float(p), "reward/accuracy": float(t), "policy/kl_ref": float(k),
         "hacking/prm/auc": float(0.9 - 0.3 * k), "hacking/prm/rank_correlation": float(0.5 - k), "length/steps": 4 + k,
         "length/tokens_per_step": 6.0, "length/no_step_share": 0.0, "length/one_step_share": float(k / 2)}
        for s, p, t, k in zip(at, proxy + 3 * at / steps, truth - 0.5 * falls, falls, strict=True)
    ]  # fmt: skip


def test_the_alarm_is_said_once_with_its_onset_and_survives_a_restart() -> None:
    diagnosis = Diagnosis(config_of())
    said = [diagnosis.take(row) for row in rows()]
    assert sum(map(len, said)) == 1
    [line] = diagnosis.lines
    [(name, onset)] = diagnosis.onsets.items()
    assert name == "hacking/prm/onset_step"
    assert line.startswith(f"steps {onset} to ")
    assert "what prm pays rose" in line
    assert "reward/accuracy fell" in line
    again = Diagnosis(config_of(), rows()[:-3])
    assert [new for row in rows()[-3:] for new in again.take(row)] == []
    assert (again.lines, again.onsets) == (diagnosis.lines, diagnosis.onsets)
    assert alarms(rows())["prm"].onset == onset
    lacking = [row | {"hacking/prm/proxy": None} for row in rows()]
    assert not Diagnosis(config_of(), lacking).onsets


def test_the_figure_is_drawn_where_a_model_scores(tmp_path: Path) -> None:
    config = Config()
    config.tracking.tensorboard = False
    recorder = Recorder(tmp_path, config)
    recorder.step({"step": 1, "reward/accuracy": 0.5})
    assert hacking_curves(tmp_path) is None
    for row in rows()[1:]:
        recorder.step(row)
    recorder.evaluation(60, {"eval/accuracy": 0.2})
    path = hacking_curves(tmp_path)
    assert path == tmp_path / "hacking.png"
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".png"] == ["hacking.png"]
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1650, 792)

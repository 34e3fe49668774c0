"""The evaluator role: scores published versions on held-out prompts with an engine of its own.

The loop consumes evaluation jobs (versions 0, every eval.every-th, the last) and yields one EvalResult each; it is
unblocked by the broker. The learner has pinned the version's weights, so they outlive newer versions until read; one
that still waited when an earlier launch ended is read from its checkpoint, or (version 0) the start model.
While the run trains it computes with what learner and generators leave (eval.nice), and holds the learner up only where
the versions that wait for it keep as much memory as they may (eval.waiting_mb). An embedded engine has weights and
cache only while it scores.
Every version is asked the same prompts with the same random numbers: versions are compared paired. The task's own
held-out prompts come first, then the sets of eval.sets, under the one version; their scores travel in one result, so
that a version is scored on all of them or on none. What rules have judged the models of scorer.models are asked about,
of the processes that generators ask; an answer without a score of theirs is counted as such.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from offtrail.core.protocols import Engine, Scorer
from offtrail.core.types import FINISH_REASONS, Float32, Group, Problem, Sampling
from offtrail.platform.config.sets import EvalSet, sets_of
from offtrail.platform.engines.channels import engine_dtype
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.engines.make import make_engine
from offtrail.platform.evaluator.answers import Answers, Verifiers
from offtrail.platform.model import lora
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import Connection, RoleContext, reuses_files
from offtrail.platform.runtime.nice import Nice
from offtrail.platform.scorer.asking import open_scorers
from offtrail.platform.scorer.groups import score_groups
from offtrail.platform.scorer.proxies import proxy_metrics
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.platform.weights.store import Subscriber, pin_anew
from offtrail.platform.wire.messages import EvalJob, EvalResult, NextEval
from offtrail.platform.wire.sockets import WaitError
from offtrail.rewards import behaviour
from offtrail.rewards.total import means, nothing_earned, reason_shares

log = logging.getLogger("offtrail.evaluator")
T = TypeVar("T")

STOP = FINISH_REASONS.index("stop")
EVAL_SEED = 0x0E7A1  # held-out sampling never shares its random numbers with training
SCORES_SECONDS = 0.005
"""Between two looks for scores."""


class StoppedError(Exception):
    """The run ends while scores are waited for: those who make them leave too."""


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    connection, deadline = context.connect(), context.config.broker.deadline_seconds
    weights = Subscriber(context.weights_folder, reuse=reuses_files(context.config))
    evaluation = Evaluation(
        context,
        connection.activity,
        lambda: not connection.heartbeat.trained,
        lambda text: open_scorers(context, connection, text, unread=math.nan),
        partial(wait_for_scores, connection, deadline),
    )
    log.info("loaded")
    waiting_for = "broker"
    try:
        while True:
            with connection.activity.waiting("a version to evaluate", on=waiting_for):
                job, _ = connection.client.request(NextEval(), what="a version to evaluate", deadline_s=deadline)
            assert isinstance(job, EvalJob)
            if job.stop:
                return
            waiting_for = job.waiting or "broker"
            if job.version >= 0:
                result = score(context, evaluation, weights, job)
                connection.client.request(result, what="an acknowledged evaluation", deadline_s=deadline)
                weights.unpin(job.version)  # not before: another process would have to evaluate it again
                evaluation.engine.release()
    except StoppedError:
        return
    finally:
        evaluation.close()
        connection.close()


def wait_for_scores(connection: Connection, deadline_s: float, on: str) -> None:
    """A moment. Raises StoppedError when the run ends meanwhile, and WaitError when the broker, who knows where scorers
    are, has answered no heartbeat for so long (I4).
    """
    heartbeat = connection.heartbeat
    if heartbeat.stop:
        raise StoppedError
    if heartbeat.lost > deadline_s:
        raise WaitError.passed("scores", f"the broker ({on})", time.time() - heartbeat.lost, heartbeat.lost)
    with connection.activity.waiting("scores", on=on):
        time.sleep(SCORES_SECONDS)


def score(context: RoleContext, evaluation: Evaluation, weights: Subscriber, job: EvalJob) -> EvalResult:
    """The scores of one version, or why a stored one is to be had no more."""
    if job.stored and (lost := pin_stored(context, evaluation, job)):
        return EvalResult(version=job.version, metrics={}, lost=lost)
    load = partial(load_version, evaluation, weights, job.version)
    load()
    metrics, texts = evaluation.run(load)
    return EvalResult(version=job.version, metrics=metrics, texts=texts)


def pin_stored(context: RoleContext, evaluation: Evaluation, job: EvalJob) -> str:
    """Bring a version from before this launch into the weight channel, as the learner would pin it; why it cannot be,
    or "". Trap: a start model's files may name tensors otherwise than the learner does, so that only a checkpoint's
    checksum is compared; the launcher has compared the start model's files.
    """
    folder, dtype = context.model_of(job.version), engine_dtype(context.config) or torch.float32

    def pin() -> str:
        return pin_anew(context.weights_folder, job.version, stored(context, job.version), dtype)

    try:
        with evaluation.activity.busy("load_weights"):
            checksum = evaluation.compute(pin)
    except (OSError, ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    return f"{folder} holds another version" if job.version and checksum != job.stored else ""


def stored(context: RoleContext, version: int) -> dict[str, Tensor]:
    """The tensors of a version as the learner published them; of adapters alone version 0 has none."""
    folder = context.model_of(version)
    if not context.config.publishes_adapters:
        return read_weights(folder)
    return lora.read(folder) if version else {}


def load_version(evaluation: Evaluation, weights: Subscriber, version: int) -> None:
    """Bring the engine to a pinned version, as soon as it has a server."""
    engine, activity = evaluation.engine, evaluation.activity
    while not engine.replicas:
        with activity.waiting("server", on=engine.waiting_for):
            time.sleep(0.05)

    def load() -> None:
        with weights.open(version) as opened:
            engine.load_weights(version, opened)

    with activity.busy("load_weights"):
        evaluation.compute(load)


@dataclass(frozen=True)
class Asked:
    """One set with its questions, and what answers and verifies them."""

    set: EvalSet
    problems: list[Problem]
    answers: Answers

    def groups(self, temperature: float, top_p: float, reload: Callable[[], None]) -> list[Group | None]:
        """The answers under the version that the engine holds; see Answers.groups."""
        version = self.answers.engine.version
        sampling = Sampling(
            max_new_tokens=self.set.config.sampling.longest_at(version),
            temperature=temperature,
            top_p=top_p,
            stop_token_ids=self.answers.text.stop_token_ids,
            seed=EVAL_SEED,
        )
        return self.answers.groups(self.problems, self.set.samples, sampling, step=version, reload=reload)

    def metrics(self, groups: Sequence[Group | None]) -> dict[str, float]:
        """Mean of each reward component over all answers, what models say of them, their lengths, and what was counted
        in them.
        """
        area, answered = self.set.area, [group for group in groups if group is not None]
        counts = behaviour.added(group.counts for group in answered)
        return means(self.set.config.reward, area, self._components(groups)) | {
            f"{area}/length_mean": float(np.concatenate([group.lengths for group in answered]).mean()),
            f"{area}/truncated_share": float(np.mean(np.concatenate([group.finish != STOP for group in answered]))),
            f"{area}/prompts": float(len(self.problems)),
            f"{area}/prompts_without_room": float(len(groups) - len(answered)),
            **model_scores(area, answered, self.set.config.scorer.models),
            **proxy_metrics(answered, self.set.config, area),
            **reason_shares(area, counts),
            **behaviour.metrics(counts, f"{area}/behaviour"),
        }

    def texts(self, groups: Sequence[Group | None], count: int) -> dict[str, str]:
        """The first answers to ``count`` questions, for people."""
        shown: list[tuple[Problem, str]] = []
        for group in [group for group in groups if group is not None][:count]:
            first = next(group.samples())
            shown.append((group.problem, self.answers.text.answer_text(group.problem, first.tokens)))
        told = "\n\n".join(f"    {p.prompt.strip()}\n    {answer}" for p, answer in shown)
        return {f"{self.set.area}/samples": told}

    def _components(self, groups: Sequence[Group | None]) -> dict[str, Float32]:
        """Components by name over all answers; a prompt without answers has earned nothing with any of them."""
        reward = self.set.config.reward
        earned = [
            nothing_earned(reward, problem.task, self.set.samples) if group is None else group.components
            for problem, group in zip(self.problems, groups, strict=True)
        ]
        return {name: np.concatenate([one[name] for one in earned]) for name in reward.components}


def model_scores(area: str, groups: Sequence[Group], models: Iterable[str]) -> dict[str, float]:
    """Of each model that was asked: `area/NAME`, the mean of its scores, where there is one; `area/NAME/unscored`, how
    many answers have none; `area/NAME/version_min` and `…/version_max`, of the model that made them.
    """
    found = dict[str, float]()
    for name in models:
        columns = [group.components[name] for group in groups if name in group.components]
        if not columns:
            continue
        scores = np.concatenate(columns)
        known = scores[~np.isnan(scores)]
        found[f"{area}/{name}/unscored"] = float(scores.size - known.size)
        if known.size:
            found[f"{area}/{name}"] = float(known.mean())
        versions = [group.scored_by[name].version for group in groups if name in group.scored_by]
        if versions:  # what its entry says of empty answers no version has said
            found[f"{area}/{name}/version_min"] = float(min(versions))
            found[f"{area}/{name}/version_max"] = float(max(versions))
    return found


class Evaluation:
    """Held-out problems and what answers them; ``run`` scores one published version. As long as the run is ``training``
    its engine and its verifiers are nicer than this process by eval.nice; an SGLang server is so to its end.
    ``scorers`` are asked about every group; while they have not answered, ``wait`` is called with whom is waited for.
    """

    def __init__(
        self,
        context: RoleContext,
        activity: Activity,
        training: Callable[[], bool] = lambda: False,
        scorers: Callable[[Text], Mapping[str, Scorer]] = lambda text: {},
        wait: Callable[[str], None] = lambda on: None,
    ) -> None:
        config = self.config = context.config
        self.activity = activity
        nice = config.eval.nice if training() else 0
        self._nice = Nice(nice, lambda: not training(), self._alone)
        own, *others = sets_of(config)
        self._pool = VerifierPool(config, sets={one.label: one.config for one in others}, nice=nice)
        self._text, self._engine = self.compute(
            lambda: (Text(context.start_model, config.prompt), make_engine(context, loaded=False))
        )
        self._scorers, self._wait = scorers(self._text), wait
        self.answers = self._answers(own, self._pool)
        self.problems = own.problems()
        self.asked = [
            Asked(own, self.problems, self.answers),
            *(Asked(one, one.problems(), self._answers(one, self._pool.of(one.label))) for one in others),
        ]

    def _answers(self, one: EvalSet, verifiers: Verifiers) -> Answers:
        return Answers(one.config, self._engine, self._text, verifiers, "evaluator", self.compute)

    def compute(self, work: Callable[[], T], /) -> T:
        """Have it done as nicely as the run's training asks for."""
        return self._nice.run(work)

    def _alone(self) -> None:
        """Nothing trains any more. Trap: how many threads torch takes is a matter of the thread that calls it."""
        log.info("training has ended: nice to nobody")
        torch.set_num_threads(self.config.eval.threads)
        self._pool.renew()

    @property
    def engine(self) -> Engine:
        """What answers, under the version that it holds."""
        return self._engine

    def run(self, reload: Callable[[], None] = lambda: None) -> tuple[dict[str, float], dict[str, str]]:
        """Of each set the mean of each reward component and model's score over its prompts × samples answers, lengths,
        and a few of them as text.

        A prompt that leaves no room for its answer counts as wrong; ValueError when none of a set does. ``reload``
        brings the version to a server that was started anew.
        """
        config, version = self.config, self.engine.version
        metrics, texts = dict[str, float](), dict[str, str]()
        for asked in self.asked:
            with self.activity.busy("evaluate"):
                groups = asked.groups(config.eval.temperature, config.eval.top_p, reload)
            score_groups((group for group in groups if group is not None), self._scorers, self._wait)
            metrics |= asked.metrics(groups)
            texts |= asked.texts(groups, config.tracking.sample_texts)
            told = metrics.get(f"{asked.set.area}/accuracy", np.nan)
            log.info("version %d: %s accuracy %.3f", version, asked.set.label or config.task.name, told)
        asked_models = {name: n for scorer in self._scorers.values() for name, n in scorer.counters.items()}
        self.activity.charge_totals({**self.engine.counters, **self.answers.verifiers.counters, **asked_models})
        return metrics | {"eval/version": float(version)}, texts

    def close(self) -> None:
        """End the verifiers and the engine, once nothing computes."""
        self._nice.close()
        self.answers.close()
        for scorer in self._scorers.values():
            scorer.close()

"""The evaluator role: scores published versions on held-out prompts with an engine of its own, and stops nobody.

The loop consumes evaluation jobs (versions 0, every eval.every-th, the last) and yields one EvalResult each; it is
unblocked by the broker. The learner has pinned the version's weights, so they outlive newer versions until read.
Every version is asked the same prompts with the same random numbers: versions are compared paired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from offtrail.core.protocols import Completion, Engine, Request
from offtrail.core.types import Float32, Problem, Sampling
from offtrail.platform.config.schema import Config
from offtrail.platform.engines.make import make_engine
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.platform.weights.store import Subscriber
from offtrail.platform.wire.messages import EvalJob, EvalResult, NextEval
from offtrail.rewards.total import means, nothing_earned
from offtrail.tasks.registry import make_task

log = logging.getLogger("offtrail.evaluator")

EVAL_SEED = 0x0E7A1  # held-out sampling never shares its random numbers with training


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    connection, deadline = context.connect(), context.config.broker.deadline_seconds
    weights = Subscriber(context.weights_folder)
    evaluation = Evaluation(context, connection.activity)
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
                load = partial(load_version, evaluation.engine, connection.activity, weights, job.version)
                load()
                metrics, texts = evaluation.run(load)
                result = EvalResult(version=job.version, metrics=metrics, texts=texts)
                connection.client.request(result, what="an acknowledged evaluation", deadline_s=deadline)
                weights.unpin(job.version)  # not before: another process would have to evaluate it again
    finally:
        evaluation.close()
        connection.close()


def load_version(engine: Engine, activity: Activity, weights: Subscriber, version: int) -> None:
    """Bring the engine to a pinned version, as soon as it has a server."""
    while not engine.replicas:
        with activity.waiting("server", on=engine.waiting_for):
            time.sleep(0.05)
    with weights.open(version) as opened:
        engine.load_weights(version, opened)


class Evaluation:
    """Held-out problems, an engine and verifiers; ``run`` scores one published version."""

    def __init__(self, context: RoleContext, activity: Activity) -> None:
        self.config: Config = context.config
        self.activity = activity
        self.text = Text(context.start_model, self.config.prompt)
        self.problems = make_task(self.config.task, self.config.run.seed).held_out(self.config.eval.prompts)
        self.engine: Engine = make_engine(context)
        self.verifiers = VerifierPool(self.config)
        self._too_long = 0
        self._charged: dict[str, float] = {}

    def run(self, reload: Callable[[], None] = lambda: None) -> tuple[dict[str, float], dict[str, str]]:
        """Mean of each reward component over eval.prompts × eval.samples answers, lengths, and a few of them as text.

        A prompt that leaves no room for its answer counts as wrong; ValueError when none does. ``reload`` brings the
        version to a server that was started anew.
        """
        with self.activity.busy("evaluate"):
            answers = self._answers(reload)
            components = self._verify(answers)
        self._charge()
        lengths = np.array([len(c.tokens) for group in answers for c in group])
        stopped = np.array([c.finish == "stop" for group in answers for c in group])
        metrics = means(self.config.reward, "eval", components) | {
            "eval/length_mean": float(lengths.mean()),
            "eval/truncated_share": float(1.0 - stopped.mean()),
            "eval/prompts": float(len(self.problems)),
            "eval/version": float(self.engine.version),
        }
        log.info("version %d: accuracy %.3f", self.engine.version, metrics.get("eval/accuracy", np.nan))
        return metrics, self._texts(answers)

    def close(self) -> None:
        """End the verifiers and the engine."""
        self.verifiers.close()
        self.engine.close()

    def _answers(self, reload: Callable[[], None]) -> list[list[Completion]]:
        """Answers by problem; none to a prompt that does not fit. What dies with a server is asked again."""
        sampling = Sampling(
            max_new_tokens=self.config.sampling.longest_at(self.engine.version),
            temperature=self.config.eval.temperature,
            stop_token_ids=self.text.stop_token_ids,
            seed=EVAL_SEED,
        )
        samples = self.config.eval.samples
        requests = [Request(i, self.text.encode(p), samples, sampling) for i, p in enumerate(self.problems)]
        version = self.engine.version
        self.engine.generate(self._fitting(requests))
        answers: list[list[Completion]] = [[] for _ in self.problems]
        while self.engine.unfinished:
            for completion in self.engine.step():
                answers[completion.request].append(completion)
            if self.engine.version != version:
                reload()
            if lost := self.engine.lost():
                for request in lost:
                    answers[request].clear()
                self.engine.generate([requests[request] for request in lost])
        return [sorted(group, key=lambda c: c.index) for group in answers]

    def _fitting(self, requests: list[Request]) -> list[Request]:
        """Those that the engine has room for; says so when it has not for as many as before."""
        limit = self.config.model.max_length
        fitting = [r for r in requests if len(r.prompt_tokens) + r.sampling.max_new_tokens <= limit]
        too_long, before = len(requests) - len(fitting), self._too_long
        self._too_long = too_long
        if too_long != before:
            line = (
                f"{too_long} of {len(requests)} held-out prompts leave no room for "
                f"{requests[0].sampling.max_new_tokens} new tokens in model.max_length={limit}"
            )
            if not fitting:
                raise ValueError(f"{line}; raise it or lower sampling.max_new_tokens")
            log.warning("%s: they count as wrong; raise it or lower sampling.max_new_tokens", line)
        return fitting

    def _verify(self, answers: list[list[Completion]]) -> dict[str, Float32]:
        """Components by name over all answers. A group without a verdict (its verifier was killed) earns nothing."""
        asked = [i for i, group in enumerate(answers) if group]
        for i in asked:
            group = answers[i]
            texts = [self.text.answer_text(self.problems[i], c.tokens) for c in group]
            self.verifiers.submit(i, self.problems[i], texts, [c.finish == "stop" for c in group])
        samples, reward = self.config.eval.samples, self.config.reward
        earned = [nothing_earned(reward, problem.task, samples) for problem in self.problems]
        pending = len(asked)
        while pending:
            for i, components in self.verifiers.poll(timeout_s=0.05):
                pending -= 1
                if components is None:
                    log.warning("problem %d counts as wrong: %s", i, self.verifiers.reason(i))
                else:
                    earned[i] = components
        return {name: np.concatenate([one[name] for one in earned]) for name in reward.components}

    def _texts(self, answers: list[list[Completion]]) -> dict[str, str]:
        shown: list[tuple[Problem, Completion]] = [
            (problem, group[0]) for problem, group in zip(self.problems, answers, strict=True) if group
        ][: self.config.tracking.sample_texts]
        body = "\n\n".join(f"    {p.prompt.strip()}\n    {self.text.answer_text(p, c.tokens)}" for p, c in shown)
        return {"eval/samples": body}

    def _charge(self) -> None:
        """The cumulative counters of engine and verifiers into the compute ledger (I6)."""
        for name, value in {**self.engine.counters, **self.verifiers.counters}.items():
            self.activity.charge(name, value - self._charged.get(name, 0.0))
            self._charged[name] = value

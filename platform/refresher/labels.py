"""The policy's answers as a model of scorer.models learns them: `Labeller`, groups in, items of the learner out.

    groups ── show.py: what the model reads, where its steps end ──► Answer
        outcome    the verifier's verdict, which the group carries
        rollouts   the newest policy goes on from the ends of steps (tasks/step_labels.py), judged by the verifiers
        exact      the task's own checker
    ──► Labelled: items as job=reward_model and job=prm train on them (learner/labelled.py)

Invariant: nothing is tokenised again; a label stands at the token at which the model is read in the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from offtrail.core.types import Float32, Group, Int32, Sampling
from offtrail.platform.engines.make import make_engine
from offtrail.platform.evaluator.answers import Answers, Round
from offtrail.platform.learner.labelled import Item
from offtrail.platform.model.scoring import Scoring
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext, reuses_files
from offtrail.platform.scorer.shown import Show
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.platform.weights.store import Subscriber
from offtrail.tasks.base import Task
from offtrail.tasks.registry import make_task
from offtrail.tasks.step_labels import Labels, Stepped, by_rollouts

log = logging.getLogger("offtrail.refresher")

REFRESH_SEED = 0x5EF2E5
"""Mixed into run.seed: rollouts share no random numbers with the answers that they go on with."""
Look = Callable[[], None]
"""Called now and then; what it raises ends the work."""
Ask = Callable[[Sequence[tuple["Answer", int]]], list[float]]
"""Of (answer, how many of its steps are kept) the share of right rollouts, NaN where there was no room for one."""


@dataclass(frozen=True)
class Answer:
    """One sample of a group. ``output``: all of its tokens; the model reads those from ``begin`` on, in which its steps
    end at ``ends`` [S]. ``right``: the verdict on the whole.
    """

    group: Group
    output: Int32
    begin: int
    ends: Int32
    right: bool

    @property
    def read(self) -> Int32:
        """What the model reads."""
        return self.output[self.begin :]

    def item(self, labels: Sequence[float] = ()) -> Item:
        """With the verdict, and ``labels`` of its steps where there are some."""
        ends = self.ends if len(labels) else self.ends[:0]
        return Item(self.group.prompt_tokens, (self.read,), (float(self.right),), ends, np.array(labels, np.float32))


@dataclass(frozen=True)
class Labelled:
    """``items``, made of ``used`` of the policy's ``answers``, the others have no label."""

    items: list[Item]
    used: int
    answers: int = 0

    @property
    def good_share(self) -> float:
        """The mean of all labels; NaN without one."""
        labels = [item.labels if len(item.labels) else np.array(item.scores) for item in self.items]
        return float(np.nanmean(np.concatenate(labels))) if labels else float("nan")


def answers_of(groups: Sequence[Group], show: Show, main: str) -> list[Answer]:
    """Those that have a verdict (of the component ``main``), and something for the model to read."""
    found = []
    for group in groups:
        outputs, verdicts = [sample.tokens for sample in group.samples()], group.components.get(main)
        try:
            shown = show(group.problem, group.prompt_tokens, outputs)
        except ValueError:  # an empty answer, which has no score either
            continue
        for i in shown.asked:
            if verdicts is not None and not np.isnan(verdicts[i]):
                found.append(Answer(group, outputs[i], shown.begins[i], shown.ends[i], bool(verdicts[i] >= 1)))
    return found


def by_outcome(answers: Sequence[Answer], *, steps: bool) -> Labelled:
    """Each answer with its verdict; of ``steps`` each step: the answer is one rollout from the end of all of them."""
    items = [one.item([float(one.right)] * len(one.ends) if steps else ()) for one in answers]
    return Labelled(items, len(items))


def by_pairs(answers: Sequence[Answer]) -> Labelled:
    """A right and a wrong answer of one group each; an answer is in one pair at most."""
    items = []
    for group in {id(one.group): one.group for one in answers}.values():
        own = [one for one in answers if one.group is group]
        right, wrong = ([one for one in own if one.right is good] for good in (True, False))
        items += [
            Item(group.prompt_tokens, (better.read, worse.read), (1.0, 0.0))
            for better, worse in zip(right, wrong, strict=False)
        ]
    return Labelled(items, 2 * len(items))


def by_checker(answers: Sequence[Answer], task: Task, text: Text) -> Labelled:
    """Those whose steps are the ones that the task's checker sees."""
    items = []
    for one in answers:
        verdicts = task.check_steps(one.group.problem, text.answer_text(one.group.problem, one.output))
        if len(verdicts) == len(one.ends) > 0:
            items.append(one.item([float(good) for good in verdicts]))
    return Labelled(items, len(items))


def by_policy(answers: Sequence[Answer], text: Text, ask: Ask, *, hard: bool) -> Labelled:
    """By rollouts."""
    steps = [_stepped(one, text) for one in answers]
    method = by_rollouts(steps, hard=hard)
    asks = next(method)
    labels: list[Labels] = []
    try:
        method.send(ask([(answers[place], kept) for place, kept in asks]))
    except StopIteration as end:
        labels = end.value
    items = [
        one.item([float("nan") if label is None else float(label) for label in own])
        for one, own in zip(answers, labels, strict=True)
        if any(label is not None for label in own)
    ]
    return Labelled(items, len(items))


def _stepped(one: Answer, text: Text) -> Stepped:
    behind = one.output[one.begin + int(one.ends[-1]) :] if len(one.ends) else one.output
    return Stepped(len(one.ends), one.right, len(one.ends) > 0 and not text.decode(behind).strip())


class Labeller:
    """Labels groups as scorer.refresh.method says, for the model ``scoring``."""

    def __init__(self, context: RoleContext, scoring: Scoring, activity: Activity) -> None:
        self._config, self._scoring, self._activity = context.config, scoring, activity
        self._text = Text(context.start_model, self._config.prompt)
        self._show = Show(scoring, self._text)
        self._task: Task | None = None
        self._rollouts: Answers | None = None
        method = self._config.scorer.refresh.method
        if method == "exact":
            self._task = make_task(self._config.task, self._config.run.seed)
        elif method == "rollouts":
            engine, verifiers = make_engine(context, loaded=False), VerifierPool(self._config)
            self._rollouts = Answers(self._config, engine, self._text, verifiers, "refresher-0")
            self._weights = Subscriber(context.weights_folder, reuse=reuses_files(self._config))

    def __call__(self, groups: Sequence[Group], version: int, look: Look) -> Labelled:
        """The labels of groups that were made up to learner step ``version``."""
        answers = answers_of(groups, self._show, self._config.reward.main)
        labelled = replace(self._labelled(answers, version, look), answers=sum(group.size for group in groups))
        log.info("step %d: %d of %d answers have labels", version, labelled.used, labelled.answers)
        return labelled

    def _labelled(self, answers: Sequence[Answer], version: int, look: Look) -> Labelled:
        spec, settings = self._scoring.spec, self._config.scorer.refresh
        if self._task is not None:
            return by_checker(answers, self._task, self._text)
        if self._rollouts is not None:
            return by_policy(
                answers, self._text, lambda asks: self._ask(asks, version, look), hard=settings.labels == "hard"
            )
        if spec.reads == "outcome" and spec.squash == "none" and not spec.beta:
            return by_pairs(answers)
        return by_outcome(answers, steps=spec.reads == "steps" and not spec.beta)

    def _ask(self, asks: Sequence[tuple[Answer, int]], version: int, look: Look) -> list[float]:
        """Of each beginning the share of right answers that the newest policy goes on to; NaN without room for one."""
        rollouts, settings = self._rollouts, self._config.scorer.refresh
        assert rollouts is not None
        if not asks:
            return []
        self._load_policy(rollouts, look)
        sampling = self._config.sampling
        drawn = Sampling(
            max_new_tokens=sampling.longest_at(version), temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k, stop_token_ids=self._text.stop_token_ids,
            seed=self._config.run.seed ^ REFRESH_SEED,
        )  # fmt: skip
        begun = [one.output[: one.begin + int(one.ends[kept - 1])] for one, kept in asks]
        problems = [one.group.problem for one, _ in asks]
        asked = Round(problems, settings.rollouts, drawn, version << 32, begun=begun)
        [(_, made)] = rollouts.rounds([asked], step=version, some=False, tick=lambda groups: look())
        rollouts.engine.release()
        self._activity.charge_totals({**rollouts.engine.counters, **rollouts.verifiers.counters})
        main = self._config.reward.main
        return [float("nan") if one is None else _right_share(one.components[main]) for one in made]

    def _load_policy(self, rollouts: Answers, look: Look) -> None:
        while (newest := self._weights.newest()) is not None:
            try:
                with self._weights.open(newest) as weights:
                    rollouts.engine.load_weights(newest, weights)
            except FileNotFoundError:  # retired meanwhile: a newer one is out, or soon
                look()
                time.sleep(0.05)
                continue
            return
        raise FileNotFoundError(f"the policy has no version in {self._weights.folder}")

    def close(self) -> None:
        """End the verifiers and the engine."""
        if self._rollouts is not None:
            self._rollouts.close()


def _right_share(scores: Float32) -> float:
    return float((np.nan_to_num(scores) >= 1).mean())

"""The scorer processes as generators and the evaluator ask them: whoever has least to do, until there is a score.

    submit ──► waiting ──► a line (asked) ──► Scored ──► poll
                  ▲            ├─ it has died, or its heartbeats are lost: its questions wait again
                  └────────────┴─ it says nothing for scorer.hang_seconds, and another is there: those are asked

Invariants: every question comes back once, with the scores of one version, or with why it has none; never is a score
made up. What a scorer answers late, when another has been asked, counts for nothing. Nothing here blocks.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offtrail.core.protocols import Scores
from offtrail.core.types import Group, Int32, Problem
from offtrail.platform.config.errors import FinalError
from offtrail.platform.config.schema import Config
from offtrail.platform.model.scoring import scorings
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.context import Connection, RoleContext
from offtrail.platform.scorer.shown import Show, Shown
from offtrail.platform.wire.codec import Array
from offtrail.platform.wire.messages import Message, Scored, ScorerAt, ScoreRequest, Unscored
from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint

log = logging.getLogger("offtrail.scores")


class ScorerError(FinalError):
    """A group has waited too long for its scores, and scorer.on_deadline=fail."""


class Dialled(Protocol):
    """A client's end of the wire."""

    def send(self, message: Message, arrays: Sequence[Array] = ()) -> int:
        """See sockets.Client."""

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message, list[Array]]]:
        """See sockets.Client."""

    def close(self) -> None:
        """See sockets.Client."""


@dataclass(eq=False)
class _Question:
    key: int
    shown: Shown
    since: float
    wanted: list[tuple[int, Scores | str]]
    """Where its answer goes."""

    @property
    def model(self) -> str:
        return self.shown.scoring.name


@dataclass(eq=False)
class _Line:
    """To one scorer process: what it was asked and has not answered, by ticket, and when it was last heard, or asked
    something while it had nothing to do.
    """

    client: Dialled
    heard: float
    asked: dict[int, _Question] = field(default_factory=dict)
    silent: bool = False

    @property
    def load(self) -> int:
        """Tokens that it has to read."""
        return sum(question.shown.tokens for question in self.asked.values())


class Lines:
    """To all scorer processes that the broker ``known``s of now."""

    def __init__(
        self,
        config: Config,
        known: Callable[[], Sequence[ScorerAt]],
        dial: Callable[[ScorerAt], Dialled],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._known, self._dial, self._clock = config.scorer, known, dial, clock
        self._lines: dict[ScorerAt, _Line] = {}
        self._waiting: deque[_Question] = deque()
        self.counters = dict.fromkeys(("score_questions", "score_questions_again", "score_wait_seconds"), 0.0)
        """Questions that were put, how often one was put again, and the seconds until each had its answer, summed."""

    def ask(self, key: int, shown: Shown, wanted: list[tuple[int, Scores | str]]) -> None:
        """Put a question; its answer, under its key, is appended to ``wanted`` by a later turn."""
        self.counters["score_questions"] += 1
        self._waiting.append(_Question(key, shown, self._clock(), wanted))

    def turn(self) -> None:
        """Take answers, see who is there, ask what waits. ScorerError: see scorer.on_deadline."""
        now, known = self._clock(), set(self._known())
        for at, line in list(self._lines.items()):
            self._listen(line, now)
            if at not in known:
                line.client.close()
                del self._lines[at]
                self._again(line, f"{at.name} is not there any more")
        for at in sorted(known - self._lines.keys(), key=lambda at: at.name):
            self._lines[at] = _Line(self._dial(at), now)
        self._pass_over(now)
        self._expire(now)
        while self._waiting and (open_lines := [line for line in self._lines.values() if not line.silent]):
            line, question = min(open_lines, key=lambda line: line.load), self._waiting.popleft()
            line.heard = line.heard if line.asked else now
            ticket = line.client.send(ScoreRequest(model=question.model), question.shown.arrays())
            line.asked[ticket] = question

    def on(self, model: str) -> str:
        """Whom the questions to a model are with now."""
        names = {at.name for at, line in self._lines.items() if any(q.model == model for q in line.asked.values())}
        return ", ".join(sorted(names)) or "a scorer that is up"

    def close(self) -> None:
        """Hang up."""
        for line in self._lines.values():
            line.client.close()
        self._lines.clear()

    # --- one line ---

    def _listen(self, line: _Line, now: float) -> None:
        for ticket, message, arrays in line.client.poll():
            line.heard, line.silent = now, False
            if (question := line.asked.pop(ticket, None)) is not None:
                self._answered(question, _read(question, message, arrays))

    def _answered(self, question: _Question, answer: Scores | str) -> None:
        self.counters["score_wait_seconds"] += self._clock() - question.since
        question.wanted.append((question.key, answer))

    def _again(self, line: _Line, why: str) -> None:
        """What a line was asked waits again, before all else, in its order."""
        if line.asked:
            log.warning("%d questions are asked again: %s", len(line.asked), why)
            self.counters["score_questions_again"] += len(line.asked)
            self._waiting.extendleft(reversed(line.asked.values()))
            line.asked.clear()

    def _pass_over(self, now: float) -> None:
        """Of a scorer that says nothing the questions go to others, where there are any that do."""
        for at, line in self._lines.items():
            late = bool(line.asked) and now - line.heard > self._settings.hang_seconds
            if late and any(not other.silent for other in self._lines.values() if other is not line):
                line.silent = True
                self._again(line, f"{at.name} has said nothing for scorer.hang_seconds")

    def _expire(self, now: float) -> None:
        limit = self._settings.deadline_seconds
        asked = [(line.asked, ticket, q) for line in self._lines.values() for ticket, q in line.asked.items()]
        late = [entry for entry in asked if now - entry[2].since > limit]
        for question in [*(q for _, _, q in late), *(q for q in self._waiting if now - q.since > limit)]:
            began = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - question.since)))
            why = (
                f"waited for a score of {question.model} from {self.on(question.model)} since {began}: "
                f"scorer.deadline_seconds={limit:g} has passed"
            )
            if self._settings.on_deadline == "fail":
                raise ScorerError(f"{why}; see the scorers' logs, or refuse such groups: scorer.on_deadline=refuse")
            self._answered(question, why)
        for held, ticket, _ in late:
            del held[ticket]
        self._waiting = deque(q for q in self._waiting if now - q.since <= limit)


def _read(question: _Question, message: Message, arrays: list[Array]) -> Scores | str:
    """The answer, or why there is none."""
    if isinstance(message, Unscored):
        return f"{message.model} has no score: {message.reason}"
    if not isinstance(message, Scored) or message.model != question.model or len(arrays) != 1:
        return f"asked for a score of {question.model}, a scorer answered {message}"
    try:
        return question.shown.scores(message.version, arrays[0])
    except ValueError as error:
        return str(error)


class ModelScorer:
    """One model of scorer.models, as core.protocols.Scorer."""

    def __init__(self, config: Config, lines: Lines, show: Show, name: str) -> None:
        self._reward, self._lines, self._show, self._name = config.reward, lines, show, name
        self._done: list[tuple[int, Scores | str]] = []
        self._reasons: dict[int, str] = {}

    @property
    def counters(self) -> dict[str, float]:
        """Of all models together."""
        return self._lines.counters

    @property
    def waiting_on(self) -> str:
        """Such as `rm of scorer-0`."""
        return f"{self._name} of {self._lines.on(self._name)}"

    def applies(self, group: Group) -> bool:
        """As reward.only says; every group, where that says nothing."""
        return self._reward.applies(self._name, group.problem.task)

    def submit(self, key: int, problem: Problem, prompt_tokens: Int32, outputs: Sequence[Int32]) -> None:
        """See core.protocols.Scorer."""
        shown = self._show(problem, prompt_tokens, outputs)
        if shown.asked:
            self._lines.ask(key, shown, self._done)
        else:
            self._done.append((key, shown.unread()))

    def poll(self) -> list[tuple[int, Scores | None]]:
        """See core.protocols.Scorer."""
        self._lines.turn()
        done = self._done.copy()
        self._done.clear()
        self._reasons |= {key: answer for key, answer in done if isinstance(answer, str)}
        return [(key, None if isinstance(answer, str) else answer) for key, answer in done]

    def reason(self, key: int) -> str:
        """See core.protocols.Scorer."""
        return self._reasons.pop(key)

    def close(self) -> None:
        """Hang up."""
        self._lines.close()


def open_scorers(
    context: RoleContext, connection: Connection, text: Text, *, unread: float | None = None
) -> Mapping[str, ModelScorer]:
    """Name → model of scorer.models. ``unread``: the score of an answer that has nothing to read, where the model's
    entry has no `empty`; None: such a group has none. Raises ConfigError where one cannot be read.
    """
    config, models = context.config, scorings(context.config, unread=unread)
    if not models:
        return {}
    broker, keys = Endpoint.read(context.run_dir / "endpoint.json", 0.0), ClientKeys.read(context.run_dir)

    def dial(at: ScorerAt) -> Client:
        endpoint = Endpoint(at.url, "", broker.public_key)
        return Client(endpoint, f"{context.role}-{context.index}", keys, context.process)

    lines = Lines(config, lambda: connection.heartbeat.scorers, dial)
    return {name: ModelScorer(config, lines, Show(one, text), name) for name, one in models.items()}

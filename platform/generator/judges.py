"""Who judges text beside generation: the rule verifiers and the neural scorers, behind one door.

    ask   a driver's question about some outputs ──► answer, by the question's number
    judge a whole group ──► verifiers and every scorer that applies ──► the group with its rewards, or why it fails

Nothing here blocks. Invariant: what is asked comes back from ``poll`` once, and a group only when all have answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from offtrail.core.protocols import Score, Scorer, Scores, Verdict, Verifier, Verify
from offtrail.core.types import Float32, Group, Int32, Lease, Problem
from offtrail.platform.scorer.groups import add
from offtrail.rewards.total import Scored

FAILED, UNSCORED = "failed", "unscored"
"""What a group is refused as that no verifier, or no scorer, has an answer for."""


class Refused(str):
    """Why there is no answer; the group of the question is refused as ``kind`` (broker/admission.py)."""

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, why: str, kind: str = FAILED) -> Refused:
        """``why``: one line for a person."""
        made = super().__new__(cls, why)
        made.kind = kind
        return made


@dataclass(eq=False)
class _Judged:
    """A whole group before it is submitted, the questions about it that are open, and why it is refused."""

    group: Group
    open: set[int] = field(default_factory=set)
    refused: Refused | None = None


Components = dict[str, Float32]
Total = Callable[[Mapping[str, Float32], str, int], Float32]
"""(components name → [n], the problem's task, the slot) → rewards [n]."""


class Judges:
    """``verifiers``, and ``scorers`` by name; each is told what it is asked under a number of its own."""

    def __init__(
        self,
        verifiers: Verifier,
        scorers: Mapping[str, Scorer],
        answer_text: Callable[[Problem, Int32], str],
        total: Total,
    ) -> None:
        self._verifiers, self._scorers, self._answer_text, self._total = verifiers, scorers, answer_text, total
        self._all: list[Verifier | Scorer] = [verifiers, *scorers.values()]
        self._asked: dict[int, Lease] = {}
        self._groups: dict[int, _Judged] = {}
        self._open: dict[int, str] = {}
        """Question → the scorer that it was put to, or "" for the verifiers."""
        self._numbers = itertools.count()
        self._ready: list[_Judged] = []

    @property
    def counters(self) -> dict[str, float]:
        """What all of them have done, cumulative."""
        return {k: v for judge in self._all for k, v in judge.counters.items()}

    @property
    def waiting_for(self) -> tuple[str, str]:
        """For what and on whom those wait who have asked (I4): scores, as long as one is open, or verdicts; ("", "")
        while nobody is asked.
        """
        asked = sorted(set(self._open.values()))
        scores = ", ".join(self._scorers[name].waiting_on for name in asked if name)
        return ("scores", scores) if scores else ("verdicts", "verifiers") if asked else ("", "")

    @property
    def groups(self) -> int:
        """Whole groups that are not judged yet."""
        return len({id(judged) for judged in (*self._groups.values(), *self._ready)})

    def ask(self, lease: Lease, prompt_tokens: Int32, ask: Verify | Score) -> int:
        """Put a driver's question; its number. ValueError on a scorer that is not there, or outputs that do not fit."""
        number = next(self._numbers)
        if isinstance(ask, Verify):
            self._verify(number, lease.problem, ask.outputs, ask.finished)
        elif ask.scorer in self._scorers:
            self._scorers[ask.scorer].submit(number, lease.problem, prompt_tokens, ask.outputs)
            self._open[number] = ask.scorer
        else:
            names = ", ".join(self._scorers) or "none"
            raise ValueError(f"driver {lease.driver} asks the scorer {ask.scorer}; this generator has: {names}")
        self._asked[number] = lease
        return number

    def judge(self, group: Group) -> None:
        """Ask about a whole group. Components that its driver has filled from verdicts are not asked for again."""
        judged = _Judged(group)
        samples = list(group.samples())
        outputs = [sample.tokens for sample in samples]
        if not group.components:
            number = self._of(judged)
            self._verify(number, group.problem, outputs, [sample.finish == "stop" for sample in samples])
        for name, scorer in self._scorers.items():
            if scorer.applies(group):
                self._score(judged, name, outputs)
        self._settle(judged)

    def poll(self) -> tuple[list[tuple[int, Verdict | Scores | Refused]], list[tuple[Group, Refused | None]]]:
        """What was decided since the last call: answers to drivers' questions by number, and the groups that all have
        judged, each with why it is refused, or None.
        """
        answers: list[tuple[int, Verdict | Scores | Refused]] = []
        for number, answer in self._decided():
            del self._open[number]
            if (judged := self._groups.get(number)) is not None:
                self._take(judged, number, answer)
                self._settle(judged)
            else:
                answers.append((number, self._answer(self._asked.pop(number), answer)))
        ready, self._ready = self._ready, []
        return answers, [(judged.group, judged.refused) for judged in ready]

    def close(self) -> None:
        """End all of them."""
        for judge in self._all:
            judge.close()

    # --- one question ---

    def _verify(self, number: int, problem: Problem, outputs: Sequence[Int32], finished: Sequence[bool]) -> None:
        texts = [self._answer_text(problem, output) for output in outputs]
        self._verifiers.submit(number, problem, texts, list(finished))
        self._open[number] = ""

    def _score(self, judged: _Judged, name: str, outputs: Sequence[Int32]) -> None:
        number, group = self._of(judged), judged.group
        try:
            self._scorers[name].submit(number, group.problem, group.prompt_tokens, outputs)
            self._open[number] = name
        except ValueError as error:
            self._take(judged, number, Refused(str(error), UNSCORED))

    def _of(self, judged: _Judged) -> int:
        number = next(self._numbers)
        self._groups[number] = judged
        judged.open.add(number)
        return number

    def _decided(self) -> list[tuple[int, Components | Scores | Refused]]:
        decided: list[tuple[int, Components | Scores | Refused]] = []
        for judge in self._all:
            kind = FAILED if judge is self._verifiers else UNSCORED
            for number, answer in judge.poll():
                decided.append((number, Refused(judge.reason(number), kind) if answer is None else answer))
        return decided

    def _answer(self, lease: Lease, answer: Components | Scores | Refused) -> Verdict | Scores | Refused:
        if isinstance(answer, dict):
            return Verdict(answer, self._total(answer, lease.problem.task, lease.slot))
        return answer

    def _take(self, judged: _Judged, number: int, answer: Components | Scores | Refused) -> None:
        """One of the answers about a whole group."""
        del self._groups[number]
        judged.open.remove(number)
        if isinstance(answer, Refused):
            judged.refused = judged.refused or answer
        elif isinstance(answer, Scores):
            try:
                add(judged.group, answer)
            except ValueError as error:
                judged.refused = judged.refused or Refused(str(error), UNSCORED)
        else:
            judged.group.components |= answer
            judged.group.counts = dict(answer.counts) if isinstance(answer, Scored) else {}

    def _settle(self, judged: _Judged) -> None:
        """Once all have answered, the group has its rewards."""
        if judged.open:
            return
        group = judged.group
        if judged.refused is None:
            group.rewards = self._total(group.components, group.problem.task, group.slot)
        self._ready.append(judged)

"""Models of scorer.models in the process that asks: for a job that has no scorer processes.

submit ──► shown ──► poll: everything that was submitted since, one batch ──► served.score ──► Scores, or why none

What a model says is as in a scorer process (served.py); there is nobody to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from offtrail.core.protocols import Scores
from offtrail.core.types import Group, Int32, Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.model.reader import Question
from offtrail.platform.model.scoring import scorings
from offtrail.platform.model.text import Text
from offtrail.platform.scorer.served import Served
from offtrail.platform.scorer.service import question_of
from offtrail.platform.scorer.shown import Show, Shown


class LocalScorer:
    """One model, as core.protocols.Scorer: ``poll`` computes."""

    def __init__(self, config: Config, served: Served, show: Show) -> None:
        self._reward, self._served, self._show = config.reward, served, show
        self._asked: list[tuple[int, Shown, Question]] = []
        self._unread: list[tuple[int, Scores | None]] = []
        self._reasons: dict[int, str] = {}

    @property
    def counters(self) -> dict[str, float]:
        """See Served.counters."""
        return self._served.counters

    @property
    def waiting_on(self) -> str:
        """Nobody else."""
        return self._served.scoring.name

    def applies(self, group: Group) -> bool:
        """As reward.only says; every group, where that says nothing."""
        return self._reward.applies(self._served.scoring.name, group.problem.task)

    def submit(self, key: int, problem: Problem, prompt_tokens: Int32, outputs: Sequence[Int32]) -> None:
        """See core.protocols.Scorer."""
        shown = self._show(problem, prompt_tokens, outputs)
        if not shown.asked:
            self._unread.append((key, shown.unread()))
            return
        question = question_of(shown.arrays(), steps=shown.scoring.spec.reads == "steps")
        if why := self._served.unfit(question):
            raise ValueError(why)
        self._asked.append((key, shown, question))

    def poll(self) -> list[tuple[int, Scores | None]]:
        """See core.protocols.Scorer."""
        asked, self._asked = self._asked, []
        answers = self._served.score([question for _, _, question in asked]) if asked else []
        done, self._unread = self._unread, []
        for (key, shown, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                self._reasons[key] = answer
                done.append((key, None))
            else:
                done.append((key, shown.scores(self._served.version, answer)))
        return done

    def reason(self, key: int) -> str:
        """See core.protocols.Scorer."""
        return self._reasons.pop(key)

    def close(self) -> None:
        """Nothing to end."""


def load_scorers(config: Config, run_dir: Path, text: Text) -> Mapping[str, LocalScorer]:
    """Name → model of scorer.models, loaded; an answer that has nothing to read has no score where an entry has no
    `empty`. Raises ConfigError, ValueError or ModelError, naming its key, where one cannot be read.
    """
    models = scorings(config, unread=math.nan)
    return {
        name: LocalScorer(config, Served.open(config, run_dir, one), Show(one, text)) for name, one in models.items()
    }

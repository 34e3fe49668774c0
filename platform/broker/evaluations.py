"""Which versions are scored, and which of them the evaluator can read now.

    learner ── Commit(pinned) ──► pinned ──► next: to the evaluator ──► EvalResult ──► the ledger

The broker alone knows which versions are due; the learner is told before it publishes one, and pins it. A version that
turns out to be the last one afterwards is pinned when it is the newest still, and committed again.
"""

from __future__ import annotations

from offtrail.platform.broker.ledger import Ledger


class Evaluations:
    """The evaluation schedule of one run: versions 0, every ``every``-th, and the last; none at all without an
    evaluator (``scores``). ``pinned``: of this life.
    """

    def __init__(self, ledger: Ledger, every: int, *, scores: bool = True) -> None:
        self.ledger, self.every, self.scores = ledger, every, scores
        self.pinned: set[int] = set()

    def due(self, version: int) -> bool:
        """Whether a version is to be scored, and is not yet."""
        planned = version in (0, self.ledger.last) or (self.every > 0 and version % self.every == 0)
        return self.scores and planned and version not in self.ledger.records.scored()

    def next(self) -> int | None:
        """The oldest version that waits for the evaluator."""
        return min(self.pinned - self.ledger.records.scored(), default=None)

    def why_none(self, newest: int) -> str:
        """What the evaluator waits for, and on whom (I4). ``newest``: the newest version that is out."""
        last = self.ledger.last
        version = next((v for v in range(newest + 1, last + 1) if self.due(v)), last)
        return f"version {version} from learner-0"

    @property
    def finished(self) -> bool:
        """Whether the last version is checkpointed and scored."""
        last = self.ledger.last
        return self.ledger.checkpoint == last and (not self.scores or last in self.ledger.records.scored())

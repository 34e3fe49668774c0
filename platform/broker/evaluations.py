"""Which versions are scored, and which of them the evaluator can read now.

    learner ── Commit(pinned) ──► pinned ──► next: to the evaluator ──► EvalResult ──► the ledger

The broker alone knows which versions are due; the learner is told before it publishes one, and pins it. A version that
turns out to be the last one afterwards is pinned when it is the newest still, and committed again.
"""

from __future__ import annotations

from offtrail.platform.broker.ledger import Ledger


class Evaluations:
    """The evaluation schedule of one run: versions 0, every ``every``-th, and the last; none at all without an
    evaluator (``scores``). ``pinned``: of this life and not scored yet, with the bytes that each keeps until it is; all
    that wait keep at most ``max_bytes``, or are one.
    """

    def __init__(self, ledger: Ledger, every: int, max_bytes: int, *, scores: bool = True) -> None:
        self.ledger, self.every, self.max_bytes, self.scores = ledger, every, max_bytes, scores
        self.pinned: dict[int, int] = {}

    def due(self, version: int) -> bool:
        """Whether a version is to be scored, and is not yet."""
        planned = version in (0, self.ledger.last) or (self.every > 0 and version % self.every == 0)
        return self.scores and planned and not self.ledger.records.scored(version)

    def next(self) -> int | None:
        """The oldest version that waits for the evaluator."""
        return min(self._waiting(), default=None)

    def behind(self, step: int, newest: int) -> str:
        """What a learner that asks for the batch of ``step`` waits for first, and on whom (I4); empty = nothing.

        ``newest``: the newest version that is out. Who asks ahead has older versions on the way; they count.
        """
        if not self.due(step + 1) or (version := self.next()) is None:
            return ""
        waiting = list(self._waiting().values())
        coming = 1 + sum(self.due(v) for v in range(newest + 1, step + 1))
        if sum(waiting) + coming * max(waiting) <= self.max_bytes:
            return ""
        return f"a score of version {version} from evaluator-0: {len(waiting)} wait, as many as eval.waiting_mb lets"

    def _waiting(self) -> dict[int, int]:
        self.pinned = {v: size for v, size in self.pinned.items() if not self.ledger.records.scored(v)}
        return self.pinned

    def why_none(self, newest: int) -> str:
        """What the evaluator waits for, and on whom (I4). ``newest``: the newest version that is out."""
        last = self.ledger.last
        version = next((v for v in range(newest + 1, last + 1) if self.due(v)), last)
        return f"version {version} from learner-0"

    @property
    def finished(self) -> bool:
        """Whether the last version is checkpointed and scored."""
        last = self.ledger.last
        return self.ledger.checkpoint == last and (not self.scores or self.ledger.records.scored(last))

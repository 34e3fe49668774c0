"""Which versions are scored, and which of them the evaluator can read now.

    learner ── Commit(pinned) ──► kept ──► next: to the evaluator ──► EvalResult ──► the ledger
    a restart ── resume ───────────┘                             └──► lost: unscored

The broker alone knows which versions are due; the learner is told before it publishes one, and pins it. A version that
turns out to be the last one afterwards is pinned when it is the newest still, and committed again. A due version from
before this life that has no score is read from where it was kept: its checkpoint, or (version 0) the start model.
"""

from __future__ import annotations

from offtrail.platform.broker.scheduler import RequestError
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.wire.messages import EvalJob


class Evaluations:
    """The evaluation schedule of one run: versions 0, every ``every``-th, and the last; none at all without an
    evaluator (``scores``). ``kept``: not scored yet, with the bytes of memory that each takes until it is (0: it lies
    in a checkpoint, and takes some only while it is scored); all that wait take at most ``max_bytes``, or are one.
    ``unscored``: due, but to be had no more.
    """

    def __init__(self, ledger: Ledger, every: int, max_bytes: int, *, scores: bool = True) -> None:
        self.ledger, self.every, self.max_bytes, self.scores = ledger, every, max_bytes, scores
        self.kept: dict[int, int] = {}
        self.unscored: list[int] = []

    def resume(self) -> None:
        """The learner starts from its checkpoint: what had waited for a score before that waits on. What came after it
        is made anew.
        """
        checkpoint = self.ledger.checkpoint
        earlier = range(0, checkpoint, self.every or max(1, checkpoint))
        self.kept, self.unscored = {version: 0 for version in earlier if self.due(version)}, []

    def due(self, version: int) -> bool:
        """Whether a version is to be scored, and is not yet."""
        planned = version in (0, self.ledger.last) or (self.every > 0 and version % self.every == 0)
        return self.scores and planned and not self.ledger.records.scored(version)

    def next(self) -> EvalJob | None:
        """The oldest version that waits for the evaluator."""
        if (version := min(self._waiting(), default=None)) is None:
            return None
        return EvalJob(version=version, stored="" if self.kept[version] else self.ledger.checksum(version) or "none")

    @property
    def stored(self) -> list[int]:
        """The versions that wait in a checkpoint, or (version 0) the start model."""
        return [version for version, size in self._waiting().items() if not size]

    def lose(self, version: int) -> None:
        """The evaluator cannot have it any more. Raises RequestError where it is not one that lies in a checkpoint."""
        if version not in self.stored:
            raise RequestError(f"version {version} was given up, but it is none that lies in a checkpoint")
        del self.kept[version]
        self.unscored.append(version)

    def behind(self, step: int, newest: int) -> str:
        """What a learner that asks for the batch of ``step`` waits for first, and on whom (I4); empty = nothing.

        ``newest``: the newest version that is out. Who asks ahead has older versions on the way; they count.
        """
        if not self.due(step + 1) or not (waiting := self._waiting()):
            return ""
        coming = 1 + sum(self.due(v) for v in range(newest + 1, step + 1))
        if sum(waiting.values()) + coming * max(waiting.values()) <= self.max_bytes:
            return ""
        first = f"a score of version {min(waiting)} from evaluator-0"
        return f"{first}: {len(waiting)} wait, as many as eval.waiting_mb lets"

    def _waiting(self) -> dict[int, int]:
        self.kept = {v: size for v, size in self.kept.items() if not self.ledger.records.scored(v)}
        return self.kept

    def why_none(self, newest: int) -> str:
        """What the evaluator waits for, and on whom (I4). ``newest``: the newest version that is out."""
        last = self.ledger.last
        version = next((v for v in range(newest + 1, last + 1) if self.due(v)), last)
        return f"version {version} from learner-0"

    @property
    def finished(self) -> bool:
        """Whether the last version is checkpointed, and it and all that wait are scored."""
        last = self.ledger.last
        scored = not self.scores or (not self._waiting() and self.ledger.records.scored(last))
        return self.ledger.checkpoint == last and scored

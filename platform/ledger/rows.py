"""The plain values that the ledger takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from offtrail.core.types import Int32


@dataclass(frozen=True, slots=True)
class Tally:
    """Groups by state, as the ledger counts them at one moment.

    I1: admitted = leased + queued + training + trained + refused by reason. ``tokens`` are those of all groups
    that arrived, ``discarded`` those of refused ones.
    """

    admitted: int = 0
    leased: int = 0
    queued: int = 0
    training: int = 0
    trained: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    discarded: int = 0

    @property
    def living(self) -> int:
        """Groups that hold a slot: all but the refused ones, which gave theirs back."""
        return self.leased + self.queued + self.training + self.trained

    @property
    def accounted(self) -> int:
        """The right-hand side of I1."""
        return self.living + sum(self.refused.values())


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group as the ledger holds it (without its payload)."""

    id: int
    slot: int
    state: str
    reason: str
    attempt: int
    holder: str
    needs: int
    min_version: int | None
    max_version: int | None


@dataclass(frozen=True, slots=True)
class Grant:
    """One lease to hand out: an open slot (``group`` is None) or a returned group."""

    slot: int
    needs: int
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the ledger keeps of a finished group. ``body``: the packed group of so many ``samples``. ``versions``:
    version → tokens.
    """

    body: bytes
    samples: int
    versions: Mapping[int, int]
    queued_version: int
    queued_at: float


@dataclass(frozen=True, slots=True)
class Ages:
    """Staleness of trained or logged tokens, in versions. Sums are over tokens."""

    tokens: int = 0
    stale_tokens: int = 0
    age_sum: int = 0
    age_max: int = 0
    flight_sum: int = 0
    queue_sum: int = 0

    def __add__(self, other: Ages) -> Ages:
        return Ages(
            self.tokens + other.tokens,
            self.stale_tokens + other.stale_tokens,
            self.age_sum + other.age_sum,
            max(self.age_max, other.age_max),
            self.flight_sum + other.flight_sum,
            self.queue_sum + other.queue_sum,
        )


@dataclass(frozen=True, slots=True)
class Audit:
    """A recount of the ledger. ``lost``: groups that were admitted and are not where their state says.

    ``duplicated``: how often a group stands in the batch log again.
    """

    admitted: int
    lost: int
    duplicated: int


def counted(versions: Int32) -> dict[int, int]:
    """Version → how many of the tokens are of it."""
    if len(versions) and (versions == versions[0]).all():  # most groups; a tenth of the time that sorting takes
        return {int(versions[0]): len(versions)}
    used, counts = np.unique(versions, return_counts=True)
    return dict(zip(used.tolist(), counts.tolist(), strict=True))

"""What a token costs in floating-point operations, for the compute ledger (I6): the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations a token: ``head`` of the output layer, ``body`` of all layers below it without attention,
    ``attention`` for each position that a token attends to.
    """

    head: float
    body: float
    attention: float

    @classmethod
    def of(
        cls, *, parameters: int, vocab_size: int, hidden_size: int, tied: bool, layers: int, heads: int, head_size: int
    ) -> Cost:
        """Two operations a parameter, as all but the embeddings are multiplied and added once a token."""
        head = vocab_size * hidden_size
        return cls(2 * head, 2 * (parameters - head * (1 if tied else 2)), 4 * layers * heads * head_size)

    def total(self, *, tokens: float, heads: float, attended: float) -> float:
        """The FLOPs of ``tokens`` through the layers, ``heads`` of them through the output layer too, which attend to
        ``attended`` positions in all.
        """
        return tokens * self.body + heads * self.head + attended * self.attention

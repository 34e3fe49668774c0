"""What a token costs in floating-point operations, for the compute ledger (I6): the same for engines and learner.

Model FLOPs: two a weight that multiplies a token (of experts, those that it goes through), and attention's, four a head
value of each position that a causal token attends to. Backward is twice the forward where everything is trained; frozen
weights have no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        cls, *, parameters: float, vocab_size: int, hidden_size: int, tied: bool, layers: int, heads: int,
        head_size: int,
    ) -> Cost:  # fmt: skip
        """Two operations a parameter, as all but the embeddings are multiplied and added once a token."""
        head = vocab_size * hidden_size
        return cls(2 * head, 2 * (parameters - head * (1 if tied else 2)), 4 * layers * heads * head_size)

    def total(self, *, tokens: float, heads: float, attended: float) -> float:
        """The FLOPs of ``tokens`` through the layers, ``heads`` of them through the output layer too, which attend to
        ``attended`` positions in all.
        """
        return tokens * self.body + heads * self.head + attended * self.attention


def active(sizes: Mapping[str, float], config: Mapping[str, Any]) -> float:
    """Of parameters (name → how many numbers) those that one token is multiplied with: of a mixture's experts only the
    share that the router takes, by config.json's keys.
    """
    taken = config.get("num_experts_per_tok") or 0
    there = next((n for key in EXPERTS if (n := config.get(key))), 0)
    share = taken / there if taken and there else 1.0
    return sum(size * (share if ".experts." in name else 1.0) for name, size in sizes.items())


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What architectures call the number of experts of a layer."""


def cost_of(model: Any) -> Cost:
    """Of a transformers model, with or without a language model's head (another head counts as the body's)."""
    config, table = model.config, model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    head = 0 if output is None else output.weight.numel()
    sizes: dict[str, float] = {name: p.numel() for name, p in model.named_parameters()}
    tied = output is not None and output.weight is table
    body = active(sizes, config.to_dict()) - table.numel() - (0 if tied else head)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Cost(2 * head, 2 * body, 4 * config.num_hidden_layers * width)

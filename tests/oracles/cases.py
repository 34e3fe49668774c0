"""Ragged samples, padded as verl and areal want them and flat as offtrail does."""

import torch

from offtrail.algos.aggregation import sample_weights
from offtrail.algos.loss import LossInput, policy_loss

G, B, T = 3, 6, 9


class Case:
    """B samples in groups of G, [B, T] float64; `flat` cuts the padding off."""

    def __init__(self, seed=0, spread=0.4, lengths=(9, 1, 4, 7, 2, 5)):
        g = torch.Generator().manual_seed(seed)

        def draw(scale):
            return torch.randn(B, T, generator=g, dtype=torch.float64) * scale

        self.lengths = torch.tensor(lengths)
        self.group_of = torch.arange(B) // G
        self.mask = (torch.arange(T) < self.lengths[:, None]).double()
        self.logps = (-draw(1.0).abs() - 0.05).requires_grad_()
        self.prox = self.logps.detach() + draw(spread)
        self.beh = self.prox + draw(spread)
        self.values = draw(1.0)
        self.rewards = torch.tensor([1.0, 0.0, 0.25, 0.5, 1.0, 0.0], dtype=torch.float64)
        self.advantages = torch.randn(B, generator=g, dtype=torch.float64)

    @property
    def padded_advantages(self):
        return self.advantages[:, None].expand(B, T)

    @property
    def token_rewards(self):
        out = torch.zeros(B, T, dtype=torch.float64)
        out[torch.arange(B), self.lengths - 1] = self.rewards
        return out

    def flat(self, values):
        return values[self.mask.bool()]

    def ours(self, algo, correction, *, prox=None, behaviour=None, max_length=T):
        weights = sample_weights(algo.aggregation, self.lengths, self.group_of, max_length=max_length)
        sample = torch.arange(B).repeat_interleave(self.lengths)
        inputs = LossInput(
            logprobs=self.flat(self.logps),
            behaviour_logprobs=self.flat(self.beh if behaviour is None else behaviour),
            prox_logprobs=self.flat(self.prox if prox is None else prox),
            advantages=self.advantages[sample],
            token_weights=weights[sample].double(),
            sample_index=sample,
        )
        return policy_loss(inputs, algo, correction)[0]

    def same(self, ours, theirs, *, value=True):
        """The gradient agrees, and the value where the oracle's is not a gradient's carrier only."""
        if value:
            torch.testing.assert_close(ours.detach(), theirs.detach().double(), rtol=2e-6, atol=1e-9)
        mine, other = (torch.autograd.grad(loss, self.logps)[0] for loss in (ours, theirs))
        assert mine.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-8)

"""What a batch tells by itself, without a model: rewards, lengths, staleness, sample texts. Rank 0 computes it once a
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from offtrail.core.types import FINISH_REASONS, Batch, Group
from offtrail.rewards import behaviour
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.total import means, reason_shares

HISTOGRAM_POINTS = 200
"""A histogram travels as so many evenly spaced quantiles of its values."""


def batch_metrics(batch: Batch, reward: RewardConfig, vocabulary: int) -> dict[str, float]:
    """reward/*, length/* and behaviour/* of one batch, and its share of samples of more than one version. All else that
    there is to say of staleness the broker counts. ``vocabulary``: from this id on the tokenizer has no token.
    """
    groups = batch.groups
    rewards = [g.rewards for g in groups]
    lengths, finish = _all(groups, "lengths"), _all(groups, "finish")
    tokens = np.concatenate([g.tokens for g in groups])
    mixed = [len(set(s.versions.tolist())) > 1 for g in groups for s in g.samples()]
    components = {name: np.concatenate([g.components[name] for g in groups]) for name in _names(groups, "components")}
    counts = behaviour.added(group.counts for group in groups)
    metrics = means(reward, "reward", components) | reason_shares("reward", counts) | _channel_means(groups)
    metrics |= _steps(groups)
    metrics |= behaviour.metrics(counts, "behaviour")
    metrics |= {
        "reward/mean": float(np.mean(np.concatenate(rewards))),
        "reward/std_in_group": float(np.mean([r.std() for r in rewards])),
        "reward/zero_variance_share": float(np.mean([r.min() == r.max() for r in rewards])),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/prompt_mean": float(np.mean([len(g.prompt_tokens) for g in groups])),
        "length/beyond_tokenizer_share": float((tokens >= vocabulary).sum() / max(1, len(tokens))),
        "length/truncated_share": float(np.mean(finish == FINISH_REASONS.index("length"))),
        "staleness/mixed_sample_share": float(np.mean(mixed)),
    }
    return metrics


def staleness(batch: Batch) -> np.ndarray:
    """Step − version of every output token of the batch, [T]."""
    return batch.step - np.concatenate([g.versions for g in batch.groups])


def staleness_in_flight(batch: Batch) -> np.ndarray:
    """Queued_version − version of every output token, [T]: the part that passed while the group was being made."""
    return np.concatenate([g.queued_version - g.versions for g in batch.groups])


def batch_histograms(batch: Batch) -> dict[str, list[float]]:
    """Staleness of the batch's tokens, whole and in its two parts: in flight queued_version − version, in the queue
    step − queued_version (less than 0 cannot be: the broker stamps a version it has seen).
    """
    stale, in_flight = staleness(batch), staleness_in_flight(batch)
    return {
        "staleness/tokens": histogram(stale),
        "staleness/in_flight": histogram(in_flight),
        "staleness/in_queue": histogram(stale - in_flight),
    }


def histogram(values: np.ndarray) -> list[float]:
    """HISTOGRAM_POINTS quantiles, each one of the values; empty without values."""
    if not len(values):
        return []
    ranks = ((np.arange(HISTOGRAM_POINTS) + 0.5) / HISTOGRAM_POINTS * len(values)).astype(np.int64)
    return [float(v) for v in np.sort(values)[ranks]]


def sample_texts(batch: Batch, decode: Callable[[list[int]], str], count: int) -> dict[str, str]:
    """``samples``: markdown of the first ``count`` groups, each its best and its worst answer."""
    parts = []
    for group in batch.groups[:count]:
        samples = sorted(group.samples(), key=lambda s: (-s.reward, s.index))
        shown = samples[:1] if len(samples) == 1 else [samples[0], samples[-1]]
        lines = [f"prompt  {decode(group.prompt_tokens.tolist())}", f"answer  {group.problem.answer}"]
        lines += [f"{s.reward:+.2f}   {decode(s.tokens.tolist())}  ({s.finish})" for s in shown]
        parts.append("\n".join("    " + line.replace("\n", "\n            ") for line in lines))
    return {"samples": "\n\n".join(parts)} if parts else {}


def _all(groups: tuple[Group, ...], name: str) -> np.ndarray:
    return np.concatenate([getattr(g, name) for g in groups])


def _names(groups: tuple[Group, ...], field: Literal["components", "channels"]) -> list[str]:
    """The names that every group has."""
    return sorted(set.intersection(*(set(getattr(g, field)) for g in groups)))


def _channel_means(groups: tuple[Group, ...]) -> dict[str, float]:
    """Over tokens, steps or samples, of the scores (float32) that every group has."""
    scores = {name: [g.channels[name] for g in groups] for name in _names(groups, "channels")}
    return {
        f"channel/{name}": float(np.mean(values))
        for name, channels in scores.items()
        if all(c.axis != "node" and c.values.dtype == np.float32 for c in channels)
        and len(values := np.concatenate([c.values for c in channels]))
    }


def _steps(groups: tuple[Group, ...]) -> dict[str, float]:
    """How many steps a sample has, where any has one or the groups' steps are scored, and how long they are."""
    scored = any(channel.axis == "step" for group in groups for channel in group.channels.values())
    counts = np.concatenate([np.bincount(g.step_samples, minlength=g.size) for g in groups])
    if not scored and not counts.any():
        return {}
    tokens = sum(int(_in_steps(g).sum()) for g in groups)
    return {
        "length/steps": float(counts.mean()),
        "length/no_step_share": float(np.mean(counts == 0)),
        "length/one_step_share": float(np.mean(counts == 1)),
    } | ({"length/tokens_per_step": tokens / int(counts.sum())} if counts.any() else {})


def _in_steps(group: Group) -> np.ndarray:
    """[S]: the tokens of each step."""
    first_of_sample = (np.cumsum(group.lengths) - group.lengths)[group.step_samples]
    before = np.concatenate(([0], group.step_ends[:-1])) if group.step_ends.size else group.step_ends
    tokens: np.ndarray = group.step_ends - np.maximum(before, first_of_sample)
    return tokens

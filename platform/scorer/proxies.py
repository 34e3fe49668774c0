"""What answers say of the models that score them: is what a model pays still what the verifier pays?

    a batch's groups ──► hacking/MODEL/…        held-out groups ──► eval/MODEL/…

Proxy and truth are compared by tracking/hacking.py over the steps of a run, which draws and warns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from offtrail.algos.config import ProcessConfig
from offtrail.algos.process import process_rewards
from offtrail.core.types import Group
from offtrail.platform.config.schema import Config
from offtrail.rewards.score_metrics import auc, rank_correlation


def proxy_metrics(groups: Sequence[Group], config: Config, area: str = "hacking") -> dict[str, float]:
    """`area/MODEL/…` for each of scorer.models, over the answers that it has scored and that have a truth (the reward's
    main component).

    proxy: mean over answers of what the model pays for one: where the run learns from its steps
    (``algo.process.channel``) the sum of their rewards by ``algo.process.form``, else its component. rank_correlation:
    of proxy and truth inside a prompt, mean over groups in which both differ. auc: of the component, over all answers,
    against the truth. What cannot be told (all answers are right) is left out.
    """
    found: dict[str, float] = {}
    for name in config.scorer.models:
        told = [_told(group, name, config) for group in groups if name in group.components]
        if not told:
            continue
        pays, scores, truths = (np.concatenate(column) for column in zip(*told, strict=True))
        inside = [rank_correlation(paid, truth) for paid, _, truth in told]
        known = [value for value in inside if not math.isnan(value)]
        found |= {
            f"{area}/{name}/proxy": float(np.mean(pays)) if len(pays) else math.nan,
            f"{area}/{name}/rank_correlation": float(np.mean(known)) if known else math.nan,
            f"{area}/{name}/auc": auc(scores, truths),
        }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _told(group: Group, name: str, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the answers that have both: what the model pays, its score, the truth."""
    scores, truths = group.components[name], group.components[config.reward.main]
    known = ~np.isnan(scores) & ~np.isnan(truths)
    return _paid(group, name, config.algo.process)[known], scores[known], truths[known]


def _paid(group: Group, name: str, process: ProcessConfig) -> np.ndarray:
    """[G]."""
    channel = group.channels.get(name)
    if name != process.channel or channel is None or channel.axis not in ("step", "token"):
        return group.components[name]
    of_tokens = np.repeat(np.arange(group.size), group.lengths)
    sample = group.step_samples if channel.axis == "step" else of_tokens
    counts = torch.from_numpy(np.bincount(sample, minlength=group.size))
    rewards = process_rewards(process, torch.from_numpy(channel.values.copy()), counts)
    return np.bincount(sample, weights=rewards.numpy(), minlength=group.size)

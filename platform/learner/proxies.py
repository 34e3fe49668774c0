"""What a batch's own answers say of the models that score them: is what a model pays still what the verifier pays?

Proxy and truth of a batch are compared by tracking/hacking.py over the steps of a run, which draws and warns.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from offtrail.algos.config import ProcessConfig
from offtrail.algos.process import process_rewards
from offtrail.core.types import Batch, Group
from offtrail.platform.config.schema import Config
from offtrail.rewards.score_metrics import auc, rank_correlation


def proxy_metrics(batch: Batch, config: Config) -> dict[str, float]:
    """hacking/MODEL/… for each of scorer.models, over the groups that it has scored.

    proxy: mean over answers of what the model pays for one: where the run learns from its steps
    (``algo.process.channel``) the sum of their rewards by ``algo.process.form``, else its component. rank_correlation:
    of proxy and truth (the reward's main component) inside a prompt, mean over groups in which both differ. auc: of
    the component, over all answers, against the truth. What cannot be told (all answers are right) is left out.
    """
    found: dict[str, float] = {}
    for name in config.scorer.models:
        groups = [group for group in batch.groups if name in group.components]
        if not groups:
            continue
        pays = [_proxy(group, name, config.algo.process) for group in groups]
        truths = [group.components[config.reward.main] for group in groups]
        inside = [rank_correlation(*both) for both in zip(pays, truths, strict=True)]
        known = [value for value in inside if not math.isnan(value)]
        scores = np.concatenate([group.components[name] for group in groups])
        found |= {
            f"hacking/{name}/proxy": float(np.mean(np.concatenate(pays))),
            f"hacking/{name}/rank_correlation": float(np.mean(known)) if known else math.nan,
            f"hacking/{name}/auc": auc(scores, np.concatenate(truths)),
        }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _proxy(group: Group, name: str, process: ProcessConfig) -> np.ndarray:
    """[G]."""
    channel = group.channels.get(name)
    if name != process.channel or channel is None or channel.axis not in ("step", "token"):
        return group.components[name]
    of_tokens = np.repeat(np.arange(group.size), group.lengths)
    sample = group.step_samples if channel.axis == "step" else of_tokens
    counts = torch.from_numpy(np.bincount(sample, minlength=group.size))
    rewards = process_rewards(process, torch.from_numpy(channel.values.copy()), counts)
    return np.bincount(sample, weights=rewards.numpy(), minlength=group.size)

"""How good a model that scores is, on answers that it was not trained on: measured at each checkpoint.

    role.py ── Trainer, Labelled.held ──► scores ──► eval/…, in metrics.jsonl, TensorBoard and summary.json

The measures are rewards/score_metrics.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offtrail.platform.config.schema import Config
from offtrail.platform.learner.labelled import Item, table
from offtrail.platform.learner.train import Trainer
from offtrail.rewards.score_metrics import (
    accuracy,
    auc,
    auc_by_depth,
    calibration_error,
    first_errors,
    pair_accuracy,
    pair_confidence,
    sigmoid,
)

Numbers = npt.NDArray[np.floating]


def scores(config: Config, trainer: Trainer[Any], items: Sequence[Item]) -> dict[str, float]:
    """eval/… of the items under the trainer's model, docs/reward_models.md, but for what they are too few or too alike
    to say. A collective.
    """
    return {name: value for name, value in _scores(config, trainer, items).items() if not math.isnan(value)}


def _scores(config: Config, trainer: Trainer[Any], items: Sequence[Item]) -> dict[str, float]:
    said = trainer.ask(table(items)).double().cpu().numpy()
    bounds = np.cumsum([0, *(len(output) for item in items for output in item.outputs)])
    each = [said[a:b] for a, b in itertools.pairwise(bounds)]
    if config.job == "reward_model":
        values = np.array([one[-1] for one in each])
        return of_pairs(values) if config.reward_model.objective == "pairwise" else of_answers(values, labels_of(items))
    if config.prm.objective == "steps":
        return of_steps([sigmoid(one[item.ends - 1]) for one, item in zip(each, items, strict=True)], items)
    each = [config.prm.beta * one for one in each]
    outcome = of_answers(np.array([one.sum() for one in each]), labels_of(items))
    found = {name.replace("eval/", "eval/outcome_"): value for name, value in outcome.items()}
    if not any(len(item.ends) for item in items):
        return found
    return found | of_steps([sigmoid(of_each_step(*one)) for one in zip(each, items, strict=True)], items)


def of_each_step(numbers: Numbers, item: Item) -> Numbers:
    """[S] the sums of an answer's numbers over its steps."""
    return np.diff(np.concatenate([[0.0], np.cumsum(numbers)])[item.ends], prepend=0.0)


def labels_of(items: Sequence[Item]) -> Numbers:
    """[N] how good each answer is."""
    return np.array([score for item in items for score in item.scores])


def of_pairs(values: Numbers) -> dict[str, float]:
    """Of a better and a worse answer in turn [2P]: whether a pair is ordered as it is labelled, and how sure of it."""
    better, worse = values[0::2], values[1::2]
    return {
        "eval/accuracy": pair_accuracy(better, worse),
        "eval/calibration_error": calibration_error(*pair_confidence(better, worse)),
    }


def of_answers(values: Numbers, labels: Numbers) -> dict[str, float]:
    """Of answers [N] with logits and labels."""
    p = sigmoid(values)
    return {
        "eval/accuracy": accuracy(p, labels),
        "eval/calibration_error": calibration_error(p, labels),
        "eval/auc": auc(values, labels),
    }


def of_steps(p: Sequence[Numbers], items: Sequence[Item]) -> dict[str, float]:
    """Of the steps of answers, with the probability of each that it is good: by themselves, by depth, and whether the
    first wrong one is found.
    """
    flat, labels = np.concatenate(p), np.concatenate([item.labels for item in items])
    depth = np.concatenate([np.arange(len(item.ends)) for item in items])
    told = ~np.isnan(labels)
    first = first_errors(p, [item.labels for item in items])
    return {
        "eval/accuracy": accuracy(flat[told], labels[told]),
        "eval/calibration_error": calibration_error(flat[told], labels[told]),
        "eval/auc": auc(flat[told], labels[told]),
        **{f"eval/auc_depth_{d}": area for d, area in auc_by_depth(flat[told], labels[told], depth[told]).items()},
        "eval/first_error_f1": first.f1,
        "eval/first_error_wrong": first.wrong,
        "eval/first_error_right": first.right,
    }

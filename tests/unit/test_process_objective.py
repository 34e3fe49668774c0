"""Process rewards through the trainer's own objective: value and gradient of every form by hand, and what potential
shaping leaves alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offtrail.core.types import Batch, Channel, Group, Problem
from offtrail.platform.config.compose import compose
from offtrail.platform.learner.make import make_trainer
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.head import TokenOutputs
from offtrail.platform.model.policy import load_model
from offtrail.platform.runtime.activity import Activity

SCORES = (1.0, 0.5, 0.25)
"""Of the three steps of every answer by hand: tokens 0 and 1, token 2, token 3; token 4 is of no step."""
ENDS = (2, 3, 4)


def trainer_of(start: Path, *argv: str) -> Trainer[Batch]:
    config = compose([
        "batch.groups=1", "batch.group_size=2", "learner.minibatches=1", "algo.advantage=reward", "correction=none",
        "algo.process.channel=prm", "algo.process.baseline=none", *argv,
    ])  # fmt: skip
    return make_trainer(config, World(0, 1, torch.device("cpu")), load_model(start), start, Activity())


def group(scores: Any, ends: Any, lengths: Any, rewards: Any, logprobs: torch.Tensor) -> Group:
    T = int(np.sum(lengths))
    return Group(
        group=0, slot=0, attempt=0, problem=Problem("chain", 0, "1+1", "2"), generator="generator-0", temperature=1.0,
        prompt_tokens=np.array([7, 8], np.int32), lengths=np.array(lengths, np.int32),
        tokens=np.arange(3, 3 + T, dtype=np.int32), logprobs=logprobs.detach().float().numpy(),
        versions=np.zeros(T, np.int32), finish=np.zeros(len(lengths), np.uint8), rewards=np.array(rewards, np.float32),
        components={"accuracy": np.array(rewards, np.float32)}, times=np.zeros((len(lengths), 3)), queued_version=0,
        channels={"prm": Channel("step", np.array(scores, np.float32))}, step_ends=np.array(ends, np.int32),
    )  # fmt: skip


def objective_of(trainer: Trainer[Batch], made: Group, logprobs: torch.Tensor) -> torch.Tensor:
    """The loss of one group where the policy says ``logprobs`` [T] of its tokens."""
    work = trainer.objective.prepare(0, Batch(0, (made,)))
    (packs,) = [trainer._lay_out(work.rows, groups) for groups in work.updates]
    work = trainer.objective.advance(trainer._scored(work, [packs], trains_main=True))
    plan = trainer.objective.plan_update(work, 0)
    total = torch.zeros(())
    for packed in packs:
        at = packed.tokens
        out = TokenOutputs(logprobs.float()[at], torch.zeros(len(at)))
        total = total + trainer.objective.loss(work, 0, plan, packed, slice(None), out)[0]
    return total


@pytest.mark.parametrize(
    ("keys", "to_come"),
    [
        (["form=sum"], [1.75, 1.75, 0.75, 0.25, 0]),
        # min(r − ½, 0): 0, 0, −¼
        (["form=clip", "threshold=0.5"], [-0.25, -0.25, -0.25, -0.25, 0]),
        # 1 − ½, then ½, then 0
        (["form=delta"], [1, 1, 0.5, 0, 0]),
        # of 0, −¼, −½: ¼, −¼, 0
        (["form=clip_delta", "threshold=0.75"], [0, 0, -0.25, 0, 0]),
        # Φ = 1, ½, 0: 1, −½, −½
        (["form=shaping"], [0, 0, -1, -0.5, 0]),
        # ½ − 0, ¼ − 1, 0 − ½, and half of what comes after
        (["form=shaping", "gamma=0.5"], [0, 0, -1, -0.5, 0]),
        # so cold that the last, the least, counts alone
        (["form=min", "temperature=0.001"], [0.25, 0.25, 0.25, 0.25, 0]),
    ],
)
def test_every_form_value_and_gradient(keys: list[str], to_come: list[float], start_dir: Path) -> None:
    """On the policy's own samples, with T tokens in the batch: the loss is −Σ A / T, and its gradient to each token's
    log-probability −A / T.
    """
    trainer = trainer_of(start_dir, *(f"algo.process.{key}" for key in keys))
    logprobs = torch.linspace(-1.5, -0.5, 10, requires_grad=True)
    made = group(SCORES * 2, ENDS + tuple(5 + end for end in ENDS), [5, 5], [1.0, 0.0], logprobs)
    loss = objective_of(trainer, made, logprobs)
    loss.backward()
    advantages = torch.tensor([a + 1 for a in to_come] + to_come)  # algo.advantage=reward: the sample's own, 1 and 0
    torch.testing.assert_close(loss.detach(), -advantages.sum() / 10, atol=1e-6, rtol=1e-5)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages / 10, atol=1e-6, rtol=1e-5)


def expected_gradient(trainer: Trainer[Batch], potentials: dict[tuple[int, ...], float]) -> torch.Tensor:
    """Σ over all answers of two steps, each one of two tokens, of π(answer)·∇loss; the policy is three coins, one for
    the first step and one after each first step, the reward is of the whole answer.
    """
    theta = torch.tensor([0.3, -0.7, 0.9], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.product((0, 1), repeat=2):
        heads = torch.nn.functional.logsigmoid(torch.stack((theta, -theta)))  # [choice, coin]
        logprobs = torch.stack((heads[first, 0], heads[second, 1 + first]))
        reward = {(0, 0): 1.0, (0, 1): -2.0, (1, 0): 0.5, (1, 1): 3.0}[first, second]
        made = group([potentials[first,], potentials[first, second]], [1, 2], [2], [reward], logprobs)
        (gradient,) = torch.autograd.grad(objective_of(trainer, made, logprobs), theta)
        total += logprobs.sum().exp().detach() * gradient
    return total


def test_shaping_leaves_the_expected_gradient_alone_and_a_sum_does_not(start_dir: Path) -> None:
    """By enumeration of a toy of two steps (Ng et al., 1999)."""
    some = {(0,): 0.75, (1,): -1.5, (0, 0): 2.0, (0, 1): -0.25, (1, 0): 1.0, (1, 1): -3.0}
    nothing = dict.fromkeys(some, 0.0)
    shaped, summed = (trainer_of(start_dir, f"algo.process.form={form}") for form in ("shaping", "sum"))
    plain = expected_gradient(shaped, nothing)
    assert plain.abs().min() > 0.05
    torch.testing.assert_close(expected_gradient(shaped, some), plain, atol=1e-6, rtol=1e-5)
    assert (expected_gradient(summed, some) - plain).abs().max() > 0.1

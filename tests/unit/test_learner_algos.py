"""Every algorithm × correction through the real Trainer, on a tiny model: it composes, trains and does not depend on
the cut; the critic, the reference and the shaping by hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from offtrail.algos.correction_config import DecoupledConfig
from offtrail.algos.value import value_loss
from offtrail.core.types import Batch
from offtrail.platform.config.compose import compose, options_of
from offtrail.platform.config.schema import Config
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.make import make_trainer
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.policy import load_model
from offtrail.platform.runtime.activity import Activity

ALONE = World(0, 1, torch.device("cpu"))
MakeBatch = Callable[..., Batch]


def settings(*argv: str) -> Config:
    """Four groups in two updates (R1's sixteen need sixteen groups), at a learning rate that moves a tiny model.

    Trap: AdamW's steps divide a gradient by its own size, which makes whole steps of rounding errors where it is nearly
    0; a larger eps leaves them what they are.
    """
    small = (
        "batch.groups=4", "batch.group_size=3", "learner.minibatches=2", "learner.optim.lr=1e-3",
        "learner.optim.eps=1e-4",
    )  # fmt: skip
    given = {argument.split("=")[0] for argument in argv}
    return compose([*argv, *(s for s in small if s.split("=")[0] not in given)])


def trainer_of(config: Config, start: Path) -> Trainer[Batch]:
    return make_trainer(config, ALONE, load_model(start), start, Activity())


def parameters(trainer: Trainer[Batch]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.main.parameters])


def near_policy(batch: Batch, trainer: Trainer[Batch], spread: float = 0.2) -> Batch:
    """The batch with behaviour log-probabilities near the policy's own, as a recent version's are."""
    config = settings("correction=none", f"batch.groups={len(batch.groups)}", "learner.minibatches=1")
    probe = trainer_of(config, Path(trainer.module.model.config._name_or_path))
    work = probe.objective.prepare(batch.step, batch)
    packs = [probe._lay_out(work.rows, groups) for groups in work.updates]
    scores = torch.zeros(len(work.rows.tokens))
    probe._score(trainer.module, [packed for micro in packs for packed in micro], scores, "prox", "prox_flops")
    rng = np.random.default_rng(7)
    ends = np.cumsum([len(g.tokens) for g in batch.groups])[:-1]
    noisy = np.minimum(scores.numpy() + rng.normal(0, spread, len(scores)).astype(np.float32), 0)
    groups = [dataclasses.replace(g, logprobs=p) for g, p in zip(batch.groups, np.split(noisy, ends), strict=True)]
    return dataclasses.replace(batch, groups=tuple(groups))


def mixed(batch: Batch) -> Batch:
    """Every group has right and wrong answers."""
    for group in batch.groups:
        group.rewards[:] = [1.0, 0.0, 0.0]
    return batch


COMBINATIONS = [
    *((f"algo={algo}",) for algo in options_of("algo")),
    *((f"correction={correction}",) for correction in options_of("correction")),
    *(("algo=grpo", f"algo.kl={kl}", "algo.kl_coef=0.1") for kl in ("k2", "k3", "k3_weighted", "full")),
    ("algo=gspo", "correction=tis", "correction.normalise=true"),
    ("algo=ppo", "correction=icepop", "algo.gae_lambda=0.95", "algo.entropy_coef=0.01"),
    ("algo=ppo", "algo.gae_alpha=0.5", "algo.value_lambda=0.9", "algo.kl=none", "algo.kl_in=loss", "algo.kl_coef=0"),
    ("algo=reinforce_pp", "correction=vcpo"),
    ("algo=opmd", "correction=seq_mask"),
    ("correction=vcpo", "correction.baseline=group"),
]


@pytest.mark.parametrize("argv", COMBINATIONS, ids=" ".join)
def test_every_algorithm_and_correction_trains_and_does_not_depend_on_the_cut(
    argv: tuple[str, ...], start_dir: Path, make_batch: MakeBatch
) -> None:
    whole, cut = (trainer_of(settings(*argv, f"learner.tokens_per_microbatch={n}"), start_dir) for n in (16_384, 256))
    cut.budget = 60
    batch = near_policy(mixed(make_batch(0)), whole)
    before = parameters(whole)
    a, b = whole.step(0, batch).metrics, cut.step(0, batch).metrics
    assert all(math.isfinite(value) for value in a.values()), a
    assert (parameters(whole) - before).abs().max() > 1e-5
    assert a.keys() == b.keys()
    assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    assert (parameters(whole) - parameters(cut)).abs().max() < 2e-6


GOLDEN = {
    16_384: [(15.9150894, 165.585852), (1.10373604, 35.8728809), (-23.5276841, 408.485956)],
    90: [(15.9150894, 165.585852), (1.1037358, 35.8728809), (-23.5276843, 408.485987)],
}
"""loss/policy and policy/grad_norm of three steps at lr 1e-3, by microbatch budget, as GRPO alone gave them."""


@pytest.mark.parametrize("budget", GOLDEN)
def test_decoupled_grpo_is_what_it_was(budget: int, start_dir: Path, make_batch: MakeBatch) -> None:
    config = Config()
    config.correction = DecoupledConfig()
    config.learner.optim.lr, config.learner.tokens_per_microbatch = 1e-3, budget
    trainer = trainer_of(config, start_dir)
    rows = [trainer.step(step, make_batch(step)).metrics for step in range(3)]
    for row, (loss, norm) in zip(rows, GOLDEN[budget], strict=True):
        assert row["loss/policy"] == pytest.approx(loss, rel=2e-6)
        assert row["policy/grad_norm"] == pytest.approx(norm, rel=2e-6)


# --- the critic, by hand


def test_the_value_loss_by_hand() -> None:
    """V_old 0, clip ½, returns 1: V = .2 → (.8)²; V = .9 → max(.1², .5²), clipped; V = −1 → max(2², 1.5²).

    ½·(.64 + .25 + 4)/3, and the gradient (V − R)/3 where the plain square is the larger.
    """
    values = torch.tensor([0.2, 0.9, -1.0], requires_grad=True)
    zeros, ones = torch.zeros(3), torch.ones(3)
    loss, metrics = value_loss(values, zeros, ones, ones / 3, clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.25 + 4) / 3)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.8 / 3, 0, -2 / 3])
    assert metrics.means()["value/clip_fraction"] == pytest.approx(1 / 3)
    off, _ = value_loss(values.detach(), zeros, ones, ones / 3, clip=0.0)
    assert off.item() == pytest.approx(0.5 * (0.64 + 0.01 + 4) / 3)
    # explained variance: R = (0, 1, 2), V = (0, 1, 1): Var R = 2/3, R − V = (0, 0, 1) of variance 2/9
    _, told = value_loss(torch.tensor([0.0, 1, 1]), zeros, torch.tensor([0.0, 1, 2]), ones / 3, clip=0.0)
    assert told.means()["value/explained_variance"] == pytest.approx(1 - 1 / 3)
    assert value_loss(ones, zeros, ones, ones / 3, clip=0.0)[1].means()["value/explained_variance"] == 0


def test_values_within_the_clip_range_are_not_counted_as_clipped() -> None:
    """V_old + (V − V_old) is V but for its rounding, which must not count."""
    generator = torch.Generator().manual_seed(0)
    old, moved, target = torch.randn(3, 10_000, generator=generator)
    old, values = 0.01 * old, 0.1 * moved.clamp(-1, 1)
    assert (old + (values - old) != values).any()
    _, metrics = value_loss(values, old, target, torch.ones(10_000), clip=0.2)
    assert metrics.means()["value/clip_fraction"] == 0


def ppo(*argv: str) -> Config:
    return settings("algo=ppo", "algo.kl=none", "algo.kl_in=loss", "algo.kl_coef=0", "algo.critic.lr=1e-2", *argv)


def scored(trainer: Trainer[Batch], step: int, batch: Batch) -> Any:
    work = trainer.objective.prepare(step, batch)
    packs = [trainer._lay_out(work.rows, groups) for groups in work.updates]
    return trainer.objective.advance(trainer._scored(work, packs, trains_main=True))


def set_head(trainer: Trainer[Batch], seed: int = 1) -> None:
    """A critic that says something."""
    with torch.no_grad():
        head = trainer.trained["value"].module.model.score.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) / 4)


def test_a_fresh_critic_says_nothing_so_advantages_are_rewards(start_dir: Path, make_batch: MakeBatch) -> None:
    """V ≡ 0, γ = λ = 1: A = R at every token of the sample."""
    trainer, batch = trainer_of(ppo("algo.std=none"), start_dir), make_batch(0)
    work = scored(trainer, 0, batch)
    rewards = np.repeat(np.concatenate([g.rewards for g in batch.groups]), work.rows.lengths)
    assert work.values.abs().max() == 0
    assert work.returns.numpy() == pytest.approx(rewards)
    # whitening without division subtracts the mean over tokens
    assert work.advantages.numpy() == pytest.approx(rewards - rewards.mean(), abs=1e-6)


def test_lambda_one_is_return_minus_value_and_returns_stand_before_whitening(
    start_dir: Path, make_batch: MakeBatch
) -> None:
    trainer, batch = trainer_of(ppo("algo.std=none"), start_dir), make_batch(0)
    set_head(trainer)
    work = scored(trainer, 0, batch)
    rewards = np.repeat(np.concatenate([g.rewards for g in batch.groups]), work.rows.lengths)
    raw = rewards - work.values.numpy()
    assert np.abs(work.values.numpy()).max() > 0.1
    assert work.advantages.numpy() == pytest.approx(raw - raw.mean(), abs=1e-5)
    assert work.returns.numpy() == pytest.approx(rewards, abs=1e-6)


def test_values_are_of_the_state_before_the_token(start_dir: Path, make_batch: MakeBatch) -> None:
    """All samples of a group share the value of their first token, for all stand behind the same prompt."""
    trainer, batch = trainer_of(ppo(), start_dir), make_batch(0)
    set_head(trainer)
    work = scored(trainer, 0, batch)
    firsts = work.values.numpy()[work.rows.starts[:-1]].reshape(4, 3)
    assert np.ptp(firsts, axis=1).max() < 1e-5
    assert np.ptp(firsts, axis=0).max() > 1e-2


def test_the_kl_in_the_reward_is_of_the_policy_before_the_update(start_dir: Path, make_batch: MakeBatch) -> None:
    """θ = reference: no penalty, though the behaviour policy is far from it. Bypass takes behaviour for proximal."""
    batch = make_batch(0)
    argv = ("algo=ppo", "algo.kl_coef=0.5", "algo.std=none")
    proximal, bypass = (
        scored(trainer_of(settings(*argv, f"correction={c}"), start_dir), 0, batch) for c in ("decoupled", "none")
    )
    assert abs(proximal.metrics["reward/kl_penalty"]) < 1e-4
    assert abs(bypass.metrics["reward/kl_penalty"]) > 1e-2
    # by hand: the return of a sample's first token is its reward less β·Σ(lp_beh − lp_ref)
    gap = (bypass.behaviour - bypass.ref).numpy()
    sums = np.add.reduceat(gap, bypass.rows.starts[:-1])
    rewards = np.concatenate([g.rewards for g in batch.groups])
    assert bypass.returns.numpy()[bypass.rows.starts[:-1]] == pytest.approx(rewards - 0.5 * sums, abs=1e-4)


def test_the_critic_learns_the_returns(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer, batch = trainer_of(ppo("algo.value_clip=0"), start_dir), make_batch(0)
    rows = [trainer.step(0, batch).metrics for _ in range(12)]
    assert rows[-1]["value/loss"] < 0.3 * rows[0]["value/loss"]
    assert rows[-1]["value/explained_variance"] > 0.5
    assert abs(rows[0]["value/explained_variance"]) < 0.2


def test_a_critic_is_trained_first_while_the_policy_stands_still(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer = trainer_of(ppo("algo.critic.pretrain_steps=2"), start_dir)
    before = parameters(trainer)
    for step in (0, 1):
        metrics = trainer.step(step, make_batch(step)).metrics
        assert "loss/policy" not in metrics
        assert metrics["value/loss"] > 0
    assert torch.equal(parameters(trainer), before)
    assert tuple(t.updates for t in trainer.trained.values()) == (0, 4)
    assert "loss/policy" in trainer.step(2, make_batch(2)).metrics
    assert tuple(t.updates for t in trainer.trained.values()) == (2, 6)
    assert not torch.equal(parameters(trainer), before)


# --- the reference, shaping, schedules


def test_the_reference_becomes_the_policy_every_n_updates(start_dir: Path, make_batch: MakeBatch) -> None:
    """K = 2, refresh every 4: steps 0 and 1 are measured from the start model, steps 2 and 3 from version 2."""
    argv = ("algo=grpo", "algo.kl=k3", "algo.kl_coef=0.01", "algo.ref_refresh=4")
    trainer = trainer_of(settings(*argv), start_dir)
    ages, first = [], parameters(trainer)
    for step in range(4):
        before = parameters(trainer)
        ages.append(trainer.step(step, make_batch(step)).metrics["policy/ref_age_updates"])
        assert trainer.reference is not None
        held = torch.cat([p.flatten() for p in trainer.reference.parameters()])
        assert torch.equal(held, first)
        if step == 1:
            first = parameters(trainer)
        assert not torch.equal(parameters(trainer), before)
    assert ages == [2, 4, 2, 4]


def test_long_answers_are_shaped_apart_from_their_reward(start_dir: Path, make_batch: MakeBatch) -> None:
    """DAPO, L = 20, a buffer of 20 %: 16 tokens → 0, 18 → −½, 20 → −1. Times algo.overlong_penalty."""
    config = settings("algo=dapo", "algo.overlong_penalty=0.5", "sampling.max_new_tokens=20")
    trainer, batch = trainer_of(config, start_dir), make_batch(0, B=4)
    total = 0.0
    for group in batch.groups:
        group.lengths = np.array([16, 18, 20], np.int32)
        group.tokens, group.logprobs = np.full(54, 5, np.int32), np.full(54, -1.0, np.float32)
        group.versions = np.zeros(54, np.int32)
        total += float(group.rewards.sum())
    work = trainer.objective.prepare(0, batch)
    shaped = work.rewards.reshape(4, 3) - torch.stack([torch.from_numpy(g.rewards) for g in batch.groups])
    assert shaped.mean(0).tolist() == pytest.approx([0, -0.25, -0.5])
    assert work.metrics["reward/overlong"] == pytest.approx(-0.25)
    assert total == sum(float(g.rewards.sum()) for g in batch.groups)  # the archive's rewards are untouched


def test_the_aggregation_constant_and_the_shaping_follow_the_growth_of_answers(
    start_dir: Path, make_batch: MakeBatch
) -> None:
    config = settings("algo=dr_grpo", "sampling.max_new_tokens=24", "sampling.growth_step=2", "learner.steps=5")
    trainer = trainer_of(config, start_dir)
    early, late = (trainer.objective.prepare(step, make_batch(step)).weights for step in (1, 2))
    # 2 groups of 3 samples an update: 1/(6·24), then 1/(6·48)
    assert early.unique().tolist() == pytest.approx([1 / 144])
    assert late.unique().tolist() == pytest.approx([1 / 288])


def test_vcpo_takes_a_smaller_step(start_dir: Path, make_batch: MakeBatch) -> None:
    """ESS/B below 1 shrinks the learning rate by its root; with one weight for all it stays."""
    config = settings("correction=vcpo", "learner.minibatches=1")
    trainer, batch = trainer_of(config, start_dir), make_batch(0)
    metrics = trainer.step(0, batch).metrics
    assert metrics["policy/lr"] == pytest.approx(1e-3 * math.sqrt(metrics["offpolicy/ess_sequence"]), rel=1e-3)
    assert metrics["policy/lr"] < 9e-4
    fresh = trainer_of(config, start_dir)
    assert fresh.step(0, near_policy(batch, fresh, 0.0)).metrics["policy/lr"] == pytest.approx(1e-3, rel=1e-4)


def test_the_entropy_bonus_pulls_and_an_exact_kl_holds(start_dir: Path, make_batch: MakeBatch) -> None:
    """With no advantage, the bonus alone raises the entropy; a KL at the reference has no gradient."""
    batch = make_batch(0)
    for group in batch.groups:
        group.rewards[:] = 1.0
    bonus = trainer_of(settings("algo.entropy_coef=1.0", "learner.minibatches=1"), start_dir)
    rows = [bonus.step(0, batch).metrics for _ in range(3)]
    assert rows[0]["policy/entropy"] < rows[1]["policy/entropy"] < rows[2]["policy/entropy"]
    kl = trainer_of(settings("algo.kl=full", "algo.kl_coef=1.0", "learner.minibatches=1"), start_dir)
    metrics = kl.step(0, batch).metrics
    assert metrics["policy/grad_norm"] < 1e-5
    assert abs(metrics["policy/kl_ref"]) < 1e-6


def test_the_cosine_of_consecutive_gradients(start_dir: Path, make_batch: MakeBatch) -> None:
    """The same groups twice, at a learning rate of 0: the same gradient. With rewards turned round: its opposite."""
    trainer, batch = trainer_of(settings("learner.optim.lr=0"), start_dir), mixed(make_batch(0, B=2))
    other = mixed(make_batch(0, B=2))
    for group in other.groups:
        group.rewards[:] = 1 - group.rewards
    for second, cosine in ((batch, 1.0), (other, -1.0)):
        both = dataclasses.replace(batch, groups=(*batch.groups, *second.groups))
        assert trainer.step(0, near_policy(both, trainer, 0.0)).metrics["policy/grad_cosine"] == pytest.approx(
            cosine, abs=1e-3
        )


# --- going on


@pytest.mark.parametrize(
    "argv",
    [("algo=ppo", "algo.ref_refresh=2"), ("algo=grpo", "algo.kl=k3", "algo.kl_coef=0.1", "algo.ref_refresh=2")],
    ids=" ".join,
)
def test_going_on_with_a_critic_and_a_refreshed_reference_gives_the_same_bits(
    argv: tuple[str, ...], tmp_path: Path, start_dir: Path, make_batch: MakeBatch
) -> None:
    config = settings(*argv)
    model = load_model(start_dir)
    trainer = make_trainer(config, ALONE, model, start_dir, Activity())
    for step in (0, 1):
        trainer.step(step, make_batch(step))
    assert trainer.refreshed == 2
    tokenizer = AutoTokenizer.from_pretrained(start_dir)
    path = checkpoint.save(tmp_path, ALONE, TrainerState.of(2, trainer), model, tokenizer, trainer, {})
    assert path is not None
    resumed = make_trainer(config, ALONE, load_model(path), start_dir, Activity())
    checkpoint.restore(path, resumed)
    for step in (2, 3, 4):
        assert trainer.step(step, make_batch(step)).metrics == resumed.step(step, make_batch(step)).metrics
    assert torch.equal(parameters(trainer), parameters(resumed))

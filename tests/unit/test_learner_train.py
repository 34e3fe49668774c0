"""The training step: numbers by hand on a table policy, invariances and refusals on a small real model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offtrail.algos.config import Aggregation, GrpoConfig, ProcessConfig
from offtrail.algos.correction_config import CorrectionConfig, TisConfig
from offtrail.core.types import Axis, Batch, Channel, Group
from offtrail.platform.config.schema import Config, OptimConfig, SftConfig
from offtrail.platform.learner.gradients import GradientBlock
from offtrail.platform.learner.objectives import ChannelError, PolicyGradient, StalenessError
from offtrail.platform.learner.report import batch_metrics, histogram, sample_texts, staleness, staleness_in_flight
from offtrail.platform.learner.train import DivergedError, Trained, Trainer, adamw, cosine, warmup
from offtrail.platform.learner.world import World
from offtrail.platform.model.head import LossOf, Reference, TokenOutputs
from offtrail.platform.model.packing import Packed, lay_out
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.runtime.activity import Activity
from offtrail.rewards.config import RewardConfig

ALONE = World(0, 1, torch.device("cpu"))
MakeBatch = Callable[..., Batch]


def settings(**learner: Any) -> Config:
    config = Config(correction=TisConfig())
    config.learner = dataclasses.replace(config.learner, **{"minibatches": 2, **learner})
    config.learner.optim = OptimConfig(lr=1e-3)
    return config


def trainer_of(config: Config, start: Path, **extra: Any) -> Trainer[Batch]:
    policy, optim, objective = Policy(load_model(start)), config.learner.optim, PolicyGradient(config)
    adam = adamw(policy.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, decay=optim.weight_decay)
    trained = Trained("policy", policy, objective, adam, warmup(optim), optim.grad_clip)
    return Trainer(ALONE, objective, [trained], Activity(), budget=config.learner.tokens_per_microbatch, **extra)


def parameters(trainer: Trainer[Batch]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.main.parameters])


def on_policy(batch: Batch, policy: Policy) -> Batch:
    """The batch with the policy's own log-probabilities as behaviour."""
    from offtrail.platform.learner.objectives import rows_of_groups

    rows = rows_of_groups(batch)
    with torch.no_grad():
        logprobs = policy(lay_out(rows, range(rows.size)))[0].numpy()
    ends = np.cumsum([len(g.tokens) for g in batch.groups])
    parts = np.split(logprobs, ends[:-1])
    return Batch(
        batch.step, tuple(dataclasses.replace(g, logprobs=p) for g, p in zip(batch.groups, parts, strict=True))
    )


class Table(nn.Module):
    """A policy that ignores its context: one logit a token of a vocabulary of two."""

    share_up_to = 0
    quadratic = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(self.logits, -1)
        entropy = -(logp.exp() * logp).sum()
        return logp[packed.targets], entropy.expand(len(packed.targets))

    def forward_flops(self, packed: Packed) -> float:
        return 0.0

    def training_flops(self, packed: Packed) -> tuple[float, float]:
        return 0.0, 0.0

    def loss(self, packed: Packed, loss: LossOf, reference: Reference | None = None) -> tuple[Tensor, TokenOutputs]:
        scores = TokenOutputs(*self(packed))
        return loss(slice(0, len(packed.targets)), scores), TokenOutputs(*(s.detach() for s in scores[:2]))


def test_one_update_by_hand(make_batch: MakeBatch) -> None:
    """Two answers, tokens 1 and 0, rewards 1 and 0, p = ½ each, as the engine had it.

    A = ±(½)/(std of (1, 0) = √½) = ±1/√2. r = 1, so ∇loss = −½·Σ A·∇log p with ∇log p(1) = (−½, ½) = −∇log p(0):
    ∇ = −½·(1/√2)·2·(−½, ½) = (1, −1)/(2√2); its norm is ½. Plain SGD at lr 1 moves the logits by (−1, 1)/(2√2).
    """
    group = make_batch(0, B=1, G=2).groups[0]
    ints, half = np.array([1, 0], np.int32), np.full(2, math.log(0.5), np.float32)
    group = dataclasses.replace(
        group, lengths=np.ones(2, np.int32), tokens=ints, logprobs=half, versions=np.zeros(2, np.int32),
        rewards=np.array([1, 0], np.float32),
    )  # fmt: skip
    config = settings(minibatches=1)
    config.algo = GrpoConfig(std_eps=0.0)
    table: Any = Table()
    sgd = torch.optim.SGD(table.parameters(), lr=1.0)
    objective = PolicyGradient(config)
    trainer = Trainer(
        ALONE, objective, [Trained("policy", table, objective, sgd, lambda _: 1.0)], Activity(), budget=100
    )
    report = trainer.step(0, Batch(0, (group,)))
    step = 1 / (2 * math.sqrt(2))
    assert table.logits.tolist() == pytest.approx([-step, step])
    assert report.metrics["policy/grad_norm"] == pytest.approx(0.5)
    assert report.metrics["policy/entropy"] == pytest.approx(math.log(2))
    assert report.metrics["loss/policy"] == pytest.approx(0.0)
    assert report.metrics["mismatch/tokens"] == 2
    assert report.metrics["mismatch/abs_dlogp_max"] == 0


def scored(group: Group, *, axis: Axis = "step") -> Group:
    """Two answers of two tokens, 1 0 and 0 1, which the engine drew at p = ½; rewards 1 and 0. The first answer's two
    tokens are a step each, of scores 2 and 1, the second answer is one step of score −1.
    """
    return dataclasses.replace(
        group, lengths=np.full(2, 2, np.int32), tokens=np.array([1, 0, 0, 1], np.int32),
        logprobs=np.full(4, math.log(0.5), np.float32), versions=np.zeros(4, np.int32),
        rewards=np.array([1, 0], np.float32), step_ends=np.array([1, 2, 4], np.int32),
        channels={"prm": Channel(axis, np.array([2, 1, -1] if axis == "step" else [2, 1, 0, -1], np.float32))},
    )  # fmt: skip


@pytest.mark.parametrize("axis", ["step", "token"])
def test_one_update_on_step_and_token_scores_by_hand(axis: Axis, make_batch: MakeBatch) -> None:
    """Of the rewards A = ±½; of the scores, half of the sums to come: (3, 1, −1, −1)/2. Together (2, 1, −1, −1).

    As token scores 0 and −1 stand at the second answer's tokens: the sums to come are the same.
    ∇loss = −¼·Σ A·∇log p with u = ∇log p(1) = (−½, ½) = −∇log p(0): −¼·(2 − 1 + 1 − 1)·u = (1, −1)/8.
    Of Σ|A| by part, the scores have 3 of 3 + 2.
    """
    config = settings(minibatches=1)
    config.algo = GrpoConfig(std="none", process=ProcessConfig(channel="prm", weight=0.5, baseline="none"))
    table: Any = Table()
    objective = PolicyGradient(config)
    sgd = torch.optim.SGD(table.parameters(), lr=1.0)
    trained = [Trained("policy", table, objective, sgd, lambda _: 1.0)]
    trainer = Trainer(ALONE, objective, trained, Activity(), budget=100)
    report = trainer.step(0, Batch(0, (scored(make_batch(0, B=1, G=2).groups[0], axis=axis),)))
    assert table.logits.tolist() == pytest.approx([-1 / 8, 1 / 8])
    assert report.metrics["policy/process_share"] == pytest.approx(3 / 5)


def test_scores_find_their_tokens_in_every_group_of_a_batch(make_batch: MakeBatch) -> None:
    config = settings(minibatches=1)
    config.algo = GrpoConfig(std="none", process=ProcessConfig(channel="prm", baseline="none"))
    objective = PolicyGradient(config)
    groups = tuple(scored(group) for group in make_batch(0, B=2, G=2).groups)
    work = objective.prepare(0, Batch(0, groups))
    assert work.step_ends is not None
    assert work.step_ends.tolist() == [1, 2, 4, 5, 6, 8]
    advantages = objective.advance(work).advantages
    assert advantages is not None
    assert advantages.tolist() == [3.5, 1.5, -1.5, -1.5] * 2


def test_a_group_without_the_channel_of_the_algorithm_is_named(make_batch: MakeBatch) -> None:
    config = settings(minibatches=1)
    config.algo = GrpoConfig(process=ProcessConfig(channel="prm"))
    batch = make_batch(0, B=2, G=2)
    batch.groups[0].channels["prm"] = Channel("token", np.zeros(len(batch.groups[0].tokens), np.float32))
    with pytest.raises(ChannelError, match=r"algo.process.channel=prm: group 1 has no such channel .* none at all"):
        PolicyGradient(config).prepare(0, batch)
    batch.groups[1].channels["prm"] = Channel("sample", np.zeros(2, np.float32))
    with pytest.raises(ChannelError, match=r"group 1 has no such channel of axis step or token, but .*'prm': 'sample'"):
        PolicyGradient(config).prepare(0, batch)


def of_sizes(make_batch: MakeBatch, *sizes: int) -> Batch:
    """A batch whose groups have these numbers of samples."""
    made = [make_batch(0, B=1, G=G, seed=place).groups[0] for place, G in enumerate(sizes)]
    return Batch(0, tuple(dataclasses.replace(group, group=place) for place, group in enumerate(made)))


def test_groups_of_different_sizes_weigh_by_their_own_samples(make_batch: MakeBatch) -> None:
    """One sample of 2 tokens; three of 1, 2, 3 tokens with rewards 1, 0, 0: leave-one-out gives 0 | 1, −½, −½."""
    batch = of_sizes(make_batch, 1, 3)
    for group, lengths, rewards in zip(batch.groups, ([2], [1, 2, 3]), ([1.0], [1.0, 0, 0]), strict=True):
        T = sum(lengths)
        group.lengths, group.tokens = np.array(lengths, np.int32), np.zeros(T, np.int32)
        group.logprobs, group.versions = np.full(T, -1, np.float32), np.zeros(T, np.int32)
        group.rewards = np.array(rewards, np.float32)

    def weights(aggregation: Aggregation, minibatches: int) -> list[float]:
        config = settings(minibatches=minibatches)
        config.algo = GrpoConfig(aggregation=aggregation, advantage="rloo")
        objective = PolicyGradient(config)
        work = objective.advance(objective.prepare(0, batch))
        assert work.advantages is not None
        assert work.advantages.tolist() == [0, 0, 1, -0.5, -0.5, -0.5, -0.5, -0.5]
        return work.weights.tolist()

    assert weights("token_mean", 1) == pytest.approx([1 / 8] * 4)
    assert weights("token_mean", 2) == pytest.approx([1 / 2] + [1 / 6] * 3)
    assert weights("seq_mean_token_mean", 1) == pytest.approx([1 / 8, 1 / 4, 1 / 8, 1 / 12])
    assert weights("prompt_mean", 1) == pytest.approx([1 / 4] + [1 / 12] * 3)


def test_groups_of_different_sizes_train_whatever_the_cut(start_dir: Path, make_batch: MakeBatch) -> None:
    whole, cut = (trainer_of(settings(tokens_per_microbatch=n), start_dir) for n in (16_384, 40))
    batch = of_sizes(make_batch, 1, 5, 2, 3)
    before = parameters(whole)
    a, b = whole.step(0, batch).metrics, cut.step(0, batch).metrics
    assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert (parameters(whole) - before).abs().max() > 1e-5
    torch.testing.assert_close(parameters(whole), parameters(cut), rtol=0, atol=5e-5)  # Adam moves by 1e-3


def test_the_cut_into_microbatches_changes_nothing(start_dir: Path, make_batch: MakeBatch) -> None:
    whole = trainer_of(settings(), start_dir)
    cut = trainer_of(settings(tokens_per_microbatch=40), start_dir)
    for step in range(3):
        a, b = (t.step(step, make_batch(step)).metrics for t in (whole, cut))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    assert (parameters(whole) - parameters(cut)).abs().max() < 1e-5


def test_the_same_batches_give_the_same_bits(start_dir: Path, make_batch: MakeBatch) -> None:
    first, second = trainer_of(settings(), start_dir), trainer_of(settings(), start_dir)
    for step in range(2):
        assert first.step(step, make_batch(step)).metrics == second.step(step, make_batch(step)).metrics
    assert torch.equal(parameters(first), parameters(second))


@pytest.mark.parametrize(
    ("minibatches", "correction", "share"),
    [(1, TisConfig(), 0), (2, CorrectionConfig(), 0), (2, TisConfig(), 1 / 2), (4, TisConfig(), 3 / 4)],
)
def test_proximal_passes_only_where_they_are_needed(
    start_dir: Path, make_batch: MakeBatch, minibatches: int, correction: CorrectionConfig, share: float
) -> None:
    config = settings(minibatches=minibatches)
    config.correction = correction
    trainer, batch = trainer_of(config, start_dir), make_batch(0)
    trainer.step(0, batch)
    compute = trainer.activity.snapshot().compute
    later = batch.groups[len(batch.groups) - round(share * 4) :] if share else ()
    inputs = [(len(g.prompt_tokens), [int(n) - 1 for n in g.lengths]) for g in later]  # a prompt stands once
    tokens = sum(prompt + sum(own) for prompt, own in inputs)
    heads = sum(int(g.lengths.sum()) for g in later)
    seen = sum(p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in own) for p, own in inputs)
    cost = trainer.module.cost
    assert compute.get("prox_flops", 0.0) == tokens * cost.body + heads * cost.head + seen * cost.attention
    assert compute.get("scored_tokens", 0.0) == heads
    assert compute["trained_tokens"] == sum(len(g.tokens) for g in batch.groups)


def test_proximal_is_the_policy_before_the_first_update(start_dir: Path, make_batch: MakeBatch) -> None:
    """With behaviour = θ, w = 1 in both updates, however far the first moves θ. Were prox taken later, it would not."""
    config = settings()
    config.learner.optim = OptimConfig(lr=0.05)
    trainer = trainer_of(config, start_dir)
    metrics = trainer.step(0, on_policy(make_batch(0), trainer.module)).metrics
    assert metrics["offpolicy/abs_dlogp_max"] < 1e-5
    assert metrics["mismatch/k3"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/ratio_max"] > 1.01


def test_mismatch_counts_groups_of_the_current_version_only(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer = trainer_of(settings(), start_dir)
    batch = on_policy(make_batch(3, versions=3), trainer.module)
    batch.groups[1].versions[0] = 2
    batch.groups[2].logprobs[:] -= np.float32(0.5)
    metrics = trainer.step(3, batch).metrics
    kept = [len(batch.groups[i].tokens) for i in (0, 2, 3)]
    assert metrics["mismatch/tokens"] == sum(kept)
    assert metrics["mismatch/abs_dlogp_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["mismatch/abs_dlogp_mean"] == pytest.approx(0.5 * kept[1] / sum(kept), abs=1e-5)
    # k3 of a log ratio of ½: e^½ − 1 − ½
    assert metrics["mismatch/k3"] == pytest.approx((math.exp(0.5) - 1.5) * kept[1] / sum(kept), abs=1e-4)


@pytest.mark.parametrize("version", [2, 6])
def test_a_forbidden_token_stops_the_step(start_dir: Path, make_batch: MakeBatch, version: int) -> None:
    trainer, batch = trainer_of(settings(), start_dir), make_batch(5)
    batch.groups[2].versions[3:] = version
    before = parameters(trainer)
    with pytest.raises(
        StalenessError, match=rf"step 5: group 22 holds tokens of versions .*{version}.* 3…5 only \(I2\)"
    ):
        trainer.step(5, batch)
    assert torch.equal(before, parameters(trainer))


def test_what_is_not_finite_stops_the_run_and_names_its_group(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer, batch = trainer_of(settings(), start_dir), make_batch(0)
    batch.groups[1].tokens[:] = 60
    for group in (batch.groups[0], *batch.groups[2:]):
        group.tokens[:] = np.minimum(group.tokens, 59)
    with torch.no_grad():
        # tied head: every softmax would see it, so only the input of group 1 is poisoned
        trainer.module.model.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: output.masked_fill((inputs[0] == 60).unsqueeze(-1), math.nan)
        )
    before = parameters(trainer)
    with pytest.raises(
        DivergedError, match=r"step 0, update 1 of 2: the policy's loss is nan on groups \[1\]; no version"
    ):
        trainer.step(0, batch)
    assert torch.equal(before, parameters(trainer))
    assert trainer.main.updates == 0


def test_kl_to_the_reference_is_zero_at_the_start_and_grows(start_dir: Path, make_batch: MakeBatch) -> None:
    config = settings()
    config.algo = GrpoConfig(kl="k3", kl_coef=0.01)
    trainer = trainer_of(config, start_dir, reference=Policy(load_model(start_dir)).requires_grad_(False))
    first, second = (trainer.step(step, make_batch(step)).metrics for step in (0, 1))
    # the first update of the first step is at the reference; the second has moved by one
    assert 0 <= first["policy/kl_ref"] < second["policy/kl_ref"]
    assert first["policy/kl_ref"] < 1e-3


def test_gradients_are_clipped_to_the_norm(start_dir: Path, make_batch: MakeBatch) -> None:
    config = settings(minibatches=1)
    trainer = trainer_of(config, start_dir)
    trainer.main.grad_clip = 1e-4
    seen: list[float] = []
    trainer.main.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.cat([p.grad.flatten() for p in trainer.main.parameters if p.grad is not None]).norm())
        )
    )
    report = trainer.step(0, make_batch(0))
    assert seen == [pytest.approx(1e-4, rel=1e-3)]
    assert report.metrics["policy/grad_norm"] > 1e-3  # as it was before


def test_gradients_lie_in_one_block_with_the_same_bits() -> None:
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3, 5), [nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(2, 2)]
    together = copy.deepcopy(plain)
    parameters = [p for layer in together for p in layer.parameters()]
    block = GradientBlock(parameters)
    for _ in range(2):
        for layers in (plain, together):
            for micro in x:
                layers[1](layers[0](micro).tanh()).square().sum().backward()
        found = [p.grad for p in parameters]
        assert [g is None for g in found] == [False] * 4 + [True] * 2
        kept = [g for g in found if g is not None]
        assert len({g.untyped_storage().data_ptr() for g in kept}) == 1
        wanted = [p.grad for layer in plain[:2] for p in layer.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))  # type: ignore[arg-type]
        for layer in plain + together:
            layer.zero_grad()
        block.release()


def test_schedules_by_hand() -> None:
    lr = warmup(OptimConfig(lr=1.0, warmup_updates=4))
    assert [lr(u) for u in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert warmup(OptimConfig(lr=0.5))(0) == 0.5
    # 2 updates of warm-up, then half a cosine over 4 intervals down to .1
    lr = cosine(SftConfig(steps=7, lr=1.0, warmup_steps=2, final_lr_share=0.1))
    assert [lr(u) for u in (0, 1, 2, 4, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_what_a_batch_tells_by_itself(make_batch: MakeBatch) -> None:
    batch = make_batch(4, B=2, G=2, versions=4)
    for group, lengths, versions, rewards in zip(
        batch.groups, ([1, 2], [3, 2]), ([4, 4, 4], [2, 3, 3, 4, 4]), ([1.0, 0.0], [1.0, 1.0]), strict=True
    ):
        group.lengths, group.versions = np.array(lengths, np.int32), np.array(versions, np.int32)
        group.tokens, group.logprobs = group.versions, np.zeros(len(versions), np.float32)
        group.rewards = np.array(rewards, np.float32)
        group.components = {"accuracy": group.rewards}
        group.queued_version = 4
    batch.groups[1].finish[0] = 1
    batch.groups[1].queued_version = 3
    batch.groups[1].versions[3:] = 3
    metrics = batch_metrics(batch, RewardConfig(), 4)  # tokens 4 4 4, 2 3 3 3 3
    assert metrics["length/beyond_tokenizer_share"] == pytest.approx(3 / 8)
    assert batch_metrics(batch, RewardConfig(), 5)["length/beyond_tokenizer_share"] == 0
    assert {name for name in metrics if name.startswith("staleness/")} == {"staleness/mixed_sample_share"}
    assert staleness(batch).tolist() == [0, 0, 0, 2, 1, 1, 1, 1]
    assert staleness_in_flight(batch).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert metrics["staleness/mixed_sample_share"] == pytest.approx(1 / 4)
    assert metrics["reward/accuracy"] == pytest.approx(3 / 4)
    assert metrics["reward/zero_variance_share"] == 0.5
    assert metrics["length/mean"] == 2
    assert metrics["length/truncated_share"] == 0.25


def test_what_scores_and_steps_tell_by_themselves(make_batch: MakeBatch) -> None:
    batch = Batch(0, tuple(scored(group) for group in make_batch(0, B=2, G=2).groups))
    batch.groups[0].channels["value"] = batch.groups[0].channels["prm"]  # the other group has none
    for group in batch.groups:
        group.channels["leaf"] = Channel("sample", np.zeros(2, np.int32))
        group.channels["visits"] = Channel("node", np.ones(5, np.float32))
    metrics = batch_metrics(batch, RewardConfig(), 50)
    # scores 2, 1, −1 in each group; three steps for two samples
    assert {name: value for name, value in metrics.items() if name.startswith("channel/")} == {
        "channel/prm": pytest.approx(2 / 3)
    }
    assert metrics["length/steps"] == 1.5
    assert "length/steps" not in batch_metrics(make_batch(0), RewardConfig(), 50)


def test_a_histogram_is_made_of_values() -> None:
    assert set(histogram(np.array([3, 1, 1, 2]))) == {1.0, 2.0, 3.0}
    assert histogram(np.array([3, 1, 1, 2])).count(1.0) == 100
    assert histogram(np.array([])) == []


def test_sample_texts_show_the_best_and_the_worst(make_batch: MakeBatch) -> None:
    batch = make_batch(0, B=2, G=3)
    batch.groups[0].rewards = np.array([0.0, 1.0, 0.5], np.float32)
    text = sample_texts(batch, lambda tokens: f"<{len(tokens)} tokens>", 1)["samples"]
    assert text.count("prompt") == 1
    assert "+1.00" in text
    assert "+0.00" in text
    assert "+0.50" not in text
    assert sample_texts(batch, str, 0) == {}

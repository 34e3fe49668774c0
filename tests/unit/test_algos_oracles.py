"""The same loss from independent code: trl 1.16.0 and liger-kernel 0.8.5, value and gradient.

Where they differ by design: TRL's entropy bonus is a mean over tokens whatever the loss type (compared under
token_mean); `luspo` is a sum over each sample, which is seq_mean_token_sum_norm with a constant of 1.
"""

from __future__ import annotations

import collections
import importlib
from types import SimpleNamespace

import pytest
import torch

from offtrail.algos.advantages import overlong_penalty
from offtrail.algos.aggregation import sample_weights
from offtrail.algos.config import CispoConfig, GrpoConfig, GspoConfig, SapoConfig
from offtrail.algos.correction_config import CorrectionConfig, SeqMaskConfig, TisConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.platform.model.head import Head, token_logprobs

B, T, V, H = 6, 9, 37, 12
NONE = CorrectionConfig()


@pytest.fixture(scope="module")
def trl():
    return importlib.import_module("trl.trainer.grpo_trainer")


@pytest.fixture(scope="module")
def liger():
    reason = "liger-kernel is installed by `make test`, without its dependency triton"
    return pytest.importorskip("liger_kernel.chunked_loss", reason=reason)


class Case:
    """Padded samples [B, T] as the oracles want them, and the same flat."""

    def __init__(self, seed=0, spread=0.4):
        g = torch.Generator().manual_seed(seed)

        def draw(scale):
            return torch.randn(B, T, generator=g, dtype=torch.float64) * scale

        self.lengths = torch.tensor([T, 1, 4, 7, 2, 5])
        self.mask = (torch.arange(T) < self.lengths[:, None]).long()
        self.logps = (-draw(1.0).abs() - 0.05).requires_grad_()
        self.old = self.logps.detach() + draw(spread)
        self.beh = self.old + draw(spread)
        self.ref = self.logps.detach() + draw(spread)
        self.entropy = draw(1.0).abs().requires_grad_()
        self.advantages = torch.randn(B, generator=g, dtype=torch.float64)

    def flat(self, values):
        return values[self.mask.bool()]

    def ours(self, algo, correction=NONE, *, behaviour, prox=None, max_length=20):
        weights = sample_weights(algo.aggregation, self.lengths, torch.arange(B) // 3, max_length=max_length)
        sample = torch.arange(B).repeat_interleave(self.lengths)
        inputs = LossInput(
            logprobs=self.flat(self.logps),
            behaviour_logprobs=self.flat(behaviour),
            prox_logprobs=None if prox is None else self.flat(prox),
            advantages=self.advantages[sample],
            token_weights=weights[sample],
            sample_index=sample,
            ref_logprobs=self.flat(self.ref),
            entropy=self.flat(self.entropy),
        )
        return policy_loss(inputs, algo, correction)[0]


def trl_loss(trl, case, loss_type, *, level="token", low=0.2, high=0.2, delta=None, beta=0.0, weighted_kl=False,
             threshold=None, weights=None, entropy_coef=0.0):  # fmt: skip
    """GRPOTrainer._compute_loss on a stand-in for the trainer."""
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (case.logps, case.entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=threshold,
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=weighted_kl,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=20,
        accelerator=accelerator,
        _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": collections.defaultdict(list)},
    )
    ids = torch.zeros(B, T, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": ids,
        "completion_mask": case.mask,
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "num_items_in_batch": case.mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def assert_same(case, ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    leaves = (case.logps, case.entropy)
    mine, other = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert mine[0].abs().max() > 1e-3


GRPO = {"grpo": "seq_mean_token_mean", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "seq_mean_token_sum_norm"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss_type", GRPO)
def test_clipped(trl, loss_type, seed):
    case = Case(seed)
    ours = case.ours(GrpoConfig(clip_high=0.28, aggregation=GRPO[loss_type]), behaviour=case.old)
    assert_same(case, ours, trl_loss(trl, case, loss_type, high=0.28))


def test_dual_clip(trl):
    case = Case(spread=1.0)
    ours = case.ours(GrpoConfig(dual_clip=2.0), behaviour=case.old)
    assert_same(case, ours, trl_loss(trl, case, "bnpo", delta=2.0))


def test_gspo(trl):
    case = Case(spread=0.05)
    ours = case.ours(GspoConfig(clip_low=0.02, clip_high=0.03), behaviour=case.old)
    assert_same(case, ours, trl_loss(trl, case, "grpo", level="sequence", low=0.02, high=0.03))


def test_luspo(trl):
    case = Case(spread=0.05)
    algo = GspoConfig(clip_low=0.02, clip_high=0.03, aggregation="seq_mean_token_sum_norm")
    ours = case.ours(algo, behaviour=case.old, max_length=1)
    assert_same(case, ours, trl_loss(trl, case, "luspo", level="sequence", low=0.02, high=0.03))


def test_cispo(trl):
    case = Case(spread=1.0)
    assert_same(case, case.ours(CispoConfig(clip_high=2.0), behaviour=case.old), trl_loss(trl, case, "cispo", high=2.0))


def test_sapo(trl):
    case = Case(spread=1.0)
    assert_same(case, case.ours(SapoConfig(), behaviour=case.old), trl_loss(trl, case, "sapo"))


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_in_the_loss(trl, weighted):
    case = Case()
    algo = GrpoConfig(kl="k3_weighted" if weighted else "k3", kl_coef=0.3)
    ours = case.ours(algo, behaviour=case.old)
    assert_same(case, ours, trl_loss(trl, case, "bnpo", beta=0.3, weighted_kl=weighted))


def test_truncated_importance_weights_do_not_touch_the_kl(trl):
    case = Case(spread=0.7)
    weights = (case.old - case.beh).exp().clamp(max=1.5)
    ours = case.ours(GrpoConfig(kl="k3", kl_coef=0.3), TisConfig(cap=1.5), behaviour=case.beh, prox=case.old)
    assert_same(case, ours, trl_loss(trl, case, "bnpo", beta=0.3, weights=weights))


def test_off_policy_sequence_mask(trl):
    case = Case(spread=0.7)
    case.advantages = -case.advantages.abs()
    ours = case.ours(GrpoConfig(), SeqMaskConfig(limit=0.05), behaviour=case.old)
    plain = case.ours(GrpoConfig(), behaviour=case.old)
    assert ours.item() != plain.item()
    assert_same(case, ours, trl_loss(trl, case, "bnpo", threshold=0.05))


def test_entropy_bonus(trl):
    case = Case()
    ours = case.ours(GrpoConfig(entropy_coef=0.02), behaviour=case.old)
    assert_same(case, ours, trl_loss(trl, case, "bnpo", entropy_coef=0.02))


def test_log_softmax_and_entropy_of_the_head():
    utils = importlib.import_module("trl.trainer.utils")
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(50, H, generator=g), torch.randn(V, H, generator=g)
    targets = torch.randint(V, (50,), generator=g)
    logits = hidden @ weight.T
    logprobs, entropy, _ = token_logprobs(hidden, Head(weight), targets)
    theirs = utils.selective_log_softmax(logits, targets)
    torch.testing.assert_close(logprobs, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("longest", "buffer"), [(100, 20), (64, 13), (20480, 4096)])
def test_overlong_punishment(longest, buffer):
    rewards = importlib.import_module("trl.rewards")
    punish = rewards.get_soft_overlong_punishment(max_completion_len=longest, soft_punish_cache=buffer)
    lengths = [1, longest - buffer, longest - buffer + 1, longest - 1, longest, longest + 1]
    theirs = punish(completion_ids=[[0] * n for n in lengths])
    ours = overlong_penalty(torch.tensor(lengths), max_length=longest, buffer=buffer).tolist()
    assert ours == pytest.approx(theirs, abs=1e-6)


# Liger: from hidden states, so the head is in it


LIGER = [
    ("grpo", GrpoConfig(aggregation="seq_mean_token_mean"), {}),
    ("bnpo", GrpoConfig(), {}),
    ("dapo", GrpoConfig(clip_high=0.28), {"epsilon_high": 0.28}),
    ("dr_grpo", GrpoConfig(aggregation="seq_mean_token_sum_norm"), {"max_completion_length": 20}),
    ("bnpo", GrpoConfig(dual_clip=1.5), {"delta": 1.5}),
    ("cispo", CispoConfig(clip_high=1.5), {"epsilon_high": 1.5}),
    ("sapo", SapoConfig(), {}),
    ("grpo", GspoConfig(clip_low=0.1, clip_high=0.1),
     {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "algo", "settings"), LIGER, ids=[f"{t}-{a.name}" for t, a, _ in LIGER])
def test_liger(liger, loss_type, algo, settings, beta):
    g = torch.Generator().manual_seed(9)
    case = Case()
    x = torch.randn(B, T, H, generator=g).requires_grad_()
    W = torch.randn(V, H, generator=g).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    with torch.no_grad():
        here = (x @ W.T).log_softmax(-1).gather(2, ids[..., None])[..., 0]
        old, ref = (here + 0.3 * torch.randn(B, T, generator=g) for _ in range(2))
    advantages = case.advantages.float()
    fused = liger.LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=beta > 0, loss_type=loss_type, **settings
    )
    theirs = fused(x, W, ids, case.mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old)[0]
    their_grads = torch.autograd.grad(theirs, (x, W))

    kept = case.mask.bool()
    logprobs = token_logprobs(x[kept], Head(W), ids[kept]).logprobs
    sample = torch.arange(B).repeat_interleave(case.lengths)
    weights = sample_weights(algo.aggregation, case.lengths, torch.arange(B), max_length=20)
    algo.kl, algo.kl_coef = ("k3", beta) if beta else ("none", 0.0)
    ours, _ = policy_loss(
        LossInput(logprobs, old[kept], advantages[sample], weights[sample], sample, ref_logprobs=ref[kept]), algo, NONE
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=5e-7)
    for mine, other in zip(torch.autograd.grad(ours, (x, W)), their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-7)

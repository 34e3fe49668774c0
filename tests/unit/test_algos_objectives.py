"""Objectives: each degenerate case of each paper with its number, and what all of them have in common."""

import dataclasses
import math

import pytest
import torch

from offtrail.algos.config import (
    ALGOS,
    AipoConfig,
    AspoConfig,
    BapoConfig,
    CispoConfig,
    DppoConfig,
    GrpoConfig,
    GspoConfig,
    OpmdConfig,
    ReinforceConfig,
    SapoConfig,
    ToprConfig,
)
from offtrail.algos.correction_config import CorrectionConfig, DecoupledConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.objectives import OBJECTIVES, Tokens
from offtrail.algos.samples import Samples
from offtrail.algos.update import Prepared

NONE, DECOUPLED = CorrectionConfig(), DecoupledConfig()
LN2 = math.log(2)


def tokens(log_ratios, advantages, samples=None, *, lp=None, bounds=None):
    """Tokens whose ratio to the anchor and to the behaviour policy is exp(log_ratios)."""
    theta = torch.tensor(lp or [-3.0] * len(log_ratios), dtype=torch.float64, requires_grad=True)
    anchor = theta.detach() - torch.tensor(log_ratios, dtype=torch.float64)
    A = torch.tensor(advantages, dtype=torch.float64)
    index = torch.tensor(samples or list(range(len(log_ratios))))
    return Tokens(theta, anchor, anchor, A, Samples.of(index), bounds)


def slopes(x, algo):
    """(losses, their gradient to each log-probability)."""
    surrogate = OBJECTIVES[type(algo)](x, algo)
    grad = torch.autograd.grad(surrogate.loss.sum(), x.logprobs)[0]
    return surrogate.loss.tolist(), grad.tolist()


@pytest.mark.parametrize("name", ALGOS)
def test_where_nothing_moved_every_objective_is_reinforce(name):
    A = [1.5, -0.5, 0.0, -2.0]
    _, grad = slopes(tokens([0.0] * 4, A, samples=[0, 0, 1, 1]), ALGOS[name]())
    expected = [-a for a in A]
    if name == "gspo":  # the mean ratio of a sample of two gives each token half of both
        expected = [-(A[0] + A[1]) / 2] * 2 + [-(A[2] + A[3]) / 2] * 2
    assert grad == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ALGOS)
def test_far_ratios_stay_finite(name):
    losses, grad = slopes(tokens([90.0, -90.0, 90.0, -90.0], [1.0, 1.0, -1.0, -1.0]), ALGOS[name]())
    assert all(map(math.isfinite, losses + grad))


@pytest.mark.parametrize("name", ALGOS)
def test_no_advantage_no_policy_gradient(name):
    algo = ALGOS[name]()
    for penalty in ("tau", "penalty"):
        if hasattr(algo, penalty):
            setattr(algo, penalty, 0.0)
    assert slopes(tokens([0.3, -0.7], [0.0, 0.0]), algo)[1] == [0.0, 0.0]


# PPO's clip


def test_asymmetric_clip():
    # ratios 1.25 and 1.3 with A = 1: DAPO's upper bound 1.28 lies between them
    x = tokens([math.log(1.25), math.log(1.3)], [1.0, 1.0])
    losses, grad = slopes(x, GrpoConfig(clip_high=0.28))
    assert losses == pytest.approx([-1.25, -1.28])
    assert grad == pytest.approx([-1.25, 0.0])


def test_epsilon_ten_never_clips_a_negative_advantage():
    x = tokens([math.log(0.01), math.log(500), math.log(12)], [-1.0, -1.0, 1.0])
    assert slopes(x, GrpoConfig(clip_low=1.0, clip_high=10.0))[1] == pytest.approx([0.01, 500, 0.0])


def test_dual_clip():
    # A = −1: −min(rA, clip(r)A) is r = 2 and 4; with c = 3 the second is 3 and flat; A = 1 keeps PPO's clip
    x = tokens([LN2, math.log(4), math.log(4)], [-1.0, -1.0, 1.0])
    losses, grad = slopes(x, GrpoConfig(dual_clip=3.0))
    assert losses == pytest.approx([2, 3, -1.2])
    assert grad == pytest.approx([2, 0, 0])
    surrogate = OBJECTIVES[GrpoConfig](x, GrpoConfig(dual_clip=3.0))
    assert surrogate.clipped_low.tolist() == [False, True, False]


# GSPO


def test_gspo_of_one_token_is_token_ppo():
    x = tokens([0.1, -0.3, 0.05, 2.0], [1.0, -1.0, -1.0, 1.0])
    assert slopes(x, GspoConfig(clip_low=0.2, clip_high=0.2)) == slopes(x, GrpoConfig())


@pytest.mark.parametrize("length", [1, 2, 50])
def test_a_constant_log_ratio_is_length_invariant(length):
    x = tokens([1e-4] * length, [1.0] * length, samples=[0] * length)
    losses, grad = slopes(x, GspoConfig())
    assert losses == pytest.approx([-math.exp(1e-4)] * length)
    assert sum(grad) == pytest.approx(-length * math.exp(1e-4))


def test_gspo_by_hand():
    # log r = ln 4 and 0: s = exp(ln 2) = 2. Unclipped with A = −1: loss 2, and ∂/∂lp_t Σ_t s = s for each of the two
    x = tokens([2 * LN2, 0.0], [-1.0, -1.0], samples=[7, 7])
    assert slopes(x, GspoConfig()) == (pytest.approx([2.0, 2.0]), pytest.approx([2.0, 2.0]))
    # A = 1: clipped at 1 + 4e-4, no gradient
    x = tokens([2 * LN2, 0.0], [1.0, 1.0], samples=[7, 7])
    assert slopes(x, GspoConfig()) == (pytest.approx([-1.0004] * 2), [0.0, 0.0])


def record(dtype=torch.float64):
    g = torch.Generator().manual_seed(5)

    def draw(scale=0.3):
        return torch.randn(24, generator=g, dtype=torch.float64) * scale

    theta = -draw(1.0).abs() - 0.1
    index = torch.arange(24) // 4
    return LossInput(
        logprobs=theta.to(dtype).requires_grad_(),
        behaviour_logprobs=theta + draw(),
        advantages=torch.randn(6, generator=g, dtype=torch.float64)[index],
        token_weights=torch.full((24,), 1 / 24, dtype=torch.float64),
        sample_index=index,
        prox_logprobs=theta + draw(),
        staleness=index,
    )


def test_unclipped_decoupled_gspo_is_independent_of_prox():
    x = record()
    unclipped = GspoConfig(clip_low=1.0, clip_high=1e9)
    s = Samples.of(x.sample_index)
    rho = s.each(s.mean(x.logprobs.detach() - x.behaviour_logprobs)).exp()
    for shift in (0.0, 0.4, -1.0):
        moved = dataclasses.replace(x, prox_logprobs=x.prox_logprobs + shift * torch.arange(24) / 24)
        loss = policy_loss(moved, unclipped, DECOUPLED)[0].item()
        assert loss == pytest.approx(-(rho * x.advantages).mean().item(), abs=1e-12)


# CISPO


def test_cispo_keeps_a_gradient_beyond_its_absolute_cap():
    x = tokens([math.log(3), math.log(8), math.log(0.1)], [1.0, 1.0, -2.0], lp=[-1.0, -2.0, -3.0])
    losses, grad = slopes(x, CispoConfig(clip_high=4))
    # −min(r, 4)·A·lp: the cap is 4 itself, not 1 + 4
    assert losses == pytest.approx([3, 8, -0.6])
    assert grad == pytest.approx([-3, -4, 0.2])
    assert slopes(x, CispoConfig(clip_low=0.5, clip_high=4))[1] == pytest.approx([-3, -4, 1.0])


# SAPO


def test_sapo_by_hand():
    # A = 1, τ = 1, r = 2: 4σ(1) = 4·.7310586; slope 4σ(1)(1 − σ(1))·r = 4·.1966119·2
    x = tokens([LN2], [1.0])
    assert slopes(x, SapoConfig()) == (pytest.approx([-2.9242343]), pytest.approx([-1.5728954]))
    # A = −1, τ = 1.05, r = 2: slope 4σ(1.05)(1 − σ(1.05))·2, σ(1.05) = .7407749
    s = 1 / (1 + math.exp(-1.05))
    assert slopes(tokens([LN2], [-1.0]), SapoConfig())[1] == pytest.approx([8 * s * (1 - s)])


# TOPR, AIPO


def test_topr_tapers_negative_samples_only():
    # sample ratios: (2·¼) = ½ and 2·2 = 4; A = 1: weight 1 whatever the ratio; A = −1: ½ and 1 (the cap)
    log_ratios, index = [LN2, -2 * LN2, LN2, LN2], [0, 0, 1, 1]
    assert slopes(tokens(log_ratios, [1.0] * 4, index), ToprConfig())[1] == pytest.approx([-1] * 4)
    x = tokens(log_ratios, [-1.0] * 4, index)
    assert slopes(x, ToprConfig())[1] == pytest.approx([0.5, 0.5, 1, 1])


def test_aipo_truncates_and_without_a_cap_is_importance_sampling():
    x = tokens([LN2, math.log(8)], [1.0, -1.0])
    assert slopes(x, AipoConfig(cap=4))[1] == pytest.approx([-2, 4])
    assert slopes(x, AipoConfig(cap=math.inf))[1] == pytest.approx([-2, 8])


# ASPO


def test_aspo_turns_the_ratio_over():
    # A > 0: r = ½ → 2, r = .1 → 3 (cap), r = 1.1 → 1/1.1, r = 1.3 → above 1 + ε: nothing
    x = tokens([-LN2, math.log(0.1), math.log(1.1), math.log(1.3)], [1.0] * 4)
    assert slopes(x, AspoConfig())[1] == pytest.approx([-2, -3, -1 / 1.1, 0])
    # A < 0: PPO's dual clip: r = ½ clipped, r = 2 kept, r = 4 beyond 3
    x = tokens([-LN2, LN2, math.log(4)], [-1.0] * 3)
    assert slopes(x, AspoConfig())[1] == pytest.approx([0, 2, 0])


# BAPO


def test_bapo_clips_at_the_bounds_of_the_update():
    x = tokens([math.log(0.7), math.log(2)], [-1.0, 1.0])
    assert slopes(x, BapoConfig())[1] == pytest.approx([0.7, 0])  # [.6, 1.2], where it starts
    moved = tokens([math.log(0.7), math.log(2)], [-1.0, 1.0], bounds=(0.9, 3.0))
    assert slopes(moved, BapoConfig())[1] == pytest.approx([0, -2])


def test_bapo_has_the_dual_clip_of_its_authors_code():
    # A < 0: r = 2 kept, r = 4 beyond 3, so −min(…) is 3 and flat
    x = tokens([LN2, math.log(4)], [-1.0, -1.0], bounds=(0.9, 3.0))
    losses, grad = slopes(x, BapoConfig())
    assert (losses, grad) == (pytest.approx([2, 3]), pytest.approx([2, 0]))
    assert slopes(x, BapoConfig(dual_clip=0))[1] == pytest.approx([2, 4])


# Kimi's OPMD


def test_opmd_without_tau_is_reinforce():
    x = tokens([LN2, -0.7], [1.0, -2.0])
    assert slopes(x, OpmdConfig(tau=0.0)) == slopes(x, ReinforceConfig())


def test_opmd_pulls_to_the_behaviour_policy():
    # ∇ (τ/2)d² = τ·d per token; of the whole answer: d = .3 + .1, spread over two tokens: τ·.4 at each
    x = tokens([0.3, 0.1], [0.0, 0.0], samples=[0, 0])
    assert slopes(x, OpmdConfig(tau=0.5))[1] == pytest.approx([0.15, 0.05])
    losses, grad = slopes(x, OpmdConfig(tau=0.5, square_of="sequence"))
    assert grad == pytest.approx([0.2, 0.2])
    assert sum(losses) == pytest.approx(0.25 * 0.16)


# DPPO


def test_dppo_masks_by_probability_not_by_ratio():
    # p from .1 to .4: +.3 > .2; from .01 to .04: the same ratio, +.03; from .5 to .25: −.25
    x = tokens([math.log(4), math.log(4), -LN2], [1.0, 1.0, -1.0], lp=[math.log(0.4), math.log(0.04), math.log(0.25)])
    algo = DppoConfig(penalty=0.0)
    assert slopes(x, algo)[1] == pytest.approx([0, -4, 0])
    assert OBJECTIVES[DppoConfig](x, algo).masked.tolist() == [True, False, True]
    # the same moves with the other sign of A stay
    turned = dataclasses.replace(x, advantages=-x.advantages)
    assert slopes(turned, algo)[1] == pytest.approx([4, 4, -0.5])
    # the penalty acts on masked tokens too: 2·penalty·log ρ
    assert slopes(x, DppoConfig(penalty=0.5))[1] == pytest.approx([math.log(4), math.log(4) - 4, -LN2])


# All together


PAIRS = [(name, "none" if ALGOS[name].off_policy else "decoupled") for name in ALGOS]


@pytest.mark.parametrize(("name", "correction"), PAIRS)
def test_any_cut_of_the_samples_adds_up(name, correction):
    x, algo = record(), ALGOS[name]()
    rule = NONE if correction == "none" else DECOUPLED
    prepared = Prepared(bounds=(0.8, 1.5)) if name == "bapo" else Prepared()
    whole, metrics = policy_loss(x, algo, rule, prepared)
    merged, total = None, 0.0
    for part in (x.sample_index < 2, (x.sample_index == 3) | (x.sample_index == 2), x.sample_index > 3):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        piece = LossInput(**{k: None if v is None else v[part] for k, v in fields.items()})
        loss, sums = policy_loss(piece, algo, rule, prepared)
        total, merged = total + loss, sums if merged is None else merged + sums
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    assert merged.means() == pytest.approx(metrics.means(), rel=1e-12, abs=1e-15)
    whole_grad = torch.autograd.grad(whole, x.logprobs)[0]
    torch.testing.assert_close(torch.autograd.grad(total, x.logprobs)[0], whole_grad, rtol=1e-12, atol=1e-15)


DETACHED = ("cispo", "topr", "aipo", "aspo", "dppo")
"""A weight or mask that follows θ is held fixed: the loss is not the function that is differentiated."""


@pytest.mark.parametrize(("name", "correction"), [pair for pair in PAIRS if pair[0] not in DETACHED])
def test_gradients_are_the_numerical_ones_where_nothing_is_detached(name, correction):
    x, algo = record(), ALGOS[name]()
    rule = NONE if correction == "none" else DECOUPLED

    def loss(lp):
        return policy_loss(dataclasses.replace(x, logprobs=lp), algo, rule)[0]

    assert torch.autograd.gradcheck(loss, (x.logprobs,), eps=1e-7, atol=1e-6)


def test_entropy_bonus_and_exact_kl_stand_beside_the_weight():
    x = record()
    entropy = torch.rand(24, dtype=torch.float64, requires_grad=True)
    kl = torch.rand(24, dtype=torch.float64, requires_grad=True)
    both = dataclasses.replace(x, entropy=entropy, full_kl=kl)
    algo = GrpoConfig(entropy_coef=0.01, kl="full", kl_coef=0.5)
    loss, metrics = policy_loss(both, algo, DECOUPLED)
    plain = policy_loss(x, GrpoConfig(), DECOUPLED)[0]
    expected = plain + 0.5 * kl.mean() - 0.01 * entropy.mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    d_entropy, d_kl = torch.autograd.grad(loss, (entropy, kl))
    torch.testing.assert_close(d_entropy, torch.full((24,), -0.01 / 24, dtype=torch.float64))
    torch.testing.assert_close(d_kl, torch.full((24,), 0.5 / 24, dtype=torch.float64))
    named = metrics.means()
    assert named["loss/entropy"] == pytest.approx(-0.01 * entropy.mean().item())
    assert named["loss/kl"] == pytest.approx(0.5 * kl.mean().item())
    with pytest.raises(ValueError, match="entropy with a gradient"):
        policy_loss(dataclasses.replace(both, entropy=entropy.detach()), algo, DECOUPLED)
    with pytest.raises(ValueError, match="needs full_kl"):
        policy_loss(dataclasses.replace(both, full_kl=None), algo, DECOUPLED)


def test_a_kl_in_the_reward_is_not_in_the_loss():
    x = dataclasses.replace(record(), ref_logprobs=torch.full((24,), -1.0, dtype=torch.float64))
    algo = GrpoConfig(kl="k1", kl_coef=0.5, kl_in="reward")
    assert policy_loss(x, algo, DECOUPLED)[0] == policy_loss(x, GrpoConfig(), DECOUPLED)[0]

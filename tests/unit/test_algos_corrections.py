"""Corrections: w ≡ 1 changes nothing, no cap is the raw weight, and each rule's numbers by hand."""

import dataclasses
import math

import pytest
import torch

from offtrail.algos.config import ALGOS, BapoConfig, GrpoConfig, GspoConfig, PpoConfig, ReinforceConfig
from offtrail.algos.correction_config import (
    CORRECTIONS,
    A3poConfig,
    CorrectionConfig,
    DecoupledConfig,
    GeoConfig,
    IcepopConfig,
    K3FilterConfig,
    M2poConfig,
    SeqMaskConfig,
    SeqTisConfig,
    TisConfig,
    UncorrectedConfig,
    VcpoConfig,
    VetoConfig,
)
from offtrail.algos.corrections import correct, interpolated_prox
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.metrics import SUMS
from offtrail.algos.pairs import incompatible, needs_whole_update
from offtrail.algos.samples import Samples
from offtrail.algos.update import Prepared, bapo_bounds, m2po_keep, prepare_update, score_norms, vcpo_lr_scale

LN2 = math.log(2)
WIDE = GrpoConfig(clip_low=1.0, clip_high=1e9)


def apply(config, log_w, samples=None, *, advantages=None, theta=None, staleness=None, level="token"):
    beh = torch.full((len(log_w),), -2.0, dtype=torch.float64)
    prox = beh + torch.tensor(log_w, dtype=torch.float64)
    A = torch.tensor(advantages or [1.0] * len(log_w))
    lp = prox if theta is None else beh + torch.tensor(theta, dtype=torch.float64)
    index = Samples.of(torch.tensor(samples or [0] * len(log_w)))
    return correct(config, lp, prox, beh, A, index, staleness=staleness, level=level)


def record(**changes):
    g = torch.Generator().manual_seed(11)

    def draw(scale=0.3):
        return torch.randn(24, generator=g, dtype=torch.float64) * scale

    theta = -draw(1.0).abs() - 0.1
    fields = {
        "logprobs": theta.requires_grad_(),
        "behaviour_logprobs": theta.detach() + draw(),
        "advantages": draw(1.0),
        "token_weights": torch.full((24,), 1 / 24, dtype=torch.float64),
        "sample_index": torch.arange(24) // 4,
        "prox_logprobs": theta.detach() + draw(),
        "staleness": torch.arange(24) // 4,
    }
    return LossInput(**(fields | changes))


def grad(x, algo, correction, prepared=None):
    return torch.autograd.grad(policy_loss(x, algo, correction, prepared)[0], x.logprobs)[0]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_without_staleness_every_correction_is_ppo_with_full_ess(name):
    x = record(staleness=torch.zeros(24, dtype=torch.int64))
    same = dataclasses.replace(x, prox_logprobs=x.behaviour_logprobs)
    config = CORRECTIONS[name]()
    if name == "seq_mask":
        config = SeqMaskConfig(limit=10.0)  # it looks at θ, which has moved
    expected = grad(same, GrpoConfig(), CorrectionConfig())
    torch.testing.assert_close(grad(same, GrpoConfig(), config), expected)
    metrics = policy_loss(same, GrpoConfig(), config)[1].means()
    assert metrics["offpolicy/ess_token"] == metrics["offpolicy/ess_token_truncated"] == 1
    assert metrics["offpolicy/ess_sequence"] == metrics["offpolicy/ess_sequence_truncated"] == 1
    assert metrics["offpolicy/rejected_fraction"] == metrics["offpolicy/second_moment"] == 0


@pytest.mark.parametrize(
    "config", [TisConfig(cap=math.inf), IcepopConfig(low=0.0, high=math.inf)], ids=lambda c: c.name
)
def test_without_bounds_the_weight_is_raw(config):
    x = record()
    assert torch.equal(grad(x, GrpoConfig(), config), grad(x, GrpoConfig(), DecoupledConfig()))


def test_uncorrected_does_not_know_who_made_the_tokens():
    x = record()
    other = dataclasses.replace(x, behaviour_logprobs=x.behaviour_logprobs - 1.5)
    uncorrected = grad(x, GrpoConfig(), UncorrectedConfig())
    assert torch.equal(uncorrected, grad(other, GrpoConfig(), UncorrectedConfig()))
    assert not torch.allclose(grad(x, GrpoConfig(), DecoupledConfig()), grad(other, GrpoConfig(), DecoupledConfig()))
    on_policy = dataclasses.replace(x, behaviour_logprobs=x.prox_logprobs)
    torch.testing.assert_close(uncorrected, grad(on_policy, GrpoConfig(), CorrectionConfig()))


def test_with_one_token_a_sample_token_sequence_and_geometric_agree():
    log_w, index = [LN2, -0.3, 1.4], [0, 1, 2]
    token = apply(TisConfig(cap=2.5), log_w, index).weight
    assert torch.equal(token, apply(SeqTisConfig(cap=2.5), log_w, index).weight)
    assert torch.equal(token, apply(TisConfig(cap=2.5), log_w, index, level="sequence").weight)


def test_sequence_tis_is_the_truncated_product():
    # 2·3 = 6 → 5; ½·½
    got = apply(SeqTisConfig(cap=5.0), [LN2, math.log(3), -LN2, -LN2], [4, 4, 1, 1])
    assert got.weight.tolist() == pytest.approx([5, 5, 0.25, 0.25])
    assert got.log_w.tolist() == pytest.approx([LN2, math.log(3), -LN2, -LN2])


def test_icepop_leaves_out_both_ends():
    got = apply(IcepopConfig(), [math.log(0.4), math.log(0.6), math.log(4), math.log(6)])
    assert got.weight.tolist() == pytest.approx([0.4, 0.6, 4, 6])
    assert got.keep.tolist() == [False, True, True, False]


def test_geometric_filter():
    # means of log w: 0 (from ±1), .002, −.0005
    got = apply(GeoConfig(), [1.0, -1.0, 0.002, 0.002, -0.0005, -0.0005], [0, 0, 1, 1, 2, 2])
    assert got.keep.tolist() == [True, True, False, False, True, True]
    assert got.weight.tolist() == [1.0] * 6
    assert apply(GeoConfig(cap=2.0), [1.0, -1.0]).weight.tolist() == pytest.approx([2.0, math.exp(-1)])


def test_k3_filter():
    # k3(ln 2) = 1 − ln 2 = .307; k3(.1) = e^.1 − 1.1 = .00517; the ±1 that the geometric filter lets through is caught
    got = apply(K3FilterConfig(), [LN2, 0.1, 0.1, 0.1, 1.0, -1.0], [0, 0, 1, 1, 2, 2])
    assert got.keep.tolist() == [False, False, True, True, False, False]


def test_one_vetoed_token_drops_its_sample():
    got = apply(VetoConfig(), [0.0, math.log(0.9e-4), 0.0, math.log(1.1e-4), 5.0], [0, 0, 1, 1, 1])
    assert got.keep.tolist() == [False, False, True, True, True]
    assert got.weight.tolist() == pytest.approx([1, 0.9e-4, 1, 1.1e-4, 2])


def test_sequence_mask_never_drops_a_good_sample():
    # log π_beh − log π_θ = .8, .4 (mean .6 > .5) and .4, .4
    theta, index = [-0.8, -0.4, -0.4, -0.4, -0.8, -0.4], [0, 0, 1, 1, 2, 2]
    got = apply(SeqMaskConfig(), [0.0] * 6, index, advantages=[-1.0, -1, -1, -1, 0, 0], theta=theta)
    assert got.keep.tolist() == [False, False, True, True, True, True]
    assert got.weight.tolist() == [1.0] * 6


def test_interpolated_prox():
    # d = staleness = 0, 1, 2, 4: α = 0, 0, ½, ¾; counted to the version being made 1, 2, 3, 5: α = 0, ½, ⅔, ⅘
    lp, beh, s = torch.full((4,), -1.0), torch.full((4,), -3.0), torch.tensor([0, 1, 2, 4])
    assert interpolated_prox(lp, beh, s).tolist() == [-3.0, -3.0, -2.0, -1.5]
    assert interpolated_prox(lp, beh, s, age="made").tolist() == pytest.approx([-3.0, -2.0, -3 + 4 / 3, -1.4])
    with pytest.raises(ValueError, match="staleness"):
        interpolated_prox(lp, beh, None)


@pytest.mark.parametrize("age", ["trained", "made"])
def test_a3po_is_decoupled_at_its_interpolation_and_holds_it_fixed(age):
    x = record()
    prox = interpolated_prox(x.logprobs, x.behaviour_logprobs, x.staleness, age=age)
    assert not prox.requires_grad
    at_it = dataclasses.replace(x, prox_logprobs=prox)
    torch.testing.assert_close(grad(x, GrpoConfig(), A3poConfig(age=age)), grad(at_it, GrpoConfig(), DecoupledConfig()))
    # at staleness 0 it is plain PPO on the behaviour policy
    fresh = dataclasses.replace(x, staleness=torch.zeros(24, dtype=torch.int64))
    torch.testing.assert_close(grad(fresh, GrpoConfig(), A3poConfig()), grad(fresh, GrpoConfig(), CorrectionConfig()))


def test_what_is_left_out_stays_in_the_denominator():
    x = record()
    got = grad(x, WIDE, IcepopConfig(low=0.8, high=1.25))
    w = (x.prox_logprobs - x.behaviour_logprobs).exp()
    inside = (w >= 0.8) & (w <= 1.25)
    assert 0 < inside.sum() < 24
    rho = (x.logprobs.detach() - x.behaviour_logprobs).exp()
    torch.testing.assert_close(got, torch.where(inside, -rho * x.advantages / 24, 0.0))
    metrics = policy_loss(x, WIDE, IcepopConfig(low=0.8, high=1.25))[1].means()
    assert metrics["offpolicy/rejected_fraction"] == pytest.approx(1 - inside.double().mean().item())


def test_two_masks_both_leave_out():
    x = record()
    mask = torch.arange(24) % 2 == 0
    w = (x.prox_logprobs - x.behaviour_logprobs).exp()
    inside = (w >= 0.8) & (w <= 1.25)
    got = grad(dataclasses.replace(x, keep=mask), WIDE, IcepopConfig(low=0.8, high=1.25))
    assert (got != 0).tolist() == (mask & inside).tolist()


def test_reinforce_weighs_and_uncorrected_does_not():
    x = record()
    w = (x.prox_logprobs - x.behaviour_logprobs).exp()
    torch.testing.assert_close(grad(x, ReinforceConfig(), CorrectionConfig()), -x.advantages / 24)
    torch.testing.assert_close(grad(x, ReinforceConfig(), DecoupledConfig()), -w * x.advantages / 24)


def test_gspo_is_weighed_by_geometric_means():
    got = apply(DecoupledConfig(), [LN2, 0.0, -LN2, -LN2], [0, 0, 1, 1], level="sequence")
    assert got.weight.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2), 0.5, 0.5])


# What the whole update decides


def prepare(algo, correction, log_w, advantages, samples, **more):
    beh = torch.full((len(log_w),), -2.0, dtype=torch.float64)
    return prepare_update(
        algo,
        correction,
        logprobs=beh + torch.tensor(log_w, dtype=torch.float64),
        behaviour_logprobs=beh,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sample_index=torch.tensor(samples),
        **more,
    )


def test_normalised_weights_are_truncated_first():
    # w = 4, 1, 1, ½ capped at 2: 2, 1, 1, ½, mean 4.5/4
    log_w = [2 * LN2, 0.0, 0.0, -LN2]
    got = prepare(GrpoConfig(), TisConfig(normalise=True), log_w, [1.0] * 4, [0, 0, 1, 1])
    assert got.weight_scale == pytest.approx(4 / 4.5)
    x = record()
    whole = prepare_update(
        GrpoConfig(),
        TisConfig(cap=1.1, normalise=True),
        logprobs=x.prox_logprobs,
        behaviour_logprobs=x.behaviour_logprobs,
        advantages=x.advantages,
        sample_index=x.sample_index,
    )
    metrics = policy_loss(x, GrpoConfig(), TisConfig(cap=1.1), whole)[1]
    assert metrics.sums[SUMS.index("applied")].item() == pytest.approx(24)  # Σ applied: their mean is 1


def test_m2po_masks_one_outlier_and_only_it():
    # (log r)² = .01, .01, 1 among tokens that a clip could act on: their mean .34; without the outlier .01
    log_r = torch.tensor([0.1, -0.1, 1.0, -3.0, 3.0, 3.0])
    A = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 0.0])
    assert m2po_keep(log_r, A, 0.04).tolist() == [True, True, False, True, True, True]


def test_m2po_masks_as_few_as_it_must():
    # .01, .01, .09: mean .0367 ≤ .04 stays whole; with .16: mean .06 > .04, without it .01
    A = torch.ones(3)
    assert m2po_keep(torch.tensor([0.1, 0.3, 0.1]), A, 0.04).tolist() == [True] * 3
    assert m2po_keep(torch.tensor([0.1, 0.4, 0.1]), A, 0.04).tolist() == [True, False, True]


def test_m2po_keeps_what_lies_on_its_limit():
    assert m2po_keep(torch.tensor([0.5, 0.5]), torch.ones(2), 0.25).tolist() == [True, True]


def test_m2po_masks_nothing_between_identical_policies():
    assert m2po_keep(torch.zeros(5), torch.tensor([1.0, -1, 0, 1, -1]), 0.0).all()
    assert m2po_keep(torch.zeros(0), torch.zeros(0), 0.04).tolist() == []


def test_m2po_takes_the_place_of_the_clip():
    x = record()
    prepared = prepare_update(
        GrpoConfig(),
        M2poConfig(),
        logprobs=x.logprobs.detach(),
        behaviour_logprobs=x.behaviour_logprobs,
        advantages=x.advantages,
        sample_index=x.sample_index,
    )
    assert 0 < prepared.keep.sum() < 24
    got = grad(dataclasses.replace(x, keep=prepared.keep), GrpoConfig(), M2poConfig(), prepared)
    rho = (x.logprobs.detach() - x.behaviour_logprobs).exp()
    torch.testing.assert_close(got, torch.where(prepared.keep, -rho * x.advantages / 24, 0.0))


def test_vcpo_learning_rate():
    assert vcpo_lr_scale(torch.ones(9)) == 1
    assert vcpo_lr_scale(torch.full((9,), 3.7)) == pytest.approx(1)
    assert vcpo_lr_scale(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(1 / 2)  # 1/√4
    assert vcpo_lr_scale(torch.zeros(3)) == 1
    # sample weights 2·2 and 1: 25/(2·17)
    got = prepare(GrpoConfig(), VcpoConfig(), [LN2, LN2, 0.0, 0.0], [1.0] * 4, [0, 0, 1, 1])
    assert got.lr_scale == pytest.approx(math.sqrt(25 / 34))
    assert got.advantages is None


def test_vcpo_baseline():
    # w² ‖g‖² = 16·1 and 1·4: b = 16/20 for rewards 1, 0 in one group; the other group's rewards are equal
    rewards, groups = torch.tensor([1.0, 0.0, 0.1, 0.1]), torch.tensor([3, 3, 8, 8])
    log_w, index = [2 * LN2, 0.0, 0.7, 0.1], [0, 1, 2, 3]
    norms = torch.tensor([1.0, 4.0, 2.0, 3.0])
    more = {"rewards": rewards, "group_of": groups, "square_norms": norms}
    got = prepare(GrpoConfig(), VcpoConfig(baseline="group"), log_w, [0.0] * 4, index, **more)
    assert got.advantages.tolist() == pytest.approx([0.2, -0.8, 0, 0])
    assert got.advantages[2:].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="needs rewards"):
        prepare(GrpoConfig(), VcpoConfig(baseline="batch"), log_w, [0.0] * 4, index)


def test_vcpo_baseline_of_equal_weights_and_norms_is_the_mean():
    more = {"rewards": torch.tensor([1.0, 0.0, 0.5]), "square_norms": torch.ones(3)}
    got = prepare(GrpoConfig(), VcpoConfig(baseline="batch"), [0.0] * 3, [0.0] * 3, [0, 1, 2], **more)
    assert got.advantages.tolist() == pytest.approx([0.5, -0.5, 0.0])


def test_score_norms():
    # p = ½, ½ and 1: (½)² + (½)², 0
    norms = score_norms(torch.tensor([-LN2, -LN2, 0.0]), Samples.of(torch.tensor([0, 0, 1])))
    assert norms.tolist() == pytest.approx([0.5, 0.0])


def test_bapo_does_not_move_where_there_is_nothing_to_balance():
    r = torch.tensor([1.0, 1.3, 0.5])
    for counted in ("unclipped", "clipped"):
        algo = BapoConfig(counted=counted)
        assert bapo_bounds(algo, r, torch.ones(3)) == (0.6, 1.2)
        assert bapo_bounds(algo, r, torch.zeros(3)) == (0.6, 1.2)
        assert bapo_bounds(algo, torch.ones(2), torch.tensor([1.0, -1.0])) == (0.6, 1.2)


def test_bapo_raises_the_lower_bound_first():
    # at r = .71 a negative token of size 10 outweighs the positive 1·1: low passes it at .72, and the share is 1
    low, high = bapo_bounds(BapoConfig(), torch.tensor([1.0, 0.71]), torch.tensor([1.0, -10.0]))
    assert low == pytest.approx(0.72)
    assert high == 1.2


def test_bapo_then_raises_the_upper_bound():
    # the negative token at r = 1 is never silenced; 1.5·3 > 1·2 comes in when high reaches 1.5
    low, high = bapo_bounds(BapoConfig(), torch.tensor([1.5, 1.0]), torch.tensor([3.0, -2.0]))
    assert (low, high) == (pytest.approx(0.9), pytest.approx(1.5))


def test_bapo_stops_at_its_ends():
    assert bapo_bounds(BapoConfig(), torch.tensor([1.0, 1.0]), torch.tensor([0.1, -10.0])) == (0.9, 3.0)
    assert bapo_bounds(BapoConfig(), torch.tensor([1.0, 0.5]), -torch.ones(2)) == (0.9, 3.0)
    # .6 + 5·.07 is beyond .9, and 1.2 + 4·.5 beyond 3
    uneven = BapoConfig(low_step=0.07, high_step=0.5)
    assert bapo_bounds(uneven, torch.tensor([1.0, 1.0]), torch.tensor([0.1, -10.0])) == (0.9, 3.0)


def test_bapo_of_the_authors_code_counts_a_clipped_token_with_its_bound():
    # A = +1 at r = 2, −1 at r = .5. Clipped: min(2, high) against max(.5, low) = 1.2 : .6, the share is ⅔ at once.
    # Unclipped: the positive one, beyond 1.2, counts 0 and the negative one, below .6, too: 0 < 0 is no reason to move.
    r, A = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    assert bapo_bounds(BapoConfig(counted="clipped"), r, A) == (0.6, 1.2)
    assert bapo_bounds(BapoConfig(), r, A) == (0.6, 1.2)
    # A = −2 at r = .5: 1.2 : 1.2 is a share of ½; at .6 : 1.2 with A = −2.1 it is short, low goes to its end, where the
    # negative token counts 2.1·.9 = 1.89, and high to the first bound above it, 1.9
    assert bapo_bounds(BapoConfig(counted="clipped"), r, torch.tensor([1.0, -2.0])) == (0.6, 1.2)
    low, high = bapo_bounds(BapoConfig(counted="clipped"), r, torch.tensor([1.0, -2.1]))
    assert (low, high) == (0.9, pytest.approx(1.9))


@pytest.mark.parametrize("correction", [M2poConfig(), VcpoConfig(baseline="group"), TisConfig(normalise=True)])
def test_a_prepared_update_does_not_depend_on_the_order_of_its_tokens(correction):
    x = record()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    more = {"rewards": torch.arange(6.0), "group_of": torch.tensor([0, 0, 0, 1, 1, 1])}

    def prepared(places):
        return prepare_update(
            GrpoConfig(),
            correction,
            logprobs=x.prox_logprobs[places],
            behaviour_logprobs=x.behaviour_logprobs[places],
            advantages=x.advantages[places],
            sample_index=x.sample_index[places],
            **more,
        )

    a, b = prepared(torch.arange(24)), prepared(shuffled)
    assert (a.lr_scale, a.weight_scale) == (pytest.approx(b.lr_scale), pytest.approx(b.weight_scale))
    for one, other in ((a.keep, b.keep), (a.advantages, b.advantages)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one[shuffled], other)


def test_nothing_to_prepare():
    assert prepare(GrpoConfig(), DecoupledConfig(), [0.5], [1.0], [0]) == Prepared()


def test_who_needs_the_whole_update():
    whole = {name for name, kind in CORRECTIONS.items() if needs_whole_update(GrpoConfig(), kind())}
    assert whole == {"m2po", "vcpo"}
    assert needs_whole_update(GrpoConfig(), TisConfig(normalise=True))
    assert {name for name, kind in ALGOS.items() if needs_whole_update(kind(), CorrectionConfig())} == {"bapo"}


# Which pairs stand together


@pytest.mark.parametrize("name", [name for name, kind in ALGOS.items() if kind.off_policy])
def test_an_importance_weight_is_never_counted_twice(name):
    allowed = {rule for rule, kind in CORRECTIONS.items() if incompatible(ALGOS[name](), kind()) is None}
    assert allowed == {"none", "seq_mask"}


@pytest.mark.parametrize("correction", ["none", "seq_mask"])
def test_an_objective_without_a_ratio_needs_another_weight(correction):
    why = incompatible(ReinforceConfig(), CORRECTIONS[correction]()) or ""
    assert why.startswith(f"correction={correction} with algo=reinforce: the objective has no ratio")
    assert "take correction=tis, or uncorrected" in why
    assert incompatible(ReinforceConfig(), TisConfig()) is None
    assert incompatible(ReinforceConfig(loss="mine:loss"), CORRECTIONS[correction]()) is None


def test_m2po_needs_a_clip_to_replace():
    assert incompatible(GrpoConfig(), M2poConfig()) is None
    assert "take algo=grpo" in (incompatible(GspoConfig(), M2poConfig()) or "")


def test_one_baseline_is_enough():
    assert incompatible(PpoConfig(), VcpoConfig()) is None
    assert "the critic is the baseline" in (incompatible(PpoConfig(), VcpoConfig(baseline="group")) or "")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GrpoConfig(kl="k3"), r"algo\.kl_coef=0\.0 with algo\.kl=k3: set both"),
        (lambda: GrpoConfig(kl="full", kl_coef=0.1, kl_in="reward"), r"algo\.kl_in=reward with algo\.kl=full"),
        (lambda: GrpoConfig(kl_in="reward"), r"algo\.kl_in=reward with algo\.kl=none"),
        (lambda: GrpoConfig(kl="k1", kl_coef=0.1), r"algo\.kl=k1 with algo\.kl_in=loss.* is 0.*algo\.kl=k2 or k3"),
        (lambda: PpoConfig(kl="k1", kl_coef=0.1), r"algo\.kl=k1 with algo\.kl_in=loss.*or algo\.kl_in=reward"),
        (lambda: GrpoConfig(ref_refresh=5), r"algo\.ref_refresh=5: there is no reference"),
        (lambda: GrpoConfig(advantage="gae"), r"algo\.advantage=gae with algo=grpo"),
        (lambda: PpoConfig(advantage="group"), r"algo\.advantage=group with algo=ppo"),
        (lambda: GrpoConfig(dual_clip=1.1), r"algo\.dual_clip=1\.1: must be > 1 \+ algo\.clip_high = 1\.2"),
        (lambda: PpoConfig(gae_lambda=1.5), r"algo\.gae_lambda=1\.5"),
        (lambda: GspoConfig(clip_low=2), r"algo\.clip_low=2"),
        (lambda: ALGOS["cispo"](clip_high=0.2), r"algo\.clip_high=0\.2: must be ≥ 1, it is the cap of the ratio"),
        (lambda: ALGOS["cispo"](clip_low=1.5), r"algo\.clip_low=1\.5"),
        (lambda: ALGOS["aspo"](clip_low=1.5), r"algo\.clip_low=1\.5"),
        (lambda: BapoConfig(low_start=0.95), r"algo\.low_start=0\.95: needs low_start ≤ low_end"),
        (lambda: BapoConfig(dual_clip=0.5), r"algo\.dual_clip=0\.5: must be ≥ 1, or 0 for off"),
        (lambda: M2poConfig(limit=0), r"correction\.limit=0: must be > 0"),
        (lambda: K3FilterConfig(limit=0), r"correction\.limit=0: must be > 0"),
        (lambda: TisConfig(cap=0), r"correction\.cap=0"),
        (lambda: VcpoConfig(cap=-1), r"correction\.cap=-1"),
        (lambda: A3poConfig(normalise=True), r"correction\.normalise=true with correction=a3po"),
        (lambda: IcepopConfig(low=1.5), r"correction\.low=1\.5"),
        (lambda: GeoConfig(high=0.5), r"correction\.high=0\.5: must be ≥ 1"),
    ],
)
def test_refuses(make, says):
    with pytest.raises(ValueError, match=says):
        make()

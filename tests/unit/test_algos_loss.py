"""The policy loss: each degenerate case with its number, gradients against the hand formula, metrics under any cut."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrail.algos.config import GrpoConfig
from offtrail.algos.correction_config import CorrectionConfig, DecoupledConfig, TisConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.metrics import LossMetrics, bin_of, quantiles

NONE, DECOUPLED = CorrectionConfig(), DecoupledConfig()
UNCLIPPED = GrpoConfig(clip_low=1.0, clip_high=math.inf)
LN2 = math.log(2)


def make(N: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> LossInput:
    g = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(N, generator=g, dtype=torch.float64) * scale

    theta = -draw().abs() - 0.1
    prox, beh = theta + draw(0.3), theta + draw(0.3)
    fields: dict[str, object] = {
        "logprobs": theta.to(dtype).requires_grad_(),
        "prox_logprobs": prox.to(dtype),
        "behaviour_logprobs": beh.to(dtype),
        "advantages": draw().to(dtype),
        "token_weights": torch.full((N,), 1 / N, dtype=dtype),
        "sample_index": torch.arange(N) // 4,
    }
    return LossInput(**(fields | changes))


def grad(inputs: LossInput, algo: GrpoConfig, correction: CorrectionConfig) -> torch.Tensor:
    loss, _ = policy_loss(inputs, algo, correction)
    return torch.autograd.grad(loss, inputs.logprobs)[0]


def exp_diff(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.detach() - b).exp()


# Degenerate cases


def test_at_prox_and_behaviour_the_gradient_is_reinforce_and_nothing_is_clipped():
    x = make()
    same = dataclasses.replace(x, prox_logprobs=None, behaviour_logprobs=x.logprobs.detach())
    for correction in (NONE, DECOUPLED, TisConfig()):
        torch.testing.assert_close(grad(same, GrpoConfig(), correction), -x.advantages / 12)
        metrics = policy_loss(same, GrpoConfig(), correction)[1].means()
        assert metrics["policy/clip_low_fraction"] == metrics["policy/clip_high_fraction"] == 0
        assert metrics["policy/ratio_mean"] == metrics["offpolicy/weight_mean"] == 1
        assert metrics["offpolicy/ess_token"] == metrics["offpolicy/ess_sequence"] == 1
        assert metrics["offpolicy/abs_dlogp_max"] == metrics["offpolicy/abs_dlogp_p95"] == 0


def test_at_prox_the_decoupled_gradient_is_weighted_reinforce():
    x = make()
    w = exp_diff(x.logprobs, x.behaviour_logprobs)
    for at_prox in (None, x.logprobs.detach()):
        got = grad(dataclasses.replace(x, prox_logprobs=at_prox), GrpoConfig(), DECOUPLED)
        torch.testing.assert_close(got, -w * x.advantages / 12)


def test_behaviour_equal_to_prox_is_ppo_whatever_the_correction():
    x = make()
    ppo = dataclasses.replace(x, prox_logprobs=x.behaviour_logprobs)
    losses = {policy_loss(ppo, GrpoConfig(), c)[0].item() for c in (NONE, DECOUPLED, TisConfig(cap=1.0))}
    r = exp_diff(x.logprobs, x.behaviour_logprobs)
    by_hand = -torch.minimum(r * x.advantages, r.clamp(0.8, 1.2) * x.advantages).mean().item()
    assert list(losses) == pytest.approx([by_hand] * len(losses), abs=1e-12)


def test_without_clipping_decoupled_is_the_plain_ratio_independent_of_prox():
    x = make()
    rho = exp_diff(x.logprobs, x.behaviour_logprobs)
    for shift in (0.0, 0.7, -2.0):
        moved = dataclasses.replace(x, prox_logprobs=x.prox_logprobs + shift * torch.arange(12) / 12)
        torch.testing.assert_close(policy_loss(moved, UNCLIPPED, DECOUPLED)[0].detach(), -(rho * x.advantages).mean())
        torch.testing.assert_close(grad(moved, UNCLIPPED, DECOUPLED), -rho * x.advantages / 12)


def test_bypass_never_looks_at_prox():
    x = make()
    expected = policy_loss(x, GrpoConfig(), NONE)[0].item()
    for prox in (None, x.prox_logprobs + 1):
        assert policy_loss(dataclasses.replace(x, prox_logprobs=prox), GrpoConfig(), NONE)[0].item() == expected


def test_no_cap_is_the_raw_weight_and_a_cap_truncates_it():
    x = make(seed=3)
    raw = grad(x, UNCLIPPED, DECOUPLED)
    assert torch.equal(grad(x, UNCLIPPED, TisConfig(cap=math.inf)), raw)
    w = exp_diff(x.prox_logprobs, x.behaviour_logprobs)
    assert (w > 1.1).any()
    torch.testing.assert_close(grad(x, UNCLIPPED, TisConfig(cap=1.1)), raw / w * w.clamp(max=1.1))


def test_no_advantage_no_gradient():
    x = make(advantages=torch.zeros(12, dtype=torch.float64))
    assert grad(x, GrpoConfig(), DECOUPLED).tolist() == [0.0] * 12


def test_a_wide_lower_clip_never_clips_a_negative_advantage():
    x = make(advantages=-torch.ones(12, dtype=torch.float64))
    far = dataclasses.replace(x, prox_logprobs=x.logprobs.detach() + 5)
    metrics = policy_loss(far, GrpoConfig(clip_low=1.0, clip_high=10.0), DECOUPLED)[1].means()
    assert metrics["policy/clip_low_fraction"] == metrics["policy/clip_high_fraction"] == 0
    assert grad(far, GrpoConfig(clip_low=1.0, clip_high=10.0), NONE).abs().min() > 0


def test_clipping_by_side_and_sign():
    # ratios 2, 2, ½, ½ with A +, −, +, −: only (2, +) and (½, −) lose their gradient
    theta = torch.tensor([LN2, LN2, -LN2, -LN2], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    x = make(4, logprobs=theta, prox_logprobs=zero, behaviour_logprobs=zero, advantages=torch.tensor([1.0, -1, 1, -1]))
    assert grad(x, GrpoConfig(), DECOUPLED).tolist() == pytest.approx([0, 2 / 4, -0.5 / 4, 0])
    metrics = policy_loss(x, GrpoConfig(), DECOUPLED)[1].means()
    assert metrics["policy/clip_high_fraction"] == metrics["policy/clip_low_fraction"] == 0.25
    assert metrics["policy/ratio_mean"] == pytest.approx(1.25)
    # −(1.2 − 2 + .5 − .8)/4
    assert metrics["loss/policy"] == pytest.approx(1.1 / 4)


def test_rejected_tokens_give_nothing_and_stay_in_the_denominator():
    x = make()
    keep = torch.arange(12) % 3 > 0
    full, part = grad(x, GrpoConfig(), DECOUPLED), grad(dataclasses.replace(x, keep=keep), GrpoConfig(), DECOUPLED)
    assert torch.equal(part, torch.where(keep, full, 0.0))
    assert policy_loss(dataclasses.replace(x, keep=keep), GrpoConfig(), DECOUPLED)[1].means()[
        "offpolicy/rejected_fraction"
    ] == pytest.approx(1 / 3)


def test_far_ratios_stay_finite():
    x = make(4, prox_logprobs=torch.tensor([-90.0, 0, 90, 0]).double(), behaviour_logprobs=-torch.arange(4) * 40.0)
    loss, metrics = policy_loss(x, GrpoConfig(), DECOUPLED)
    assert torch.isfinite(loss)
    assert all(map(math.isfinite, metrics.means().values()))
    assert metrics.means()["offpolicy/weight_max"] == pytest.approx(math.exp(20))


# Gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("correction", [NONE, DECOUPLED, TisConfig(cap=1.2)], ids=lambda c: c.name)
def test_gradient_is_the_hand_formula(dtype, tolerance, correction):
    x = make(200, seed=7, dtype=dtype)
    anchor = x.behaviour_logprobs if correction is NONE else x.prox_logprobs
    w = torch.ones(200, dtype=torch.float64)
    if correction is not NONE:
        w = exp_diff(x.prox_logprobs.double(), x.behaviour_logprobs.double())
        w = w.clamp(max=getattr(correction, "cap", math.inf))
    r, A = exp_diff(x.logprobs.double(), anchor.double()), x.advantages.double()
    live = ~(((r > 1.2) & (A > 0)) | ((r < 0.8) & (A < 0)))
    by_hand = torch.where(live, -w * r * A / 200, 0.0)
    assert (~live).sum() > 10
    torch.testing.assert_close(grad(x, GrpoConfig(), correction).double(), by_hand, atol=tolerance, rtol=tolerance)


def test_kl_is_added_after_the_weight():
    algo = GrpoConfig(kl="k3", kl_coef=0.5)
    x = make(ref_logprobs=torch.full((12,), -1.0, dtype=torch.float64))
    d = x.logprobs.detach() + 1
    plain, with_kl = grad(x, GrpoConfig(), DECOUPLED), grad(x, algo, DECOUPLED)
    torch.testing.assert_close(with_kl - plain, 0.5 * (1 - (-d).exp()) / 12)
    metrics = policy_loss(x, algo, DECOUPLED)[1].means()
    k3 = ((-d).exp() - 1 + d).mean().item()
    assert metrics["policy/kl_ref"] == pytest.approx(k3)
    assert metrics["loss/kl"] == pytest.approx(0.5 * k3)


# Metrics


def test_weights_by_hand():
    # w = 2, 1, ½, 4: mean 7.5/4, ESS 7.5²/(4·21.25); capped at 2: 5.5²/(4·9.25). Samples: 2·1 and ½·4, so equal
    zero = torch.zeros(4, dtype=torch.float64)
    x = make(
        4,
        prox_logprobs=torch.tensor([LN2, 0, -LN2, 2 * LN2], dtype=torch.float64),
        behaviour_logprobs=zero,
        sample_index=torch.tensor([8, 8, 3, 3]),
        staleness=torch.tensor([0, 0, 2, 11]),
        entropy=torch.tensor([1.0, 2, 3, 4]),
    )
    got = policy_loss(x, GrpoConfig(), TisConfig(cap=2.0))[1].means()
    expected = {
        "offpolicy/weight_mean": 1.875,
        "offpolicy/weight_max": 4.0,
        "offpolicy/ess_token": 56.25 / 85,
        "offpolicy/ess_token_truncated": 30.25 / 37,
        "offpolicy/ess_sequence": 1.0,
        "offpolicy/abs_dlogp_mean": LN2,
        "offpolicy/abs_dlogp_max": 2 * LN2,
        "offpolicy/abs_dlogp_over_ln2": 0.25,
        "offpolicy/k1": -LN2 / 2,
        "offpolicy/k3": 0.875 - LN2 / 2,
        "offpolicy/chi2": 21.25 / 4 - 1,
        "offpolicy/abs_dlogp_mean/stale_0": LN2 / 2,
        "offpolicy/ess_token/stale_0": 9 / 10,
        "offpolicy/ess_token/stale_2": 1.0,
        "offpolicy/abs_dlogp_mean/stale_8_or_more": 2 * LN2,
        "offpolicy/k3/stale_0": 0.5 - LN2 / 2,
        "offpolicy/chi2/stale_0": 1.5,
        "offpolicy/second_moment/stale_0": LN2**2 / 2,
        "offpolicy/rejected_fraction/stale_2": 0.0,
        "policy/entropy": 2.5,
    }
    assert {k: got[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert got["offpolicy/abs_dlogp_p95"] == pytest.approx(2 * LN2, rel=0.005)
    assert "offpolicy/ess_token/stale_1" not in got


def part(x: LossInput, tokens: torch.Tensor) -> LossInput:
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return LossInput(**{k: None if v is None else v[tokens] for k, v in fields.items()})


@settings(max_examples=40, deadline=None)
@given(place=st.lists(st.integers(0, 3), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_any_cut_of_the_samples_adds_up(place, seed):
    g = torch.Generator().manual_seed(seed)
    x = make(24, seed, staleness=torch.randint(0, 12, (24,), generator=g))
    x = dataclasses.replace(x, entropy=torch.rand(24, generator=g), ref_logprobs=x.behaviour_logprobs - 0.1)
    algo = GrpoConfig(kl="k3", kl_coef=0.1)
    whole, expected = policy_loss(x, algo, TisConfig())
    where = torch.tensor(place)[x.sample_index]
    cut = [policy_loss(part(x, (where == i).nonzero()[:, 0]), algo, TisConfig()) for i in range(4)]
    merged = sum((m for _, m in cut), LossMetrics.empty())
    torch.testing.assert_close(sum(loss for loss, _ in cut), whole)
    assert merged.means() == pytest.approx(expected.means(), rel=1e-12, abs=1e-15)
    assert torch.equal(merged.histograms, expected.histograms)


def test_losses_are_means_over_updates():
    _, metrics = policy_loss(make(), GrpoConfig(), DECOUPLED)
    assert (metrics + metrics).means(updates=2) == pytest.approx(metrics.means())


def test_quantiles_are_within_a_bin():
    values = torch.randn(5001, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    histogram = torch.bincount(bin_of(values), minlength=LossMetrics.empty().histograms.shape[1])
    shares = [0.0, 0.05, 0.5, 0.95, 0.99, 1.0]
    exact = [float(values.sort().values[max(1, math.ceil(q * 5001)) - 1]) for q in shares]
    assert quantiles(histogram, shares) == pytest.approx(exact, rel=0.004)
    assert all(map(math.isnan, quantiles(torch.zeros_like(histogram), shares)))


def test_ratio_histogram_has_the_shape_of_the_ratios():
    x = make(1000, seed=2)
    ratios = torch.tensor(policy_loss(x, GrpoConfig(), NONE)[1].ratios(), dtype=torch.float64)
    true = exp_diff(x.logprobs, x.behaviour_logprobs)
    assert ratios.mean().item() == pytest.approx(true.mean().item(), rel=0.02)
    assert ratios.median().item() == pytest.approx(true.median().item(), rel=0.02)


def test_metrics_hold_no_graph():
    _, m = policy_loss(make(), GrpoConfig(), DECOUPLED)
    assert not any(t.requires_grad for t in (m.sums, m.maxima, m.buckets, m.histograms))


def test_an_empty_micro_batch_is_nothing():
    loss, metrics = policy_loss(part(make(), torch.zeros(0, dtype=torch.int64)), GrpoConfig(), DECOUPLED)
    assert loss.item() == 0
    assert loss.requires_grad
    assert metrics.means() == {}
    assert metrics.ratios() == []


def test_refuses():
    with pytest.raises(ValueError, match=r"LossInput.advantages has shape \(5,\)"):
        make(advantages=torch.zeros(5))
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        policy_loss(make(), GrpoConfig(kl="k3", kl_coef=0.1), DECOUPLED)
    with pytest.raises(ValueError, match="allowed are none, uncorrected, decoupled, a3po"):
        policy_loss(make(), GrpoConfig(), CorrectionConfig(name="icepops"))

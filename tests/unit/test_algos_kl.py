"""KL estimators on a softmax that can be summed exactly: which of them pulls where.

π = (½, ½), π_ref = (.8, .2), gradient by the first logit (the second's is its negative):
    ∇KL(π‖ref) = π₁(log π₁/ref₁ − KL) = −¼ ln 4
    ∇KL(ref‖π) = π₁ − ref₁            = −.3
"""

import math

import pytest
import torch

from offtrail.algos.kl import full_kl, full_kl_grad, kl_estimate

REF = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
REVERSE = -math.log(4) / 4
FORWARD = -0.3


def log_policy(*logits: float) -> tuple[torch.Tensor, torch.Tensor]:
    theta = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return theta, theta.log_softmax(-1)


def gradient(objective: torch.Tensor, theta: torch.Tensor) -> float:
    (grad,) = torch.autograd.grad(objective, theta)
    assert grad.sum().abs() < 1e-12
    return grad[0].item()


def test_exact_gradient():
    theta, lp = log_policy(0.0, 0.0)
    assert gradient((lp.exp() * (lp - REF)).sum(), theta) == pytest.approx(REVERSE, abs=1e-12)


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.0), ("k2", REVERSE), ("k3", FORWARD)])
def test_in_the_loss(kind, expected):
    theta, lp = log_policy(0.0, 0.0)
    expectation = (lp.exp().detach() * kl_estimate(kind, lp, REF)).sum()
    assert gradient(expectation, theta) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("kind", "expected"), [("k1", REVERSE), ("k3", REVERSE - FORWARD)])
def test_in_the_reward(kind, expected):
    # k3: Σ π·k3·∇lp with k3 = (1.6 − 1 − ln 1.6, .4 − 1 − ln .4): ¼(1.2 − ln 4) = .3 − ¼ ln 4
    theta, lp = log_policy(0.0, 0.0)
    expectation = (lp.exp() * kl_estimate(kind, lp, REF).detach()).sum()
    assert gradient(expectation, theta) == pytest.approx(expected, abs=1e-12)


TABLE = [
    # (what stands where, ‖its expected gradient − ∇KL(π‖ref)‖): each gradient is (g, −g), so √2 times the difference
    ("k1 in the loss", math.sqrt(2) * -REVERSE),
    ("k2 in the loss", 0.0),
    ("k3 in the loss", math.sqrt(2) * (FORWARD - REVERSE)),
    ("k1 in the reward", 0.0),
    ("k3 in the reward", math.sqrt(2) * -FORWARD),
    ("k3_weighted", 0.0),
    ("k3_weighted, detached", math.sqrt(2) * (FORWARD - REVERSE)),
]


@pytest.mark.parametrize(("what", "error"), TABLE, ids=[row[0] for row in TABLE])
def test_table_of_gradient_errors(what, error):
    """The numbers: .490, 0, .066, 0, .424, 0, .066."""
    theta, lp = log_policy(0.0, 0.0)
    kind = what.split()[0].rstrip(",")
    old = torch.tensor([0.3, 0.7], dtype=torch.float64)
    if kind == "k3_weighted" and "detached" not in what:
        expectation = (old * kl_estimate("k3_weighted", lp, REF, behaviour_logprobs=old.log())).sum()
    elif kind == "k3_weighted":
        expectation = (old * (lp.exp().detach() / old) * kl_estimate("k3", lp, REF)).sum()
    elif "reward" in what:
        expectation = (lp.exp() * kl_estimate(kind, lp, REF).detach()).sum()
    else:
        expectation = (lp.exp().detach() * kl_estimate(kind, lp, REF)).sum()
    got = torch.autograd.grad(expectation, theta)[0]
    true = torch.tensor([REVERSE, -REVERSE], dtype=torch.float64)
    assert torch.linalg.vector_norm(got - true).item() == pytest.approx(error, abs=1e-12)


def test_the_weighted_estimate_is_exact_off_policy():
    _, lp = log_policy(0.4, -0.4)
    p, old = lp.exp(), torch.tensor([0.1, 0.9], dtype=torch.float64)
    kl = (p * (lp - REF)).sum().item()
    value = (old * kl_estimate("k3_weighted", lp, REF, behaviour_logprobs=old.log())).sum().item()
    assert value == pytest.approx(kl, abs=1e-12)


def test_full_vocabulary_kl_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=g).double().requires_grad_()
    ref = torch.randn(5, 11, generator=g).double()
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(full_kl(logits, ref).double(), exact, atol=1e-6, rtol=1e-5)
    (slope,) = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(full_kl_grad(p, q, exact).detach(), slope, atol=1e-12, rtol=1e-9)
    assert full_kl(ref, ref).abs().max() == 0
    # chunks of it are it
    torch.testing.assert_close(
        torch.cat([full_kl(logits[:2], ref[:2]), full_kl(logits[2:], ref[2:])]), full_kl(logits, ref)
    )


@pytest.mark.parametrize(("attached", "expected"), [(True, REVERSE), (False, FORWARD)])
def test_weighted_by_the_ratio_off_policy(attached, expected):
    theta, lp = log_policy(0.0, 0.0)
    old = torch.tensor([0.3, 0.7], dtype=torch.float64)
    ratio = lp.exp() / old
    weight = ratio if attached else ratio.detach()
    assert gradient((old * weight * kl_estimate("k3", lp, REF)).sum(), theta) == pytest.approx(expected, abs=1e-12)


def test_values_are_unbiased_on_policy_only():
    _, lp = log_policy(0.4, -0.4)
    p = lp.exp()
    kl = (p * (lp - REF)).sum().item()
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(kind, lp, REF)).sum().item() == pytest.approx(kl, abs=1e-12)
    old = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert abs((old * kl_estimate("k3", lp, REF)).sum().item() - kl) > 0.03


def test_k3_keeps_its_digits_near_zero():
    # float32: e^−d − 1 + d at d = 1e-4 is d²/2 − d³/6 ≈ 5e-9; the plain sum is off by an ulp of 1, 6e-8
    d = torch.tensor([1e-4])
    assert kl_estimate("k3", d, torch.zeros(1)).item() == pytest.approx(0.5e-8, rel=0.01)


def test_far_ratios_stay_finite():
    assert torch.isfinite(kl_estimate("k3", torch.tensor([-90.0, 0.0]), torch.tensor([0.0, -90.0]))).all()


def test_refuses_no_estimator():
    with pytest.raises(ValueError, match=r"algo\.kl=none"):
        kl_estimate("none", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="needs the behaviour"):
        kl_estimate("k3_weighted", torch.zeros(1), torch.zeros(1))

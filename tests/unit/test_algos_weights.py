"""What one token can weigh: the learner and the behaviour policy are 20 nats apart on it, and agree on all others."""

import pytest
import torch

from offtrail.algos.config import GrpoConfig
from offtrail.algos.correction_config import CORRECTIONS, A3poConfig
from offtrail.algos.loss import LossInput, policy_loss
from offtrail.algos.pairs import needs_whole_update
from offtrail.algos.update import prepare_update
from offtrail.platform.config.compose import compose, options_of
from offtrail.platform.config.schema import Config


def pull(algo, correction, log_w, A):
    """|∂loss/∂log π| of that token at θ = prox, where one of REINFORCE has 1; two samples of four tokens."""
    prox = torch.full((8,), -0.1 + min(log_w, 0), dtype=torch.float64)
    behaviour = prox - log_w * (torch.arange(8) == 0)
    A, index = torch.full((8,), A, dtype=torch.float64), torch.arange(8) // 4
    prepared = None
    if needs_whole_update(algo, correction):
        given = {"logprobs": prox, "behaviour_logprobs": behaviour, "advantages": A, "sample_index": index}
        prepared = prepare_update(algo, correction, **given)
    inputs = LossInput(
        prox.clone().requires_grad_(), behaviour, A, torch.full((8,), 1 / 8, dtype=torch.float64), index,
        prox_logprobs=prox, staleness=torch.full((8,), 4), keep=prepared.keep if prepared else None,
        ref_logprobs=prox, entropy=prox, full_kl=prox,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(policy_loss(inputs, algo, correction, prepared)[0], inputs.logprobs)
    return 8 * slope[0].abs().item()


def largest_pull(algo, correction):
    return max(pull(algo, correction, log_w, A) for log_w in (20.0, -20.0) for A in (1.0, -1.0))


def test_the_default_holds_it_at_two():
    config = Config()
    assert largest_pull(config.algo, config.correction) == pytest.approx(2)
    assert largest_pull(config.algo, CORRECTIONS["decoupled"]()) == pytest.approx(4.85e8, rel=1e-3)  # e^20


def test_every_algorithm_as_its_option_has_it_holds_it_but_dppo():
    """DPPO's mask does not see an unlikely token of negative advantage that became likely, nor does prime-rl's."""
    pulls = {}
    for option in options_of("algo"):
        config = compose([f"algo={option}"])
        pulls[option] = largest_pull(config.algo, config.correction)
    assert {option for option, most in pulls.items() if most > 4} == {"dppo"}, pulls


def test_which_corrections_of_grpo_have_no_bound():
    """docs/staleness.md lists them."""
    pulls = {name: largest_pull(GrpoConfig(), kind()) for name, kind in CORRECTIONS.items()}
    unbounded = {"decoupled", "a3po", "none", "seq_mask", "m2po"}
    assert {name for name, most in pulls.items() if most > 8} == unbounded
    dual = GrpoConfig(dual_clip=3.0)
    assert {name for name in unbounded if largest_pull(dual, CORRECTIONS[name]()) > 8} == {"decoupled"}
    # whatever shares lie in weight and ratio: e^15 · e^5
    assert largest_pull(GrpoConfig(), A3poConfig()) == pytest.approx(4.85e8, rel=1e-3)

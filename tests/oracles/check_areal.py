"""Against areal 1.0.4: decoupled PPO with its rejection modes, SAPO, M2PO's mask, the interpolated proximal policy.

Known differences: without `rejection_sampling` areal leaves the behaviour weight out altogether, so that its decoupled
loss is PPO on prox (pinned in `TestKnown`); its M2PO looks at all tokens, the paper's and ours at those that a clip
could act on, so the two are compared where these are the same.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import areal as package
import pytest
import torch
from areal.api.cli_args import RejectionSamplingConfig
from areal.utils.functional import functional as areal
from cases import Case

from offtrail.algos.config import GrpoConfig, GspoConfig, SapoConfig
from offtrail.algos.correction_config import (
    CorrectionConfig,
    DecoupledConfig,
    IcepopConfig,
    TisConfig,
    UncorrectedConfig,
)
from offtrail.algos.corrections import interpolated_prox
from offtrail.algos.update import m2po_keep

# areal.trainer's __init__ imports every trainer and every logging service: the package by its path alone.
for name in ("areal.trainer", "areal.trainer.ppo"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(Path(package.__file__).parent.joinpath(*name.split(".")[1:]))]
actor = importlib.import_module("areal.trainer.ppo.actor")


def theirs(case, **settings):
    settings = {"eps_clip": 0.2} | settings
    loss, _ = areal.ppo_actor_loss_fn(
        case.logps, case.prox, case.beh, case.padded_advantages, loss_mask=case.mask.bool(), **settings
    )
    return loss


def test_decoupled_with_the_full_weight():
    case = Case(spread=0.3)
    rule = RejectionSamplingConfig(level="token", action="clamp", metric="ratio", upper=1e9)
    case.same(case.ours(GrpoConfig(), DecoupledConfig()), theirs(case, rejection_sampling=rule))


def test_truncated():
    case = Case(spread=0.5)
    rule = RejectionSamplingConfig(level="token", action="clamp", metric="ratio", upper=1.3)
    case.same(case.ours(GrpoConfig(), TisConfig(cap=1.3)), theirs(case, rejection_sampling=rule))


def test_masked_and_still_in_the_denominator():
    case = Case(spread=0.5)
    rule = RejectionSamplingConfig(level="token", action="mask", metric="ratio", lower=0.7, upper=1.6)
    case.same(case.ours(GrpoConfig(), IcepopConfig(low=0.7, high=1.6)), theirs(case, rejection_sampling=rule))


def test_asymmetric_and_dual_clip():
    case = Case(spread=0.8)
    mine = case.ours(GrpoConfig(clip_high=0.28, dual_clip=2.0), CorrectionConfig(), behaviour=case.prox)
    case.same(mine, theirs(case, eps_clip_higher=0.28, c_clip=2.0))


def test_gspo():
    case = Case(spread=0.05)
    algo = GspoConfig(clip_low=0.02, clip_high=0.02, aggregation="token_mean")
    case.same(case.ours(algo, CorrectionConfig(), behaviour=case.prox), theirs(case, eps_clip=0.02,
         importance_sampling_level="sequence"))  # fmt: skip


def test_sapo():
    case = Case(spread=0.8)
    other, _ = areal.sapo_loss_fn(case.logps, case.prox, case.padded_advantages, 1.0, 1.05, case.mask.bool())
    case.same(case.ours(SapoConfig(aggregation="token_mean"), CorrectionConfig(), behaviour=case.prox), other)


@pytest.mark.parametrize(("age", "current"), [("trained", 9), ("made", 10)])
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_interpolated_prox(staleness, age, current):
    # areal's trainer calls it at step 9 with 9, and its docstring means the version that the step makes
    case = Case()
    beh, theta = case.flat(case.beh), case.flat(case.logps).detach()
    versions = torch.full((len(beh),), 9 - staleness)
    theirs = actor.compute_prox_logp_approximations(beh, theta, versions, current)["loglinear"]
    stale = torch.full((len(beh),), staleness)
    torch.testing.assert_close(interpolated_prox(theta, beh, stale, age=age), theirs)


def test_m2po_where_every_token_could_be_clipped():
    log_r = torch.randn(200, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(200, dtype=torch.bool)
    other = actor._apply_m2po_masking(torch.zeros(200), log_r, mask, 0.3)
    assert 0 < other.sum() < 200
    assert m2po_keep(log_r, log_r.sign(), 0.3).tolist() == other.tolist()


class TestKnown:
    """areal's own: if this fails, areal has changed and the list above is out of date."""

    def test_without_rejection_sampling_the_weight_is_dropped(self):
        case = Case(spread=0.5)
        case.same(case.ours(GrpoConfig(), UncorrectedConfig()), theirs(case))
        assert theirs(case).item() != pytest.approx(case.ours(GrpoConfig(), DecoupledConfig()).item(), rel=1e-3)

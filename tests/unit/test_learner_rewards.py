"""Reward models and process reward models: their losses by hand, the same numbers as transformers' own classifiers on
padded batches, whatever the cut; they learn, and what is saved opens as the class that its head names.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from offtrail.algos.preference import outcome_loss, pair_weights, preference_loss, step_loss
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.reward_objectives import (
    BradleyTerry,
    ImplicitReward,
    LabelledSteps,
    ProcessReward,
    ScoredAnswers,
    YesNo,
)
from offtrail.platform.learner.train import Trained, Trainer, adamw
from offtrail.platform.learner.world import World
from offtrail.platform.model.packing import SampleTable, lay_out
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.scalar import Reads, ScalarModel, load_scalar
from offtrail.platform.runtime.activity import Activity

ALONE = World(0, 1, torch.device("cpu"))


def answers(groups: int, size: int, seed: int = 0) -> SampleTable:
    """Ragged answers of random tokens, some of a single one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, groups * size)
    return SampleTable(
        prompts=tuple(rng.integers(7, 60, n).astype(np.int32) for n in rng.integers(2, 9, groups)),
        group_of=np.repeat(np.arange(groups), size),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=rng.integers(7, 60, lengths.sum()).astype(np.int32),
        temperatures=np.ones(groups, np.float32),
        ids=np.arange(groups),
    )


def scalar(start: Path, reads: Reads, **extra: Any) -> ScalarModel:
    """With a head that says something."""
    model = load_scalar(start, reads)
    with torch.no_grad():
        for p, seed in zip(model.score.parameters(), (1, 2), strict=False):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) / 4)
    return ScalarModel(model, reads, **extra)


def trainer_of(module: ScalarModel, objective: Any, budget: int = 16_384, lr: float = 3e-3) -> Trainer[Any]:
    optimizer = adamw(module.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, decay=0.0)
    trained = Trained("reward_model", module, objective, optimizer, lambda _: lr)
    return Trainer(ALONE, objective, [trained], Activity(), budget=budget)


def gradients(trainer: Trainer[Any], batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the one update, before the optimizer takes them."""
    found: dict[str, Tensor] = {}
    names = checkpoint.parameter_names(trainer.module)
    trainer.main.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in zip(names, trainer.module.parameters(), strict=True)
                                 if p.grad is not None})
    )  # fmt: skip
    metrics = trainer.step(0, batch).metrics
    return next(value for name, value in metrics.items() if name.startswith("loss/")), found


def padded(rows: SampleTable, pad: int) -> tuple[Tensor, Tensor]:
    """Prompt and answer of each sample, right-padded, and its mask: [N, longest]."""
    texts = [
        np.concatenate([rows.prompts[rows.group_of[i]], rows.tokens[rows.starts[i] : rows.starts[i + 1]]])
        for i in range(rows.size)
    ]
    ids = torch.full((rows.size, max(map(len, texts))), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text.astype(np.int64)), 1
    return ids, mask


def plain(kind: Any, module: ScalarModel, start: Path) -> Any:
    """Transformers' own classifier with the module's weights, dropout off."""
    model = kind.from_pretrained(start, num_labels=1, dtype=torch.float32).eval()
    model.load_state_dict({n: p.detach().clone() for n, p in module.model.named_parameters()}, strict=True)
    return model


def assert_same(found: dict[str, Tensor], model: Any) -> None:
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5, name


# --- losses by hand


def test_the_preference_loss_by_hand() -> None:
    """Group 0: scores 2, 1, 1 → two pairs; group 1: a tie says nothing; group 2: one pair. ½ of it each group."""
    scores, group_of = torch.tensor([2.0, 1, 1, 5, 5, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    weights = pair_weights(scores, group_of)
    assert weights.tolist() == pytest.approx([0.25, 0.25, 0.25, 0, 0, 0.5, 0.5])
    values = torch.tensor([1.0, 0, 3, 9, 9, 2, 2], requires_grad=True)
    loss, metrics = preference_loss(values, scores, group_of, weights)

    def nll(margin: float) -> float:
        return math.log1p(math.exp(-margin))

    assert loss.item() == pytest.approx(0.25 * (nll(1) + nll(-2)) + 0.5 * nll(0))
    loss.backward()
    # d/dv of −log σ(m) is −σ(−m): the pair of equal values pulls with ½ of its ½
    assert values.grad is not None
    assert values.grad[5:].tolist() == pytest.approx([0.25, -0.25])
    assert metrics.means() == pytest.approx(
        {"loss/preference": loss.item(), "preference/accuracy": 1 / 3, "preference/margin": (1 - 2 + 0) / 3}
    )


def test_the_step_loss_by_hand() -> None:
    """Logits 0, log 3, log 3 (σ = ½, ¾, ¾) with labels 1, 1, ½; the one between ends no step."""
    values = torch.tensor([0.0, 100.0, math.log(3), math.log(3)])
    labels = torch.tensor([1.0, math.nan, 1.0, 0.5])
    loss, metrics = step_loss(values, labels, torch.full((4,), 1 / 3))
    soft = -0.5 * (math.log(3 / 4) + math.log(1 / 4))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3) + soft) / 3)
    assert metrics.means() == pytest.approx(
        {"loss/process": loss.item(), "process/accuracy": 1.0, "process/good_share": 1.0}
    )


def test_the_outcome_loss_by_hand() -> None:
    """Logits 0, −log 3 (σ = ½, ¼) with labels 1 and ½, at weights of ½; dL/dv = ½(σ(v) − y)."""
    values = torch.tensor([0.0, -math.log(3)], requires_grad=True)
    loss, metrics = outcome_loss(values, torch.tensor([1.0, 0.5]), torch.full((2,), 0.5))
    soft = -0.5 * (math.log(1 / 4) + math.log(3 / 4))
    assert loss.item() == pytest.approx((math.log(2) + soft) / 2)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.25, -0.125])
    assert metrics.means() == pytest.approx(
        {"loss/outcome": loss.item(), "outcome/accuracy": 0.5, "outcome/good_share": 1.0}
    )


# --- against transformers on padded batches


@pytest.mark.parametrize("share", [0, 100], ids=["whole", "shared prompts"])
@pytest.mark.parametrize("budget", [16_384, 60])
def test_a_reward_model_has_the_gradient_of_the_padded_classifier(start_dir: Path, budget: int, share: int) -> None:
    rows = answers(groups=5, size=2)
    scores = torch.tensor([1.0, 0.0] * 5)
    module = scalar(start_dir, "end")
    module.share_up_to = share
    model = plain(AutoModelForSequenceClassification, module, start_dir)
    loss, found = gradients(trainer_of(module, BradleyTerry(), budget), ScoredAnswers(rows, scores))
    ids, mask = padded(rows, model.config.pad_token_id)
    values = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    expected = -logsigmoid(values[0::2] - values[1::2]).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same(found, model)


@pytest.mark.parametrize("budget", [16_384, 60])
def test_a_pointwise_model_has_the_gradient_of_the_padded_classifier(start_dir: Path, budget: int) -> None:
    rows, labels = answers(groups=3, size=3), torch.rand(9, generator=torch.Generator().manual_seed(3))
    module = scalar(start_dir, "end")
    model = plain(AutoModelForSequenceClassification, module, start_dir)
    loss, found = gradients(trainer_of(module, YesNo(), budget), ScoredAnswers(rows, labels))
    ids, mask = padded(rows, model.config.pad_token_id)
    expected = binary_cross_entropy_with_logits(model(input_ids=ids, attention_mask=mask).logits[:, 0], labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same(found, model)


@pytest.mark.parametrize("budget", [16_384, 60])
def test_an_implicit_process_reward_has_the_gradient_of_two_padded_language_models(
    start_dir: Path, budget: int
) -> None:
    rows, labels, beta = answers(groups=3, size=3), torch.tensor([1.0, 0, 0.5] * 3), 0.7
    module, reference = (Policy(load_model(start_dir)) for _ in range(2))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) / 50)
    policy, other = (AutoModelForCausalLM.from_pretrained(start_dir, dtype=torch.float32).eval() for _ in range(2))
    policy.load_state_dict({n: p.detach().clone() for n, p in module.model.named_parameters()}, strict=False)
    trainer = trainer_of(module, ImplicitReward(beta), budget)
    trainer.reference = reference.requires_grad_(False)
    loss, found = gradients(trainer, ScoredAnswers(rows, labels))
    ids, mask = padded(rows, 0)

    def told(model: Any) -> list[Tensor]:
        """Log p of each answer's tokens, by sample."""
        logits = model(input_ids=ids, attention_mask=mask).logits
        chosen = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        at = [len(rows.prompts[g]) - 1 for g in rows.group_of]
        return [chosen[i, a : a + n] for i, (a, n) in enumerate(zip(at, rows.lengths, strict=True))]

    with torch.no_grad():
        theirs = told(other)
    ratios = [mine - ref for mine, ref in zip(told(policy), theirs, strict=True)]
    expected = binary_cross_entropy_with_logits(beta * torch.stack([r.sum() for r in ratios]), labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same(found, policy)


@pytest.mark.parametrize("share", [0, 100], ids=["whole", "shared prompts"])
@pytest.mark.parametrize("budget", [16_384, 60])
def test_a_process_reward_model_has_the_gradient_of_the_padded_classifier(
    start_dir: Path, budget: int, share: int
) -> None:
    rows = answers(groups=4, size=3)
    labels = torch.full((len(rows.tokens),), math.nan)
    ends = rows.starts[1:] - 1  # the final tokens, and the first of each answer
    labels[ends], labels[rows.starts[:-1]] = 1.0, 0.0
    module = scalar(start_dir, "after")
    module.share_up_to = share
    model = plain(AutoModelForTokenClassification, module, start_dir)
    loss, found = gradients(trainer_of(module, ProcessReward(), budget), LabelledSteps(rows, labels))
    ids, mask = padded(rows, 0)
    logits = model(input_ids=ids, attention_mask=mask).logits[..., 0]
    at = torch.tensor([len(rows.prompts[g]) for g in rows.group_of])
    said = torch.cat([logits[i, p : p + n] for i, (p, n) in enumerate(zip(at, rows.lengths, strict=True))])
    told = ~labels.isnan()
    expected = binary_cross_entropy_with_logits(said[told], labels[told])
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same(found, model)


def test_a_head_that_reads_final_tokens_names_what_its_objective_lacks(start_dir: Path) -> None:
    rows = answers(1, 1)
    with pytest.raises(ValueError, match=r"reads=end: .* lacks Needs\.feed_last"):
        scalar(start_dir, "end")(lay_out(rows, [0]))


# --- they learn


def test_pair_accuracy_rises_until_all_pairs_are_ordered(start_dir: Path) -> None:
    rows, scores = answers(groups=12, size=3, seed=4), torch.tensor([2.0, 0.0, 1.0] * 12)
    trainer = trainer_of(ScalarModel(load_scalar(start_dir, "end"), "end"), BradleyTerry())
    rows_of = [trainer.step(step, ScoredAnswers(rows, scores)).metrics for step in range(40)]
    assert rows_of[0]["loss/preference"] == pytest.approx(math.log(2))  # the head begins at 0
    assert rows_of[0]["preference/accuracy"] == 0
    assert rows_of[-1]["preference/accuracy"] == 1
    assert rows_of[-1]["loss/preference"] < 0.1


def test_labelled_steps_are_learned(start_dir: Path) -> None:
    rows = answers(groups=6, size=2, seed=5)
    labels = torch.from_numpy((rows.tokens % 2).astype(np.float32))
    trainer = trainer_of(ScalarModel(load_scalar(start_dir, "after"), "after"), ProcessReward())
    told = [trainer.step(step, LabelledSteps(rows, labels)).metrics for step in range(40)]
    assert told[0]["loss/process"] == pytest.approx(math.log(2))
    assert told[-1]["process/accuracy"] == 1


# --- what is saved


KINDS = {"end": AutoModelForSequenceClassification, "after": AutoModelForTokenClassification}


@pytest.mark.parametrize("reads", ["end", "after"])
def test_a_saved_scalar_opens_as_the_class_of_its_head_and_says_the_same(
    reads: Reads, tmp_path: Path, start_dir: Path
) -> None:
    module = scalar(start_dir, reads)
    trainer = trainer_of(module, BradleyTerry() if reads == "end" else ProcessReward())
    tokenizer = AutoTokenizer.from_pretrained(start_dir)
    path = checkpoint.save(tmp_path, ALONE, TrainerState.of(1, trainer), module.model, tokenizer, trainer, {})
    assert path is not None
    opened, told = KINDS[reads].from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert opened.config.architectures == [type(opened).__name__]
    assert opened.config.num_labels == 1
    rows = answers(2, 2)
    ids, mask = padded(rows, opened.config.pad_token_id)
    packed = lay_out(rows, range(4), feed_last=True)
    with torch.no_grad():
        here, there = module(packed).values, opened.eval()(input_ids=ids, attention_mask=mask).logits
        again = ScalarModel(load_scalar(path, reads), reads)(packed).values
    at = [len(rows.prompts[g]) for g in rows.group_of]
    if reads == "after":
        there = torch.cat([there[i, p : p + n, 0] for i, (p, n) in enumerate(zip(at, rows.lengths, strict=True))])
    assert (here - there.flatten()).abs().max() < 1e-5
    assert torch.equal(here, again)


def test_a_saved_policy_names_the_language_models_class(tmp_path: Path, start_dir: Path) -> None:
    model = load_model(start_dir)
    checkpoint.write_model(tmp_path, model, AutoTokenizer.from_pretrained(start_dir), checkpoint.gather(Policy(model)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == ["Qwen3ForCausalLM"]

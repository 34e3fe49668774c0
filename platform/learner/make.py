"""From a configuration to a Trainer: what each job trains, with which optimizer, on which objective.

role.py, synchronous.py ──► make_trainer. Each module is made by ``trained``: optimizer, shards, schedule, one Trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from offtrail.algos.config import CriticConfig, PpoConfig
from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config, OptimConfig
from offtrail.platform.learner.adapters import AdaptedReference
from offtrail.platform.learner.gradients import GradientBlock
from offtrail.platform.learner.objectives import Likelihood, Loss, Objective, PolicyGradient, ValueRegression
from offtrail.platform.learner.reward_objectives import BradleyTerry, ImplicitReward, ProcessReward, YesNo
from offtrail.platform.learner.train import Schedule, Trained, Trainer, adamw, cosine, warmup
from offtrail.platform.learner.world import World
from offtrail.platform.model import lora
from offtrail.platform.model.check import checked
from offtrail.platform.model.packing import SampleTable
from offtrail.platform.model.policy import PackedModel, Policy, load_model
from offtrail.platform.model.scalar import Reads, ScalarModel, load_scalar
from offtrail.platform.model.scores import ScoreSpec
from offtrail.platform.model.start import resolve
from offtrail.platform.runtime.activity import Activity


def make_trainer(config: Config, world: World, model: Any, start: Path, activity: Activity) -> Trainer[Batch]:
    """job=rl: the policy ``model``; the reference policy and the critic, from ``start``, where the objective needs
    them.
    """
    objective, optim = PolicyGradient(config), config.learner.optim
    policy = trained(world, "policy", make_policy(config, model), objective, optim, warmup(optim))
    policy.watch_gradient = config.tracking.gradient_cosine
    modules = [policy]
    if isinstance(config.algo, PpoConfig):
        modules.append(make_critic(config, config.algo, world, start, vocabulary=int(model.config.vocab_size)))
        policy.first_step = config.algo.critic.pretrain_steps
    reference: Policy | AdaptedReference | None = None
    if config.algo.needs_ref:
        if config.learner.lora.rank:
            assert isinstance(policy.module, Policy)
            reference = AdaptedReference(policy.module)
        else:
            again = load_model(start, given=config.model.path, device=config.learner.device)
            reference = world.shard(make_policy(config, again).requires_grad_(False))
    return Trainer(
        world,
        objective,
        modules,
        activity,
        budget=config.learner.tokens_per_microbatch,
        reference=reference,
        ref_refresh=config.algo.ref_refresh,
    )


def make_sft_trainer(config: Config, world: World, model: Any, activity: Activity) -> Trainer[SampleTable]:
    """job=sft: ``model`` on the likelihood of answers."""
    objective, settings, sft = Likelihood(), config.learner, config.sft
    optim = OptimConfig(lr=sft.lr, betas=sft.betas, grad_clip=settings.optim.grad_clip)
    policy = trained(world, "policy", make_policy(config, model), objective, optim, cosine(sft))
    policy.lr_key = "sft.lr"
    if settings.lora.dropout:
        lora.drop_out(policy.module)
    return Trainer(world, objective, [policy], activity, budget=settings.tokens_per_microbatch)


def make_head_trainer(config: Config, world: World, model: Any, start: Path, activity: Activity) -> Trainer[Any]:
    """job=reward_model, job=prm: ``model`` with a scalar head; or, of an implicit process reward, a policy beside its
    reference.
    """
    head, settings = config.head, config.learner
    assert head is not None
    optim = OptimConfig(lr=head.lr, betas=head.betas, grad_clip=settings.optim.grad_clip)
    objective: Objective[Any, Any]
    module: PackedModel[Any]
    reference, reads = None, head_reads(config)
    if reads is None:
        objective, module = ImplicitReward(config.prm.beta), make_policy(config, model)
        origin = reference_of(config, start)
        check_same_tokenizer(config, start, origin)
        again = load_model(origin, given=config.prm.reference, device=settings.device)
        reference = world.shard(make_policy(config, again).requires_grad_(False))
    else:
        pairwise = config.reward_model.objective == "pairwise"
        objective = ProcessReward() if reads == "after" else BradleyTerry() if pairwise else YesNo()
        module = checked(
            lambda: ScalarModel(
                model, reads, dtype=settings.dtype, activation_checkpointing=settings.activation_checkpointing,
                liger=settings.liger,
            ),
            model, what=f"model.path={config.model.path or start}", longest=config.model.max_length, feed_last=True,
        )  # fmt: skip
    one = trained(world, config.job, module, objective, optim, cosine(head))
    one.lr_key = f"{config.job}.lr"
    return Trainer(
        world,
        objective,
        [one],
        activity,
        budget=settings.tokens_per_microbatch,
        reference=reference,
        scores=score_spec(config, start),
    )


def head_reads(config: Config) -> Reads | None:
    """Where the scalar head of a job that trains a model to score is read; None where it has none."""
    if config.job == "reward_model":
        return "end"
    return "after" if config.job == "prm" and config.prm.objective == "steps" else None


def reference_of(config: Config, start: Path) -> Path:
    """The folder of π_ref of an implicit process reward."""
    return resolve(config.prm.reference) if config.prm.reference else start.resolve()


def check_same_tokenizer(config: Config, start: Path, reference: Path) -> None:
    """Raise ValueError where π and π_ref do not speak of the same tokens."""
    if AutoTokenizer.from_pretrained(reference).get_vocab() != AutoTokenizer.from_pretrained(start).get_vocab():
        raise ValueError(
            f"prm.reference={config.prm.reference}: its tokenizer is not that of "
            f"model.path={config.model.path or start}, and they would speak of other tokens; name a model with "
            "the same one, or leave it empty"
        )


def score_spec(config: Config, start: Path) -> ScoreSpec:
    """How what a job has trained to score is to be read (scores.json)."""
    model, prm = config.reward_model, config.prm
    if config.job == "reward_model":
        return ScoreSpec("outcome", model.reads, squash="none" if model.objective == "pairwise" else "sigmoid")
    steps = {"by": "newline", **prm.cut}
    if prm.objective == "steps":
        return ScoreSpec("steps", steps=steps, squash="sigmoid")
    return ScoreSpec("steps", steps=steps, beta=prm.beta, reference=str(reference_of(config, start)))


def load_trained(config: Config, checkpoint: Path | None, start: Path) -> Any:
    """The model that is trained, as it is in a checkpoint or (None) at the start. With learner.lora it is the start
    model in either case, with adapters, which checkpoint.restore gives their values.
    """
    settings = config.learner
    given, origin = ("", checkpoint) if checkpoint is not None else (config.model.path, start)
    if (reads := head_reads(config)) is not None:
        return load_scalar(origin, reads, device=settings.device, key="model.path")
    if not settings.lora.rank:
        return load_model(origin, given=given, device=settings.device)
    model = load_model(start, given=config.model.path, device=settings.device)
    return lora.add(model, settings.lora, config.seed)


def make_critic(config: Config, algo: PpoConfig, world: World, start: Path, *, vocabulary: int) -> Trained:
    """The critic of algo=ppo, from algo.critic.path or the start model, in the policy's world. Its head begins at 0, so
    that at first advantages are returns.

    Raises ValueError where its vocabulary is smaller than the policy's: it could not read every answer.
    """
    settings, learner = algo.critic, config.learner
    model = load_scalar(settings.path or start, "before", device=learner.device)
    if model.config.vocab_size < vocabulary:
        raise ValueError(
            f"algo.critic.path={settings.path}: has {model.config.vocab_size} tokens, the policy {vocabulary}; take "
            "a model with the policy's tokenizer, or leave it empty"
        )
    module = checked(
        lambda: ScalarModel(
            model, "before", dtype=learner.dtype, activation_checkpointing=learner.activation_checkpointing,
            liger=learner.liger,
        ),
        model, what=f"algo.critic.path={settings.path or start}", longest=config.model.max_length,
    )  # fmt: skip
    critic = trained(world, "value", module, ValueRegression(algo.value_clip), settings, warmup(settings))
    critic.charges, critic.lr_key = ("value_tokens", "value_flops"), "algo.critic.lr"
    return critic


def trained(
    world: World,
    name: str,
    module: PackedModel[Any],
    objective: Loss[Any],
    optim: OptimConfig | CriticConfig,
    schedule: Schedule,
) -> Trained:
    """A module with an AdamW of its own, sharded over the world."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = adamw(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, decay=optim.weight_decay)
    module, optimizer = world.prepare(module, optimizer)
    made = Trained(name, module, objective, optimizer, schedule, optim.grad_clip)
    if world.size == 1 and world.device.type == "cpu":  # FSDP2 and a GPU's allocator have ways of their own
        made.block = GradientBlock(made.parameters)
    return made


def make_policy(config: Config, model: Any) -> Policy:
    """A policy as the learner's config has it. Raises ModelError where it is not what ``model`` itself computes."""
    settings = config.learner
    return checked(
        lambda: Policy(
            model,
            dtype=settings.dtype,
            head_dtype=settings.head_dtype,
            activation_checkpointing=settings.activation_checkpointing,
            liger=settings.liger,
        ),
        model,
        what=f"model.path={config.model.path or model.name_or_path}",
        longest=config.model.max_length,
    )

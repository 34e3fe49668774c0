"""Whether this platform computes a model as the model's own forward does, found out at load on a few random tokens.

    learner/make.py ──► checked: transformers' own forward, eager, a sample at a time
                                 what is trained: fused, packed, the head in pieces ──► the same numbers, or ModelError

What a ForCausalLM does to its logits behind lm_head, a state that runs on from one packed sample into the next, an
attention that ours is not, or dropout would else make every log-probability wrong without a word. Both sides are
float32 here, whatever learner.dtype is, so that a difference is never rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from offtrail.platform.config.errors import FinalError
from offtrail.platform.model import attention
from offtrail.platform.model.lora import PARTS, adapters_of
from offtrail.platform.model.packing import Packed, SampleTable, lay_out
from offtrail.platform.model.policy import PackedModel, Policy
from offtrail.platform.model.scalar import ScalarModel

PROMPTS, ANSWERS = (7, 4), ((5, 3), (1, 6))
"""Tokens of the prompts, and of each prompt's answers."""
ABSOLUTE, RELATIVE = 5e-3, 5e-4
"""Far above float32's rounding in a deep model, and below what a formula that differs does to one that is trained: of
random small models, whose logits are small, the least seen is 3e-2.
"""
MULTIPLIERS = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Keys of a config.json that some architecture multiplies its logits with, and another divides them by."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""… and that bound them."""

P = TypeVar("P", bound=PackedModel[Any])


class ModelError(FinalError):
    """The learner would compute something else than the model does."""


def checked(build: Callable[[], P], model: Any, *, what: str, longest: int, feed_last: bool = False) -> P:
    """What ``build`` makes of the transformers model ``model``, once its numbers are the model's own.

    Of the ways to treat logits that the model's config.json allows, a policy takes the one that is the model's. Nothing
    of the model is changed. ``longest``: tokens of the longest sample to come; ``feed_last``: see packing.lay_out.

    Raises ModelError, which begins with ``what`` (key=value) and names what the difference comes from.
    """
    if reason := _changes_with_length(model.config, longest):
        raise ModelError(f"{what}: {reason}")
    rows = few_samples(model)
    with torch.no_grad(), _filled_head(model), _filled_adapters(model):
        with _named(what, model):
            own = _own_numbers(model, rows, feed_last)
        if not bool(torch.isfinite(own).all()):
            raise ModelError(f"{what}: {_name(model)} gives numbers that are not finite; its weights are damaged")
        built = build()
        with _named(what, model), _in_float32(built):
            alone, packed = _gaps(built, model, rows, own, longest, feed_last)
    if not (alone <= 1 and packed <= 1):
        raise ModelError(f"{what}: {_reason(model, alone)}")
    return built


def few_samples(model: Any) -> SampleTable:
    """Two groups of two answers, random tokens at temperature 1."""
    rng = np.random.default_rng(0)
    vocabulary = np.arange(model.get_input_embeddings().num_embeddings)
    vocabulary = vocabulary[vocabulary != model.config.pad_token_id]  # which a classifier of sequences looks for
    lengths = [length for answers in ANSWERS for length in answers]
    return SampleTable(
        prompts=tuple(rng.choice(vocabulary, length).astype(np.int32) for length in PROMPTS),
        group_of=np.repeat(np.arange(len(PROMPTS)), [len(answers) for answers in ANSWERS]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=rng.choice(vocabulary, sum(lengths)).astype(np.int32),
        temperatures=np.ones(len(PROMPTS), np.float32),
        ids=np.arange(len(PROMPTS)),
    )


def _own_numbers(model: Any, rows: SampleTable, feed_last: bool) -> Tensor:
    """By the model's own forward: the log-probability of each output token [T], or the number at the end of each
    sample [N].
    """
    model.set_attn_implementation("eager")
    try:
        return torch.cat([_own_number(model, rows, i, feed_last) for i in range(rows.size)])
    finally:
        model.set_attn_implementation(attention.NAME)


def _own_number(model: Any, rows: SampleTable, sample: int, feed_last: bool) -> Tensor:
    prompt = rows.prompts[rows.group_of[sample]]
    whole = np.concatenate([prompt, rows.tokens[rows.starts[sample] : rows.starts[sample + 1]]]).astype(np.int64)
    ids = torch.from_numpy(whole).to(model.device)
    fed = ids if feed_last else ids[:-1]
    logits: Tensor = model(input_ids=fed[None], use_cache=False).logits[0].float()
    if model.get_output_embeddings() is None:  # a classifier: one number of the sequence, or of each token
        return logits.reshape(-1)[-1:]
    targets = ids[len(prompt) :, None]
    return torch.log_softmax(logits[len(prompt) - 1 :], -1).gather(1, targets)[:, 0]


def _gaps(
    built: PackedModel[Any], model: Any, rows: SampleTable, own: Tensor, longest: int, feed_last: bool
) -> tuple[float, float]:
    """The largest difference, in tolerances: of samples alone, and of samples packed together."""

    def gap(packs: Sequence[Sequence[int]], share: int) -> float:
        laid = [lay_out(rows, samples, share_up_to=share, feed_last=feed_last).to(own.device) for samples in packs]
        numbers = torch.cat([_numbers(built, _Longest.of(packed, longest)) for packed in laid])
        return float(((numbers - own).abs() / (ABSOLUTE + RELATIVE * own.abs())).nan_to_num(torch.inf).max())

    everything = range(rows.size)
    one_by_one = [[i] for i in everything]
    if isinstance(built, Policy):
        found = []
        for way in _ways(model.config):
            built.logit_scale, built.logit_cap = way
            found.append((gap(one_by_one, 0), way))
        alone, (built.logit_scale, built.logit_cap) = min(found)
    else:
        alone = gap(one_by_one, 0)
    return alone, max(gap([everything], share) for share in {0, built.share_up_to})


def _numbers(built: PackedModel[Any], packed: Packed) -> Tensor:
    numbers: Tensor = built(packed)[0]
    if isinstance(built, ScalarModel) and built.reads != "end":
        numbers = numbers[packed.ends]
    return numbers


class _Longest(Packed):
    """A micro-batch that says of itself that it holds a sample of the longest kind: what each layer refuses then."""

    limit: int

    @classmethod
    def of(cls, packed: Packed, limit: int) -> _Longest:
        made = cls(**vars(packed))
        object.__setattr__(made, "limit", limit)
        return made

    @property
    def longest(self) -> int:
        return self.limit


def _ways(config: Any) -> list[tuple[float, float]]:
    """(factor, cap) of the logits, 0 = no cap: every way that the keys there are may mean."""
    factors = [float(v) for key in MULTIPLIERS if isinstance(v := getattr(config, key, None), int | float) and v]
    caps = [float(v) for key in CAPS if isinstance(v := getattr(config, key, None), int | float) and v]
    return [(1.0, 0.0), *((f, 0.0) for v in factors for f in (v, 1 / v)), *((1.0, cap) for cap in caps)]


def _changes_with_length(config: Any, longest: int) -> str:
    """What the few tokens of the comparison cannot show; empty where there is nothing."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and longest > chunk and "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return (
            f"it attends within chunks of {chunk} tokens (attention_chunk_size), the learner over whole samples; set "
            f"model.max_length ≤ {chunk}"
        )
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        limit = part.get("original_max_position_embeddings") or config.max_position_embeddings
        if part.get("rope_type") in ("dynamic", "longrope") and longest > limit:
            return (
                f"its positions (rope_type={part['rope_type']}) change with the longest sample of a micro-batch "
                f"beyond {limit} tokens; set model.max_length ≤ {limit}"
            )
    return ""


def _reason(model: Any, alone: float) -> str:
    """What is wrong, and the way out."""
    if alone <= 1:
        return (
            f"{_name(model)} lets samples that are packed into one sequence see each other: some of its layers are not "
            "the attention that the learner replaces (state-space layers, convolutions, an attention of its own); take "
            "a model whose layers are attention and MLPs"
        )
    keys = (*MULTIPLIERS, *CAPS, "attn_logit_softcapping")
    named = [f"{key}={value}" for key in keys if (value := getattr(model.config, key, None)) not in (None, 0, 1)]
    because = f"; its config.json has {', '.join(named)}" if named else ""
    return (
        f"the learner's numbers are not those of {_name(model)}'s own forward, which does more than its layers and its "
        f"head{because}; take a model of another architecture"
    )


@contextlib.contextmanager
def _named(what: str, model: Any) -> Iterator[None]:
    """Whatever a forward raises, as a ModelError."""
    try:
        yield
    except Exception as error:  # an architecture may fail in any way
        words = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: the learner cannot compute {_name(model)}: {words}") from error


def _name(model: Any) -> str:
    return str(type(model).__name__)


@contextlib.contextmanager
def _filled_head(model: Any) -> Iterator[None]:
    """A scalar head begins at 0, which would hide every difference: meanwhile it holds other numbers."""
    head = getattr(model, "score", None) if model.get_output_embeddings() is None else None
    if head is None or any(bool(p.any()) for p in head.parameters()):
        yield
        return
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).view_as(head.weight))
    try:
        yield
    finally:
        with torch.no_grad():
            head.weight.copy_(before)


@contextlib.contextmanager
def _filled_adapters(model: Any) -> Iterator[None]:
    """Adapters begin at 0, too: a layer that passed them by would not be seen."""
    parts = [p for name, p in adapters_of(model).items() if f".{PARTS[1]}." in name]
    for part in parts:
        part.data.copy_(torch.linspace(-0.05, 0.05, part.numel()).view_as(part))
    try:
        yield
    finally:
        for part in parts:
            part.data.zero_()


@contextlib.contextmanager
def _in_float32(built: PackedModel[Any]) -> Iterator[None]:
    rounded = {name: getattr(built, name) for name in ("autocast", "products") if hasattr(built, name)}
    built.autocast = False
    if isinstance(built, Policy):
        built.products = torch.float32
    try:
        yield
    finally:
        for name, value in rounded.items():
            setattr(built, name, value)

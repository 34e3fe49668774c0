"""A transformers model on packed samples; the policy: log-probability and entropy of each output token.

    PackedModel   the decoder on flat tokens (attention.py): dtype, kernels, checkpointing
      Policy        and the language model's head (head.py)
      ScalarModel   and one number a token or a sample (scalar.py)

train.py calls ``loss`` of either, which is all that an update needs to know of a head.

Invariant (I5): log-probabilities are of the logits divided by the group's sampling temperature, in float32, over the
full vocabulary, so that they are comparable with the engine's.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from offtrail.platform.model import attention
from offtrail.platform.model.cost import Cost, active, cost_of
from offtrail.platform.model.fused import fuse
from offtrail.platform.model.head import (
    Head,
    LossOf,
    Reference,
    TokenOutputs,
    default_elements,
    loss_in_head,
    pieces,
    token_logprobs,
)
from offtrail.platform.model.lean import keeping_less, lean
from offtrail.platform.model.liger import apply as apply_liger
from offtrail.platform.model.packing import Packed
from offtrail.platform.runtime.host_memory import give_back_freed


def load_model(path: Path | str, *, given: str = "", device: torch.device | str = "cpu") -> Any:
    """A causal language model from a Hugging Face directory or name, in float32, with packed attention.

    Parameters are float32 whatever learner.dtype says: in bfloat16, AdamW's updates at the learning rates of RL would
    be rounded away. It stays in eval mode: dropout has no place in a ratio of probabilities.

    Raises ValueError where transformers does not know the architecture (code that comes with a model is not run), and
    where its tensors are not those in the files, in name and shape; errors name ``given``, what the user typed.
    """
    kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.path={given or path}: model_type={kind} is none of transformers {transformers.__version__}'s own, "
            "and code that comes with a model is not run; take another model, or a newer transformers"
        )
    model = from_files(AutoModelForCausalLM, path, f"model.path={given or path}")
    model.config.use_cache = False
    return model.to(device).eval()


def from_files(kind: Any, path: Path | str, what: str, *, new_head: bool = False, **settings: Any) -> Any:
    """``kind.from_pretrained`` in float32, with packed attention. With ``new_head``, tensors outside the decoder that
    are not in the files begin at 0.

    Raises ValueError, beginning with ``what``, where another is not there or has another shape (transformers draws it
    at random, and only logs that), or where the files hold one that the model (the decoder) has no place for: it would
    be left out.
    """
    model, told = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention.NAME, output_loading_info=True,
        ignore_mismatched_sizes=True, **settings,
    )  # fmt: skip
    decoder = f"{model.base_model_prefix}." if new_head else ""
    new = {name for name in told["missing_keys"] if not name.startswith(decoder)}
    if missing := sorted(told["missing_keys"] - new):
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"{what}: its weights lack {missing[0]}{others}, which would be random numbers; download or save it again"
        )
    if beyond := sorted(name for name in told["unexpected_keys"] if name.startswith(decoder)):
        others = f" and {len(beyond) - 1} more" if beyond[1:] else ""
        raise ValueError(
            f"{what}: its weights hold {beyond[0]}{others}, which its config.json has no place for, and would be left "
            "out; give the config.json that they were saved with"
        )
    if wrong := sorted(told["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise ValueError(
            f"{what}: {name} is {list(found)} in its weights, but {list(wanted)} by its config.json; give the "
            "config.json that it was saved with"
        )
    for name in new:
        nn.init.zeros_(model.get_parameter(name))
    return model


_HOLES = 1 << 26
"""Freed bytes from which on giving them back costs nothing beside a forward pass that leaves so many."""
_LAYERS = 10
"""Decoder layers from one such place to the next."""
Out = TypeVar("Out", bound=tuple[Tensor | None, ...])
"""What a head says: a NamedTuple of tensors, the first with one number a row. A row is a token, or a sample."""


class PackedModel(nn.Module, ABC, Generic[Out]):
    """A transformers model with a head, on packed samples. ``model`` is transformers' module, names unchanged.

    The root of the FSDP2 world: its forward gathers embedding, final norm and head, that of a decoder layer its own; so
    a head is computed inside ``forward``. With ``dtype`` bfloat16 the decoder runs under autocast. On a CPU the layers
    that fused.py knows are fused in float32, and keep less (lean.py) in bfloat16; on CUDA ``liger`` (auto, always,
    never) decides on Liger's kernels. With ``activation_checkpointing`` a decoder layer keeps only its input and runs
    again in backward.
    """

    def __init__(
        self, model: Any, *, dtype: str = "float32", activation_checkpointing: bool = False, liger: str = "auto"
    ) -> None:
        super().__init__()
        on_cpu = model.device.type == "cpu"
        plain = dtype == "float32" and on_cpu
        apply_liger(model, liger)
        self.model: Any = fuse(model) if plain else model
        self.keeps_less = on_cpu and not activation_checkpointing
        if self.keeps_less and not plain:
            lean(model)
            _give_back_between(model.base_model.layers)
        if activation_checkpointing:
            for layer in model.base_model.layers:
                kind: Any = type(layer)
                layer.__class__ = _checkpointed(kind)
        self.autocast = dtype == "bfloat16"
        self.cost = cost_of(model)
        """Of a forward pass, a token."""
        self.runs_again = activation_checkpointing
        self.share_up_to = attention.SHARE_UP_TO if plain else 0
        """Longest sequence for packing's shared layout."""
        self.quadratic = _quadratic(model)
        """Attention's operations for a sample of L tokens are ``quadratic``·L² where the linear layers' are L."""

    def forward_flops(self, packed: Packed) -> float:
        """Of one forward pass over a micro-batch, its head at the predicted tokens."""
        return self.cost.total(
            tokens=packed.input_ids.numel(), heads=len(packed.targets), attended=packed.attended
        )  # fmt: skip

    def training_flops(self, packed: Packed) -> tuple[float, float]:
        """Of forward and backward: model FLOPs, and what the hardware does beside them where layers run again (not
        counted: a large head's second pass over its tiles).
        """
        F, M, seen = packed.input_ids.numel(), len(packed.targets), packed.attended
        model = 2 * self.forward_flops(packed) + self.trained_cost.total(tokens=F, heads=M, attended=seen)
        return model, self.cost.total(tokens=F, heads=0, attended=seen) if self.runs_again else 0.0

    @cached_property
    def trained_cost(self) -> Cost:
        """What gradients of the trained weights cost a token, and attention's, which has two inputs to give one to."""
        table, output = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        head = None if output is None else output.weight
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        sizes: dict[str, float] = {n: p.numel() for n, p in trained.items() if p is not table and p is not head}
        trains_head = any(p is head for p in trained.values())
        body = 2 * active(sizes, self.model.config.to_dict())
        return Cost(self.cost.head if trains_head else 0.0, body, self.cost.attention)

    @abstractmethod
    def loss(
        self, packed: Packed, loss: Callable[[slice, Out], Tensor], reference: Reference | None = None
    ) -> tuple[Tensor, Out]:
        """The sum of ``loss`` over slices of the micro-batch's rows (whole samples), and what the head said of all of
        them, without gradient.
        """

    @abstractmethod
    def samples_of(self, packed: Packed) -> Tensor:
        """The sample of each row."""

    def tokens_of(self, packed: Packed) -> Tensor:
        """The place in the table's tokens of what each row is of."""
        return packed.tokens

    def hidden(self, packed: Packed, places: Tensor) -> Tensor:
        """The decoder's hidden states [M, H] at flat ``places`` [M]; within ``forward`` only."""
        if self.keeps_less:
            give_back_freed(_HOLES)  # of the micro-batch before, in sizes that another layer may not fit into
        less = keeping_less() if self.keeps_less and torch.is_grad_enabled() else contextlib.nullcontext()
        kind = packed.input_ids.device.type
        # Autocast's cache would hold every rounded weight until the last layer, and each is read once.
        with less, torch.autocast(kind, torch.bfloat16, enabled=self.autocast, cache_enabled=kind != "cpu"):
            hidden = self.model.base_model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
            ).last_hidden_state[0]
        rows: Tensor = hidden.index_select(0, places)
        if self.keeps_less:
            give_back_freed(_HOLES)  # between the activations, before the head takes its logits
        return rows


class Policy(PackedModel[TokenOutputs]):
    """A causal language model: its rows are the output tokens. ``head_dtype`` is that of the head's products, which are
    summed in float32 always; ``elements``: logits held at a time (head.py).

    What some architectures do with the head's logits, check.py finds out: ``logit_scale`` multiplies them,
    ``logit_cap`` keeps them within ±cap (0: nothing does).
    """

    logit_scale, logit_cap = 1.0, 0.0

    def __init__(
        self,
        model: Any,
        *,
        dtype: str = "float32",
        head_dtype: str = "float32",
        activation_checkpointing: bool = False,
        liger: str = "auto",
        elements: int | None = None,
    ) -> None:
        super().__init__(model, dtype=dtype, activation_checkpointing=activation_checkpointing, liger=liger)
        self.products: torch.dtype = getattr(torch, head_dtype)
        self.elements = elements

    def samples_of(self, packed: Packed) -> Tensor:
        """The sample of each output token."""
        return packed.samples

    def outputs(self, packed: Packed, reference: Reference | None = None) -> TokenOutputs:
        """Log-probability, full-vocabulary entropy and, with a reference, exact KL(π‖ref) of the micro-batch's output
        tokens: [M] float32 each, all with gradient.
        """
        scores: TokenOutputs = self(packed, reference=reference, task="outputs")
        return scores

    def loss(self, packed: Packed, loss: LossOf, reference: Reference | None = None) -> tuple[Tensor, TokenOutputs]:
        """The sum of ``loss`` over pieces of whole samples, taken inside the head (head.loss_in_head), and the scores
        without gradient.

        The slice that ``loss`` gets is of the micro-batch's predicted tokens [M].
        """
        out: tuple[Tensor, TokenOutputs] = self(packed, reference=reference, loss=loss, task="loss")
        return out

    @torch.no_grad()
    def reference(self, packed: Packed) -> Reference:
        """What another model's exact KL on the same micro-batch compares with."""
        out: Reference = self(packed, task="reference")
        return out

    def forward(
        self,
        packed: Packed,
        *,
        task: str = "logprobs",
        reference: Reference | None = None,
        loss: LossOf | None = None,
    ) -> Any:
        """(log-probabilities [M], entropies [M] without gradient); or what ``scores``, ``loss``, ``reference`` say."""
        rows, head = self.hidden(packed, packed.predict), self._head()
        if self.logit_scale != 1.0:
            rows = rows * self.logit_scale
        if task == "reference":
            return Reference(rows, head)
        at = (packed.targets, packed.inverse_temperature)
        if task == "loss" and loss is not None:
            cut = pieces(packed.lengths, len(head.weight), self.elements or default_elements(head.weight))
            return loss_in_head(rows, head, at[0], loss, at[1], pieces=cut, reference=reference, elements=self.elements)
        scores = token_logprobs(rows, head, *at, reference=reference, elements=self.elements)
        return scores if task == "outputs" else (scores.logprobs, scores.entropy.detach())

    def _head(self) -> Head:
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(self, FSDPModule) and not weight.requires_grad:
            # What FSDP2 gathered it takes back when this forward ends; a reference is read after that.
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
        if bias is not None and self.logit_scale != 1.0:
            bias = bias * self.logit_scale
        return Head(weight, bias, self.products, self.logit_cap)


class _Checkpointed:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _give_back_between(layers: Any) -> None:
    """Some times in each pass, forward and backward, give back what its temporaries have left: in bfloat16 they are of
    so many sizes that the holes grow with every layer.
    """

    def after(module: Any, given: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        give_back_freed(_HOLES)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: give_back_freed(_HOLES))

    for layer in layers[_LAYERS - 1 : -1 : _LAYERS]:
        layer.register_forward_hook(after)


@cache
def _checkpointed(kind: Any) -> Any:
    """A layer's class, by the same name, that runs its forward again in backward; one per kind, for FSDP2 wraps by
    class. Transformers' own switch works in train mode only.
    """
    return type(kind.__name__, (_Checkpointed, kind), {})


def _quadratic(model: Any) -> float:
    """Forward operations of L tokens: 2PL in P weights, and 2·layers·heads·D·L² in causal attention."""
    config, table = model.config, model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and table is head.weight
    weights = sum(p.numel() for p in model.parameters()) - (0 if tied else table.numel())
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(config.num_hidden_layers * width / weights)

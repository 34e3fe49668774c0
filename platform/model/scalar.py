"""A decoder with a scalar head: the value of a state, a sample's reward, the reward of a step.

learner/make.py makes one for PPO's critic, for reward models and for process reward models; train.py calls ``loss``.
The module is transformers' own for sequence or token classification with one label, so that what is saved opens there.

Invariant: the number is float32 whatever the decoder's dtype is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from offtrail.platform.model.head import Reference
from offtrail.platform.model.packing import Packed
from offtrail.platform.model.policy import PackedModel, from_files

Reads = Literal["before", "after", "end"]
"""Where: in the state that each output token is drawn in (a critic); at each output token (process rewards); or once a
sample, at its final token (a reward model). The last two need Needs.feed_last."""


class ScalarOutputs(NamedTuple):
    """Float32, one a row, differentiable."""

    values: Tensor


def load_scalar(path: Path | str, reads: Reads, *, device: torch.device | str = "cpu") -> Any:
    """Transformers' classifier of one label over the decoder of a Hugging Face directory or name, in float32, with
    packed attention: for sequences (a head without bias) or, where every output token is read, for tokens (with one).

    A head that the directory lacks, as a language model's does, begins at 0. Raises ValueError where transformers has
    no such classifier for the architecture, or a tensor of the decoder is not in the files.
    """
    kind: Any = AutoModelForTokenClassification if reads == "after" else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(path)
    if type(config) not in kind._model_mapping:
        raise ValueError(
            f"{path}: transformers has no {kind.__name__.removeprefix('AutoModelFor')} for {config.model_type}; a "
            "scalar head needs another architecture (for algo=ppo: algo.critic.path)"
        )
    model = from_files(kind, path, f"algo.critic.path={path}", new_head=True, num_labels=1)
    if not hasattr(model, "score"):
        raise ValueError(f"{path}: {type(model).__name__} has no linear head named score; take another architecture")
    model.config.use_cache = False
    return model.to(device).eval()


class ScalarModel(PackedModel[ScalarOutputs]):
    """``model`` as load_scalar gives it; its rows are the output tokens, or with ``reads`` = "end" the samples."""

    def __init__(
        self,
        model: Any,
        reads: Reads,
        *,
        dtype: str = "float32",
        activation_checkpointing: bool = False,
        liger: str = "auto",
    ) -> None:
        super().__init__(model, dtype=dtype, activation_checkpointing=activation_checkpointing, liger=liger)
        self.reads = reads

    def samples_of(self, packed: Packed) -> Tensor:
        """The sample of each row."""
        return packed.samples.index_select(0, packed.ends) if self.reads == "end" else packed.samples

    def forward(self, packed: Packed) -> ScalarOutputs:
        """The number of each row, with gradient."""
        head = self.model.score
        # mv and not linear(…).squeeze(1): FSDP2's hooks do not hold on a view.
        values = torch.mv(self.hidden(packed, self._places(packed)).float(), head.weight[0].float())
        return ScalarOutputs(values if head.bias is None else values + head.bias.float())

    def loss(
        self, packed: Packed, loss: Callable[[slice, ScalarOutputs], Tensor], reference: Reference | None = None
    ) -> tuple[Tensor, ScalarOutputs]:
        """``loss`` of all rows at once, and their numbers without gradient; there is no reference for a scalar."""
        out: ScalarOutputs = self(packed)
        return loss(slice(0, len(out.values)), out), ScalarOutputs(out.values.detach())

    def _places(self, packed: Packed) -> Tensor:
        if self.reads == "before":
            return packed.predict
        if packed.own is None:
            raise ValueError(f"reads={self.reads}: the final tokens are not fed; its objective lacks Needs.feed_last")
        return packed.own.index_select(0, packed.ends) if self.reads == "end" else packed.own

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
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from offtrail.platform.model.folder import files_of, folder_of
from offtrail.platform.model.head import Reference
from offtrail.platform.model.layouts import Layout, layout_of
from offtrail.platform.model.packing import Packed
from offtrail.platform.model.policy import PackedModel, from_files

Reads = Literal["before", "after", "end"]
"""Where: in the state that each output token is drawn in (a critic); at each output token (process rewards); or once a
sample, at its final token (a reward model). The last two need Needs.feed_last."""


class ScalarOutputs(NamedTuple):
    """Float32, one a row, differentiable."""

    values: Tensor


def load_scalar(
    path: Path | str, reads: Reads, *, device: torch.device | str = "cpu", key: str = "algo.critic.path"
) -> Any:
    """Transformers' classifier of one label over the decoder of a Hugging Face directory or name, in float32, with
    packed attention: for sequences (a head without bias) or, where every output token is read, for tokens (with one).

    A head that the directory lacks, as a language model's does, begins at 0. One of another layout (layouts.py) stands
    in its place: of two classes the difference, which is linear again, or layers of its own, which can be asked and not
    trained (``only_asked``).

    Raises ValueError, naming ``key``, where transformers has no such classifier for the architecture, or a tensor of
    the decoder is not in the files; ConfigError where the head has another shape.
    """
    kind: Any = AutoModelForTokenClassification if reads == "after" else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(path)
    if type(config) not in kind._model_mapping:
        raise ValueError(
            f"{path}: transformers has no {kind.__name__.removeprefix('AutoModelFor')} for {config.model_type}; a "
            f"scalar head needs another architecture ({key})"
        )
    folder = folder_of(str(path))
    layout = Layout("none", 0, "") if folder is None else layout_of(folder, key, str(path))
    labels = layout.labels if layout.head == "linear" else 1
    model = from_files(kind, path, f"{key}={path}", new_head=True, num_labels=labels)
    if not hasattr(model, "score"):
        raise ValueError(f"{path}: {type(model).__name__} has no linear head named score; take another architecture")
    if folder is not None and layout.head in ("two layers", "value"):
        model.score = _published_head(folder, layout, str(path))
    elif labels == 2:
        model.score, model.config.num_labels = _difference(model.score), 1
    model.config.use_cache = False
    return model.to(device).eval()


def only_asked(model: Any, reads: Reads) -> bool:
    """Whether a head is one that no classifier of transformers can hold, so that it cannot be saved as one."""
    head = model.score
    return not isinstance(head, nn.Linear) or (head.bias is not None and reads != "after")


class TwoLayers(nn.Module):
    """The head of Qwen2.5-Math-RM and -PRM: Linear, ReLU, Linear; of two classes the difference."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        (H, _), (labels, _) = tensors["score.0.weight"].shape, tensors["score.2.weight"].shape
        self.layers = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, labels))
        self.layers.load_state_dict({name.removeprefix("score."): value for name, value in tensors.items()})

    def forward(self, hidden: Tensor) -> Tensor:
        """[…, H] → […, 1]."""
        logits: Tensor = self.layers(hidden)
        return logits[..., 1:] - logits[..., :1] if logits.shape[-1] == 2 else logits


def _published_head(folder: Path, layout: Layout, given: str) -> nn.Module:
    """A head that transformers' classifiers have no place for. Raises ValueError where a tensor of it is missing."""
    begin = "score." if layout.head == "two layers" else "v_head.summary."
    tensors: dict[str, Tensor] = {}
    for file in files_of(folder):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name).float() for name in opened.keys() if name.startswith(begin)}  # noqa: SIM118
    try:
        if layout.head == "two layers":
            return TwoLayers(tensors)
        head = nn.Linear(tensors[f"{begin}weight"].shape[1], 1)
        head.load_state_dict({name.removeprefix(begin): value for name, value in tensors.items()})
    except (KeyError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{given}: its score head ({begin}…) is not whole: {words}; download it again") from None
    return head


def _difference(head: nn.Linear) -> nn.Linear:
    """One number of two classes."""
    made = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    with torch.no_grad():
        made.weight.copy_(head.weight[1:] - head.weight[:1])
        if head.bias is not None:
            made.bias.copy_(head.bias[1:] - head.bias[:1])
    return made


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

    def tokens_of(self, packed: Packed) -> Tensor:
        """The place in the table's tokens of what each row is of: of a sample its final token."""
        return packed.tokens.index_select(0, packed.ends) if self.reads == "end" else packed.tokens

    def forward(self, packed: Packed) -> ScalarOutputs:
        """The number of each row, with gradient."""
        head, hidden = self.model.score, self.hidden(packed, self._places(packed)).float()
        if not isinstance(head, nn.Linear):
            return ScalarOutputs(head(hidden).squeeze(-1))
        # mv and not linear(…).squeeze(1): FSDP2's hooks do not hold on a view.
        values = torch.mv(hidden, head.weight[0].float())
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

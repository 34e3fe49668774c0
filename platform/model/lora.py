"""LoRA (Hu et al. 2021, arXiv:2106.09685) on a transformers model, through PEFT: W·x + (α/r)·B·A·x, A and B trained.

    add ──► the same model, its linear layers wrapped in place        plain, is_adapter ──► names without the wrapping
                                                                      merged ──► W + (α/r)·B·A
                                                                      save ──► what PeftModel.from_pretrained opens

Invariants: the model's own weights never change, so that nothing drifts, whatever their dtype: a merged weight is a
new tensor, summed in float32 and then cast. B begins at 0: at first, and with B = 0 at any time, outputs are the
model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offtrail.platform.config.schema import LoraConfig

NAME = "default"
"""PEFT's, of the one adapter."""
LAYER = ".base_layer"
PARTS = ("lora_A", "lora_B")
FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
"""In a checkpoint."""


def add(model: Any, settings: LoraConfig, seed: int) -> Any:
    """Wrap the decoder's linear layers that ``settings.targets`` names, in place, and freeze all else. A is drawn by
    ``seed``. Raises ValueError, naming the key, where there is no such layer, or one is another module.
    """
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    made = Adapters(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=targets_of(model, settings.targets),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(made, model)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    model.lora_scaling = settings.alpha / settings.rank
    return model.eval()


def targets_of(model: Any, targets: list[str]) -> list[str]:
    """The full names of the layers. Raises ValueError as ``add`` does."""
    layers = f"{model.base_model_prefix}.layers."
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if type(module) is nn.Linear and name.startswith(layers)]
    if targets == ["all-linear"]:
        return linear
    found = [name for name in modules if any(name == end or name.endswith(f".{end}") for end in targets)]
    missing = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in found)]
    others = [name for name in found if name not in linear]
    if missing or others:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        what = f"{missing[0]} is no layer" if missing else f"{others[0]} is no linear layer of a decoder layer"
        raise ValueError(f"learner.lora.targets=[{', '.join(targets)}]: {what}; there are {ends}")
    return found


def _wrapped(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def is_adapter(name: str) -> bool:
    """Whether a parameter is A or B of an adapter, by its name."""
    return any(f".{part}.{NAME}." in name for part in PARTS)


def plain(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(LAYER, "")


def adapters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every wrapped layer; empty where there is none."""
    return {name: parameter for name, parameter in module.named_parameters() if is_adapter(name)}


def pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → its A [r, C] and B [R, r], of the names that they have in the model. Raises ValueError at another name,
    or half a pair.
    """
    ends = [f".{part}.{NAME}.weight" for part in PARTS]
    layers = sorted({name.removesuffix(end) for name in adapters for end in ends if name.endswith(end)})
    whole = {f"{layer}{end}" for layer in layers for end in ends}
    if odd := sorted(adapters.keys() ^ whole):
        raise ValueError(f"a version of adapters has A and B of each, and nothing else; {odd[0]} is no such")
    a, b = ends
    return {layer: (adapters[f"{layer}{a}"], adapters[f"{layer}{b}"]) for layer in layers}


def parts_of(name: str) -> tuple[str, str] | None:
    """The names of A and B, of the ``name`` of a wrapped layer's weight; None of any other parameter."""
    stem, found, rest = name.rpartition(f"{LAYER}.weight")
    if not found or rest:
        return None
    a, b = (f"{stem}.{part}.{NAME}.weight" for part in PARTS)
    return a, b


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``weight`` [R, C] + scaling·``b`` [R, r]·``a`` [r, C], a new tensor of the weight's dtype, summed in float32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)


def drop_out(model: nn.Module) -> None:
    """Let the adapters' dropout draw, in a model that stays in eval mode otherwise."""
    for module in _wrapped(model).values():
        module.lora_dropout.train()


def save(folder: Path, adapters: Mapping[str, Tensor], settings: LoraConfig, base: str) -> None:
    """Write ``adapters`` (by transformers' names) so that PeftModel.from_pretrained opens them over ``base``."""
    from peft import LoraConfig as Adapters

    folder.mkdir()
    targets = sorted({name.partition(f".{PARTS[0]}.")[0] for name in adapters if f".{PARTS[0]}." in name})
    made = Adapters(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=targets, base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in made.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")
    tensors = {to_peft(name): tensor.contiguous().cpu() for name, tensor in adapters.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def to_peft(name: str) -> str:
    """The name of a parameter in PEFT's files."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def read(folder: Path) -> dict[str, Tensor]:
    """The adapters of a checkpoint, by the names that they have in the model."""
    return {from_peft(name): tensor for name, tensor in load_file(folder / FOLDER / WEIGHTS).items()}


def from_peft(name: str) -> str:
    """The name in the model of a parameter in PEFT's files."""
    stem, _, end = name.removeprefix("base_model.model.").rpartition(".")
    return f"{stem}.{NAME}.{end}"

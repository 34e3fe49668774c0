"""Names and shapes of a model's tensors, compared before a version reaches a server: SGLang itself answers success to
one of another architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

Shapes = Mapping[str, tuple[int, ...]]


def read_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a Hugging Face directory, from the headers of its safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"model.path={model_dir}: no safetensors there; save the model with save_pretrained")
    return shapes


def check_shapes(version: int, found: Shapes, expected: Shapes) -> None:
    """Raise ValueError where a version's tensors are not those of the model that the servers came up with."""
    wrong = [name for name in found if expected.get(name, found[name]) != found[name]]
    missing, foreign = sorted(expected.keys() - found), sorted(found.keys() - expected)
    for what, names in (("lacks", missing), ("holds in addition", foreign), ("has another shape of", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"version {version} is of another model: it {what} {names[0]}{more}")

"""Versions that are adapters alone (learner.lora.publish=adapter), for the embedded engine, which knows none.

    the channel: A, B of v ──► AdaptedEngine.load_weights ──► W + (α/r)·B·A ──► LocalEngine.load_weights
    the start model's files: W ─────────┘

Invariant: it holds what it would have been given of the merged version, bit for bit: one sum (model/lora.py), of the
same numbers. The start model is read anew for each version, for the weights in the engine are another version's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offtrail.platform.config.schema import LocalConfig, LoraConfig
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.model.lora import merged, pairs


class AdaptedEngine(LocalEngine):
    """A LocalEngine over the start model in ``model_dir``, whose later versions are ``adapters`` to it."""

    def __init__(
        self,
        model_dir: Path,
        config: LocalConfig,
        adapters: LoraConfig,
        *,
        max_length: int,
        threads: int,
        loaded: bool = True,
    ) -> None:
        super().__init__(model_dir, config, max_length=max_length, threads=threads, loaded=False)
        self._start, self._scaling = model_dir, adapters.alpha / adapters.rank
        if loaded:
            self.load_weights(0, {})

    def load_weights(self, version: int, weights: Mapping[str, Any]) -> None:
        """As LocalEngine's, of a version's adapters; with none of them it is the start model. Raises ValueError where
        they are another model's.
        """
        super().load_weights(version, onto(version, read_weights(self._start), weights, self._scaling))


def onto(version: int, start: dict[str, Tensor], adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """``start``, changed in place: float32 sums in place of the weights that have adapters."""
    for layer, (a, b) in pairs(adapters).items():
        name = f"{layer}.weight"
        if name not in start or start[name].shape != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"version {version} is of another model: no layer of the start model fits {layer}'s adapter"
            )
        start[name] = merged(start[name].float(), a, b, scaling)
    return start

"""One model that a scorer serves, under one version of its weights at a time.

    Served.open ──► version 0, of its folder ──► score(questions) ──► scores, or why there is none
                        └─ newer ──► load(version), from the weight channel of the model

Invariant: all scores of one call are of ``version``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from offtrail.core.types import Float32
from offtrail.platform.config.schema import Config
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.scoring import Scoring
from offtrail.platform.runtime.context import newest_score_model, reuses_files, score_weights_folder
from offtrail.platform.weights.store import Subscriber
from offtrail.rewards.score_metrics import sigmoid

log = logging.getLogger("offtrail.scorer")


@dataclass
class Served:
    """``weights``: where newer versions come from; ``version`` 0 is the model's own folder. A model that the run trains
    begins with the newest version that is kept, also in a run that goes on.
    """

    scoring: Scoring
    reader: Reader
    weights: Subscriber
    longest: int
    budget: int
    version: int = 0

    @classmethod
    def open(cls, config: Config, run_dir: Path, scoring: Scoring) -> Served:
        """Load the model. Raises ConfigError, ValueError or ModelError, naming its key, where it cannot be read."""
        settings, longest = config.scorer, config.model.max_length
        version, kept = newest_score_model(run_dir, scoring.name)
        reader = Reader.open(
            kept or scoring.folder, scoring.spec, key=scoring.key, longest=longest, device=settings.device,
            dtype=settings.dtype,
        )  # fmt: skip
        weights = Subscriber(score_weights_folder(config, run_dir, scoring.name), reuse=reuses_files(config))
        return cls(scoring, reader, weights, longest, settings.tokens_per_batch, version)

    @property
    def counters(self) -> dict[str, float]:
        """Cumulative: tokens that went through the model, and their FLOPs."""
        return {"scored_tokens": float(self.reader.tokens), "flops": self.reader.flops}

    def newer(self) -> int | None:
        """A version that was published and is not loaded; None where there is none."""
        newest = self.weights.newest()
        return newest if newest is not None and newest > self.version else None

    @torch.no_grad()
    def load(self, version: int) -> None:
        """Take a published version. FileNotFoundError where it is kept no more; ValueError, before anything is changed,
        where its tensors are not the model's in name and shape.
        """
        own = {name.removeprefix("model."): value for name, value in self.reader.module.named_parameters()}
        with self.weights.open(version) as published:
            for name in sorted(own.keys() | set(published)):
                here, there = own.get(name), published.get(name)
                if here is None or there is None or here.shape != there.shape:
                    found = [None if one is None else list(one.shape) for one in (here, there)]
                    raise ValueError(
                        f"version {version} of {self.scoring.name}: {name} is {found[1] or 'missing'} as published and "
                        f"{found[0] or 'missing'} in {self.scoring.folder}; publish what that model is trained to"
                    )
            for name, value in own.items():
                value.copy_(published[name])
        self.version = version
        log.info("%s: version %d", self.scoring.name, version)

    def unfit(self, question: Question) -> str:
        """Why the model cannot be asked this, or ""."""
        rows = self.reader.module.model.get_input_embeddings().num_embeddings
        tokens = np.concatenate([question.prompt, *question.outputs])
        longest = len(question.prompt) + max(map(len, question.outputs))
        if longest > self.longest:
            return f"a prompt and its answer take {longest} tokens, above model.max_length={self.longest}"
        if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
            return f"token ids span {tokens.min()}…{tokens.max()}, and the model has {rows}"
        return ""

    def score(self, questions: Sequence[Question]) -> list[Float32 | str]:
        """Of each question its scores, of all outputs one after another: [n], [S] or [T]; or why there are none. One
        that alone is no number takes none of the others with it.
        """
        found = [self._flat(one) for one in self.reader.ask(questions, self.budget)]
        if len(questions) > 1 and not all(np.isfinite(one).all() for one in found):
            found = [self._flat(self.reader.ask([question], self.budget)[0]) for question in questions]
        return [one if np.isfinite(one).all() else self._no_number(one) for one in found]

    def _flat(self, numbers: Sequence[Float32]) -> Float32:
        flat = np.concatenate(numbers)
        return sigmoid(flat).astype(np.float32) if self.scoring.spec.squash == "sigmoid" else flat

    def _no_number(self, numbers: Float32) -> str:
        bad = int((~np.isfinite(numbers)).sum())
        return f"{bad} of the {len(numbers)} scores of version {self.version} are no numbers"

"""One sample on its way through an SGLang server: what the server's reports make of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offtrail.core.protocols import Alternatives, Completion, Request
from offtrail.core.types import FinishReason
from offtrail.platform.engines.stops import StopStrings


class LostError(RuntimeError):
    """The server of a sample is gone, or broke off: what it made is not known whole."""


@dataclass
class Job:
    """``tokens`` and ``logprobs`` grow as the server reports; ``spans`` are (version, end).

    ``serial`` is the client's own number of the request: the same request may come again after it was lost.
    """

    request: Request
    serial: int
    index: int
    submitted: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[Any]] = field(default_factory=list)
    """[log-probability, token, …] of each of the likeliest tokens, at each position."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    stopped_by: str = ""
    """The stop string that the last of ``tokens`` completed: whatever the server made after it is not taken."""
    segment: int = 0
    """How often it was handed back for an update and sent again."""
    segment_start: int = 0
    """Tokens before this segment."""
    report: dict[str, Any] | None = None
    """The server's last word on this segment, until it is charged."""
    version: int = -1
    """The adapter that this segment was asked of; −1: of none, the server tells its version."""
    first: float = 0.0
    last: float = 0.0

    def grow(self, report: dict[str, Any], stops: StopStrings) -> None:
        """Take the new tokens of one report (servers run with --incremental-streaming-output), up to the first that
        completes a stop string. Raises FloatingPointError where a log-probability is not finite.
        """
        sampling, meta, start = self.request.sampling, report["meta_info"], len(self.tokens)
        if self.stopped_by:
            return
        new, scored = report["output_ids"], meta.get("output_token_logprobs") or []
        if len(new) != len(scored):
            raise LostError(f"sample {self.index}: {len(new)} tokens came with {len(scored)} log-probabilities")
        if sampling.alternatives:
            likeliest = meta.get("output_top_logprobs") or []
            if len(new) != len(likeliest):
                raise LostError(f"sample {self.index}: {len(new)} tokens came with alternatives to {len(likeliest)}")
            self.alternatives += likeliest
        values = [entry[0] for entry in scored]
        if not all(value is not None and math.isfinite(value) for value in values):
            raise FloatingPointError
        self.logprobs += values
        if sampling.stop:
            self._take_until_stop(new, stops)
        else:
            self.tokens += new
        taken = len(self.tokens) - start
        if taken < len(new):
            del self.logprobs[start + taken :], self.alternatives[start + taken :]

    def _take_until_stop(self, new: list[int], stops: StopStrings) -> None:
        for token in new:
            self.tokens.append(token)
            self.stopped_by = stops.completed(self.tokens, self.request.sampling.stop)
            if self.stopped_by:
                return

    def stamp(self, meta: dict[str, Any]) -> None:
        """Note which version made the tokens of this segment: the server tells it with its last report."""
        if self.version >= 0:
            self.spans.append((self.version, len(self.tokens)))
            return
        spans, before = meta.get("weight_versions"), self.segment_start
        if spans is None:  # SGLang < 0.5.19: never updated while it runs, so one version a segment
            spans = [{"version": meta["weight_version"], "end": len(self.tokens) - before}]
        self.spans += [(_number(span["version"]), before + int(span["end"])) for span in spans]

    def completion(self, finish: FinishReason) -> Completion:
        """As it stands."""
        versions = np.full(len(self.tokens), -1, np.int32)
        start = 0
        for version, end in self.spans:
            versions[start:end] = version
            start = end
        now = time.time()
        return Completion(
            self.request.id,
            self.index,
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            versions,
            finish,
            (self.submitted, self.first or now, self.last or now),
            self._alternatives(),
            self.stopped_by if finish == "stop" else "",
        )

    def _alternatives(self) -> Alternatives | None:
        if not (count := self.request.sampling.alternatives):
            return None
        shape = len(self.alternatives), count
        tokens = [[entry[1] for entry in position] for position in self.alternatives]
        logprobs = [[entry[0] for entry in position] for position in self.alternatives]
        return Alternatives(np.array(tokens, np.int32).reshape(shape), np.array(logprobs, np.float32).reshape(shape))


def _number(version: Any) -> int:
    """A server that was never given a version names its own in words, `default`: that is version 0."""
    try:
        return int(version)
    except ValueError:
        return 0

"""The three seams: Engine (makes tokens), Driver (turns a lease into requests and back), Scorer (neural scores)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from offtrail.core.types import FinishReason, Float32, Group, Int32, Lease, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """``samples`` independent answers to one prompt; the prompt is prefilled once for all of them.

    ``id`` is unique among the engine's unfinished requests. ``key`` keys the randomness (with ``sampling.seed``), so
    that the same work draws the same numbers under whatever id it is asked for; None means the id itself.
    """

    id: int
    prompt_tokens: Int32
    samples: int
    sampling: Sampling
    key: int | None = None

    @property
    def random_key(self) -> int:
        """What keys the randomness of this request, as a number of 64 bits."""
        return (self.id if self.key is None else self.key) % 2**64


@dataclass(frozen=True, slots=True)
class Alternatives:
    """The k most likely tokens at each position of an answer, the likeliest first: ``tokens`` [T, k] int32 and their
    ``logprobs`` [T, k] float32, of the whole distribution at the sampling temperature, as the drawn token's is.
    """

    tokens: Int32
    logprobs: Float32


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer. ``tokens`` [T], ``logprobs`` [T], ``versions`` [T]; the stop token, where one ended it, is
    the last of ``tokens``. ``times``: seconds since the epoch at submission, first and last token. ``alternatives``
    where ``sampling.alternatives`` asked for them. ``stopped_by``: the stop string that the last token completed, the
    first in ``sampling.stop`` where it completed several; empty where no string has stopped it.
    """

    request: int
    index: int
    tokens: Int32
    logprobs: Float32
    versions: Int32
    finish: FinishReason
    times: tuple[float, float, float]
    alternatives: Alternatives | None = None
    stopped_by: str = ""


class Engine(Protocol):
    """Makes tokens under one weight version at a time and keeps unfinished samples across a change of weights.

    Not thread-safe: one loop calls ``generate``, ``step`` and ``load_weights``. Weights change only between decode
    steps; a token's version is the one whose weights made it.
    """

    vocab_size: int

    @property
    def version(self) -> int:
        """The version that every new sample is sure to get; it falls when a server was started anew, and
        ``load_weights`` brings it back.
        """

    @property
    def capacity(self) -> int:
        """Samples that decode together."""

    @property
    def replicas(self) -> int:
        """How many copies of the weights are up, each brought to a version by itself; 0 while servers start."""

    @property
    def waiting_for(self) -> str:
        """Whom the engine waits for before it can make a token; empty while it can (I4)."""

    @property
    def counters(self) -> dict[str, float]:
        """Cumulative: ``decoded_tokens``, ``prefilled_tokens``, ``prefix_hit_tokens``, ``reprefilled_tokens``,
        ``scored_tokens``, ``flops``.
        """

    @property
    def unfinished(self) -> int:
        """Samples submitted, not yet returned and not lost."""

    def generate(self, requests: Sequence[Request]) -> None:
        """Queue requests; their samples enter in order as room allows. ValueError on a token id ≥ vocabulary, on a
        prompt that leaves no room for ``max_new_tokens``, or on a sampling parameter that the engine does not honour: a
        stop string too, where the model's folder has no tokenizer.
        """

    def step(self) -> list[Completion]:
        """Advance every running sample by at least one token (or wait for the server); return those that finished."""

    def lost(self) -> list[int]:
        """Requests that died with a server since the last call: all of their samples are forgotten, also those that
        ``step`` has returned already.
        """

    def logprobs(
        self, prompts: Sequence[Int32], outputs: Sequence[Int32], temperature: float, replica: int = 0
    ) -> list[Float32]:
        """Log-probabilities [T_i] of the given output tokens under the current weights, at ``temperature``. ValueError
        at a temperature that the engine cannot score at, ConnectionError where that copy of the weights is gone.
        """

    def load_weights(self, version: int, weights: Mapping[str, Any]) -> None:
        """Apply a version between decode steps; ``weights`` has the checkpoint's tensor names and is valid during the
        call. ValueError when names or shapes differ from the model's, before anything is changed. Where no copy is up,
        nothing happens.
        """

    def pause(self) -> None:
        """Stop making tokens; unfinished samples are kept."""

    def resume(self) -> None:
        """Go on after ``pause``."""

    def cancel(self, requests: Sequence[int]) -> None:
        """Drop the unfinished samples of these requests, by id, queued or running: neither ``step`` nor ``lost`` names
        the requests again, and their ids may be used anew. An id that the engine does not hold is passed over.
        """

    def abort(self) -> list[Completion]:
        """Return every unfinished sample as it is, with finish reason ``abort``."""

    def close(self) -> None:
        """Give back what the engine holds."""


class Driver(Protocol):
    """Turns one lease into engine requests, and their completions into one group."""

    def start(self, lease: Lease, prompt_tokens: Int32) -> list[Request]:
        """The requests to queue now."""

    def finished(self, completion: Completion) -> tuple[list[Request], Group | None]:
        """Take a completion of one of this lease's requests: more requests, and the group once it is whole."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one group by one version of a scorer: a group never mixes versions."""

    version: int
    scalar: Float32 | None = None
    channels: Mapping[str, Float32] = field(default_factory=dict)


class Scorer(Protocol):
    """Neural scores (reward model, PRM, search value) asked for before a group is submitted."""

    def score(self, group: Group) -> Scores:
        """Score all samples of the group under one version."""

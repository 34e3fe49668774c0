"""The seams: Engine (makes tokens), Driver (turns a lease into asks, and their answers into a group), and who judges
text beside generation: Verifier (by rule) and Scorer (neural).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from offtrail.core.types import Channel, FinishReason, Float32, Group, Int32, Lease, Problem, Sampling, ScoredBy


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
        ``scored_tokens``, ``flops``; ``lost_requests`` where there are servers that can lose them.
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

    def release(self) -> None:
        """Give back the memory that ``load_weights`` takes again quickly; until then there is nothing to make tokens
        with. No sample is unfinished.
        """

    def close(self) -> None:
        """Give back what the engine holds."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for ``samples`` answers to a prompt: the lease's own, or one that goes on from it with tokens of an earlier
    answer. Each comes back as one Completion. The number ``ask`` keys the randomness, so number asks by what they are
    (a round, a node), never by what came first: then a run in exact mode repeats.
    """

    ask: int
    prompt_tokens: Int32
    samples: int
    sampling: Sampling

    def request(self, id: int, group: int) -> Request:
        """The engine's request: ask 0 draws by the group's id alone, any other by a number of its own."""
        return Request(id, self.prompt_tokens, self.samples, self.sampling, key=group + (self.ask << 40))


@dataclass(frozen=True, slots=True)
class Verify:
    """Ask for the rule rewards of n ``outputs``, tokens after the lease's prompt; one Verdict comes back. ``finished``
    [n]: where the output ended by itself, with its stop token.
    """

    ask: int
    outputs: tuple[Int32, ...]
    finished: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Ask the scorer of that name about n ``outputs``, finished or not, tokens after the lease's prompt; one Scores
    comes back.
    """

    ask: int
    scorer: str
    outputs: tuple[Int32, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give up an earlier ask: what is left of it is stopped and answers nothing."""

    ask: int


Ask = Generate | Verify | Score | Cancel
LAST_ASK = (1 << 23) - 1
"""The highest number of an ask: with the group's id it makes 64 bits."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rule rewards of n outputs: ``components`` name → [n], NaN where one does not apply, and their weighted total
    ``rewards`` [n].
    """

    components: Mapping[str, Float32]
    rewards: Float32


@dataclass(frozen=True, slots=True)
class Scores:
    """What one version of a scorer says of n outputs. ``components`` name → [n] enter the reward; ``channels`` stand
    beside it, with the axes that a group of these outputs would have, and ``step_ends`` [S] where one is by steps. With
    ``by`` None no version has said it: there was nothing to read in any output, and settings say what that is worth.
    """

    by: ScoredBy | None
    components: Mapping[str, Float32] = field(default_factory=dict)
    channels: Mapping[str, Channel] = field(default_factory=dict)
    step_ends: Int32 | None = None


Answer = Completion | Verdict | Scores


class Driver(Protocol):
    """Turns one lease into asks, and their answers into one group. Sans I/O: it knows neither engine nor clock.

    It may have any number of asks in flight, each under a number of its own from 0 to LAST_ASK, never used again.
    A ValueError that it raises, or an ask that does not fit (a prompt too long, a scorer that is not there), fails its
    group and nothing else.
    """

    @property
    def lease(self) -> Lease:
        """What it was made for."""

    @property
    def width(self) -> int:
        """The most samples that it keeps in flight: how much of an engine it fills."""

    @property
    def group(self) -> Group | None:
        """The group, once it is whole: then what is still in flight is cancelled. Rewards may be left zero, and
        components empty: verifiers and scorers are asked about every group before it is submitted.
        """

    def start(self, prompt_tokens: Int32) -> Sequence[Ask]:
        """What to ask first."""

    def answered(self, ask: int, answer: Answer) -> Sequence[Ask]:
        """Take an answer to the ask of that number (a Completion's ``request`` is that number too); what to ask now."""


class Verifier(Protocol):
    """Rule rewards beside generation. Every submitted key comes back from ``poll`` once, within a deadline of its own;
    nothing blocks.
    """

    counters: dict[str, float]

    def submit(self, key: int, problem: Problem, texts: list[str], finished: list[bool]) -> None:
        """Queue n answers to a problem. Keys are the caller's, unique among those that have not come back."""

    def poll(self) -> list[tuple[int, dict[str, Float32] | None]]:
        """(key, components name → [n], or None where they must be refused) of what was decided since the last call."""

    def reason(self, key: int) -> str:
        """Why ``poll`` gave None for the key; asked once."""

    def close(self) -> None:
        """End it; what has not come back is given up."""


class Scorer(Protocol):
    """Neural scores beside generation (reward model, PRM, search value), under the rules of a Verifier."""

    @property
    def counters(self) -> dict[str, float]:
        """Cumulative, by name."""

    @property
    def waiting_on(self) -> str:
        """Who has not answered yet, such as `rm of scorer-0` (I4)."""

    def applies(self, group: Group) -> bool:
        """Whether it must score this whole group before the group is submitted; drivers may ask it at any time."""

    def submit(self, key: int, problem: Problem, prompt_tokens: Int32, outputs: Sequence[Int32]) -> None:
        """Queue n outputs, tokens after the prompt. ValueError where they do not fit the model."""

    def poll(self) -> list[tuple[int, Scores | None]]:
        """(key, scores, or None where they must be refused) of what was decided since the last call."""

    def reason(self, key: int) -> str:
        """Why ``poll`` gave None for the key; asked once."""

    def close(self) -> None:
        """End it; what has not come back is given up."""

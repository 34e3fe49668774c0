"""The words every room shares: Problem, Sampling, Channel, Group, Sample, Batch.

Who uses them: tasks/ make Problems; the broker leases them; generators turn a lease into one Group; the broker keeps
Groups until they are trained; the learner receives Batches of B Groups. Legend of shapes: G samples of a group, P
prompt tokens, T output tokens of the whole group (samples one after another), B groups of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from offtrail.core.problem import Problem as Problem

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

FinishReason = Literal["stop", "length", "abort"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")
Axis = Literal["token", "step", "sample", "node"]
"""What a channel has one value of."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Log-probabilities are taken at ``temperature`` (I5); 0 means greedy.

    ``seed`` and the request's key, the sample's index and the token's position key the random number of each token
    (I3): the same keys under the same weights give the same token, whatever else is in flight.
    ``alternatives``: how many of the most likely tokens are told at each position, beside the one that was drawn.

    An answer ends with a token of ``stop_token_ids``, or with the token whose text completes one of the strings of
    ``stop``, be it in the middle of that token. Either token is kept whole, text beyond the string included, and
    nothing is tokenised again. Where both happen at once, it is the string that has stopped it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    alternatives: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a group: views into the group's arrays, all of length [T_i] except the scalars."""

    index: int
    tokens: Int32
    logprobs: Float32
    versions: Int32
    finish: FinishReason
    reward: float


@dataclass(frozen=True, slots=True)
class Channel:
    """What a search or a scorer says beside the rewards: ``values`` [T | S | G | N], one for each thing of ``axis``.

    token: T output tokens of the group. step: S steps, which end at Group.step_ends. sample: G samples. node: N nodes
    of a search tree, the same N in every channel of the group. Values are int32 or float32, and finite.
    """

    axis: Axis
    values: Int32 | Float32


LOWEST_LOGPROB, HIGHEST_LOGPROB, LARGEST_REWARD = -1e4, 1e-4, 1e9
"""No sampled token is less likely, and none more but for rounding; no reward larger: its square must stay a float32."""
SHORT = 4096
"""Below so many elements argmax is the cheaper way to a largest value."""
_SIGNED, _UNSIGNED = np.dtype(np.int32), np.dtype(np.uint32)
_LOWEST_BITS, _HIGHEST_BITS = map(int, np.array([LOWEST_LOGPROB, HIGHEST_LOGPROB], np.float32).view(_UNSIGNED))
PARENT = "parent"
"""The node channel that makes nodes a tree: each node's parent, an earlier node, or −1 for a root."""


@dataclass(frozen=True, slots=True)
class ScoredBy:
    """Which version of which model made a score."""

    model: str
    version: int


def _no_steps() -> Int32:
    return np.zeros(0, np.int32)


@dataclass(slots=True)
class Group:
    """G samples of one prompt, columnar: what one lease yields, what the wire carries, what the ledger counts.

    Shapes: ``prompt_tokens`` [P] int32; ``lengths`` [G] int32; ``tokens`` [T] int32, ``logprobs`` [T] float32 (the
    behaviour policy's, at the sampling temperature), ``versions`` [T] int32 (weight version of each token, stamped
    where weights are applied); ``finish`` [G] uint8 indexes FINISH_REASONS; ``rewards`` [G] float32 (the weighted
    total) and ``components`` name → [G] float32, NaN where a component does not apply to a sample; ``times`` [G, 3]
    float64, seconds since the epoch at submission, first and last token.

    ``channels``: name → Channel, for step or token scores and for a search tree. ``step_ends`` [S] int32: where steps
    end, as exclusive offsets in ``tokens``, ascending; a step begins where the one before it or its sample does, so
    that none spans two samples, and what follows a sample's last step belongs to none. ``scored_by``: component or
    channel name → the model and version that made it. One model scores a whole group under one version.

    ``counts``: what was counted in the answers, all together, by name (rewards/total.py, Scored); mostly empty.

    ``queued_version`` and ``queued_at`` are the broker's stamp on arrival (−1 before).
    """

    group: int
    slot: int
    attempt: int
    problem: Problem
    generator: str
    temperature: float
    prompt_tokens: Int32
    lengths: Int32
    tokens: Int32
    logprobs: Float32
    versions: Int32
    finish: UInt8
    rewards: Float32
    components: dict[str, Float32]
    times: Float64
    channels: dict[str, Channel] = field(default_factory=dict)
    step_ends: Int32 = field(default_factory=_no_steps)
    scored_by: dict[str, ScoredBy] = field(default_factory=dict)
    queued_version: int = -1
    queued_at: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """G, the number of samples."""
        return len(self.lengths)

    @property
    def step_samples(self) -> Int32:
        """[S]: the sample that each step is of."""
        return np.searchsorted(np.cumsum(self.lengths), self.step_ends).astype(np.int32)

    def samples(self) -> Iterator[Sample]:
        """The samples in order, as views."""
        end = 0
        for i, length in enumerate(self.lengths.tolist()):
            part = slice(end, end := end + length)
            finish, reward = FINISH_REASONS[self.finish[i]], float(self.rewards[i])
            yield Sample(i, self.tokens[part], self.logprobs[part], self.versions[part], finish, reward)

    def check(self, *, vocab_size: int | None = None) -> None:
        """Raise ValueError, naming the field, unless shapes, counts and values agree with each other."""
        self._check_shapes()
        if self.step_ends.size or self.channels:
            self._check_channels()
        if self.scored_by:
            self._check_scored_by()
        # Few reductions, one value each: this runs for every group that arrives.
        lowest, highest = (0.0, 0.0) if _are_logprobs(self.logprobs) else _range(self.logprobs)
        rewards = self.rewards.tolist()
        if not (-math.inf < lowest <= highest < math.inf and math.isfinite(sum(rewards))):
            raise ValueError(f"group {self.group}: a reward or log-probability is not finite")
        if lowest < LOWEST_LOGPROB or max(rewards) > LARGEST_REWARD or min(rewards) < -LARGEST_REWARD:
            raise ValueError(
                f"group {self.group}: a log-probability of {_range(self.logprobs)[0]:.4g} or a reward of "
                f"{max(map(abs, rewards)):.4g} is beyond {LOWEST_LOGPROB:.0e} or {LARGEST_REWARD:.0e}"
            )
        for name, column in self.components.items():
            values = column.tolist()
            if not math.isfinite(sum(values)) and any(map(math.isinf, values)):
                raise ValueError(f"group {self.group}: component {name} is infinite (NaN says that it does not apply)")
        if self.counts and not math.isfinite(sum(self.counts.values())):
            raise ValueError(f"group {self.group}: a count is not finite")
        if highest > HIGHEST_LOGPROB:
            raise ValueError(f"group {self.group}: a log-probability is above 0 ({highest:.4g})")
        if not math.isfinite(sum(self.times.reshape(-1).tolist())):
            raise ValueError(f"group {self.group}: a time is not finite")
        if (finish := max(self.finish.tobytes())) >= len(FINISH_REASONS):
            raise ValueError(f"group {self.group}: unknown finish reason {finish}")
        limit = 1 << 31 if vocab_size is None else vocab_size
        if _largest_id(self.prompt_tokens) >= limit or _largest_id(self.tokens) >= limit:
            ids = np.concatenate((self.prompt_tokens, self.tokens))
            raise ValueError(f"group {self.group}: token ids span {ids.min()}…{ids.max()}, vocabulary is {vocab_size}")

    def _check_shapes(self) -> None:
        if (
            self.lengths.ndim != 1
            or self.prompt_tokens.ndim != 1
            or not (self.lengths.size and self.prompt_tokens.size)
        ):
            shapes = f"lengths {self.lengths.shape}, prompt {self.prompt_tokens.shape}"
            raise ValueError(f"group {self.group}: empty, or not one-dimensional ({shapes})")
        lengths = self.lengths.tolist()
        T = self.tokens.size
        if min(lengths) < 0 or sum(lengths) != T:
            raise ValueError(f"group {self.group}: lengths sum to {sum(lengths)}, but there are {T} tokens")
        per_sample, per_token = self.lengths.shape, (T,)
        named: tuple[tuple[str, npt.NDArray[Any], tuple[int, ...]], ...] = (
            ("tokens", self.tokens, per_token),
            ("logprobs", self.logprobs, per_token),
            ("versions", self.versions, per_token),
            ("finish", self.finish, per_sample),
            ("rewards", self.rewards, per_sample),
            ("times", self.times, (*per_sample, 3)),
        )
        for name, array, shape in named:
            if array.shape != shape:
                raise ValueError(f"group {self.group}: {name} has shape {array.shape}, expected {shape}")
        for name, array in self.components.items():
            if array.shape != per_sample:
                raise ValueError(f"group {self.group}: {name} has shape {array.shape}, expected {per_sample}")

    def _check_channels(self) -> None:
        ends, T = self.step_ends, self.tokens.size
        if ends.ndim != 1 or (ends.size and not (ends[0] > 0 and ends[-1] <= T and (ends[1:] > ends[:-1]).all())):
            raise ValueError(f"group {self.group}: step_ends must ascend within 1…{T}, one offset a step")
        nodes = next((c.values.size for c in self.channels.values() if c.axis == "node"), 0)
        sizes = {"token": T, "step": ends.size, "sample": self.size, "node": nodes}
        for name, channel in self.channels.items():
            if channel.axis not in sizes:
                raise ValueError(f"group {self.group}: channel {name} has axis {channel.axis}; there are {[*sizes]}")
            values, expected = channel.values, sizes[channel.axis]
            if values.shape != (expected,):
                what = f"{values.shape}, expected ({expected},), one value a {channel.axis}"
                raise ValueError(f"group {self.group}: channel {name} has shape {what}")
            if values.dtype not in (np.int32, np.float32):
                raise ValueError(f"group {self.group}: channel {name} is {values.dtype}, expected int32 or float32")
            lowest, highest = _range(values)
            if not -math.inf < lowest <= highest < math.inf:
                raise ValueError(f"group {self.group}: channel {name} holds a value that is not finite")
        if PARENT in self.channels:
            self._check_tree(self.channels[PARENT])

    def _check_tree(self, parent: Channel) -> None:
        values = parent.values
        fits = parent.axis == "node" and values.dtype == np.int32
        if not fits or (values < -1).any() or (values >= np.arange(values.size)).any():
            raise ValueError(
                f"group {self.group}: channel {PARENT} must be int32 on axis node, each value an earlier node or -1"
            )

    def _check_scored_by(self) -> None:
        versions: dict[str, int] = {}
        for name, by in self.scored_by.items():
            if name not in self.components and name not in self.channels:
                raise ValueError(f"group {self.group}: scored_by names {name}, no component or channel of the group")
            if not 0 <= by.version < 1 << 31:
                raise ValueError(f"group {self.group}: {name} was scored by version {by.version} of {by.model}")
            if (other := versions.setdefault(by.model, by.version)) != by.version:
                raise ValueError(
                    f"group {self.group}: versions {other} and {by.version} of {by.model} scored it, and a group never "
                    "mixes versions"
                )


def _range(array: npt.NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest value, NaN where there is one; (0, 0) when empty."""
    if not array.size:
        return 0, 0
    # All find a NaN. argmin copies an array that may not be written to, and costs a fifth of min on a short one.
    if array.size < SHORT:
        return array.item(array.argmin()), array.item(array.argmax())
    return np.minimum.reduce(array).item(), np.maximum.reduce(array).item()


def _are_logprobs(array: Float32) -> bool:
    """Whether all are finite and within LOWEST_LOGPROB and HIGHEST_LOGPROB, or there are none.

    The bits of floats are compared: among those of one sign they grow with the magnitude, infinity and NaN last; as
    signed integers every negative float is below all others, as unsigned ones above. So where all are negative, which
    is common, one reduction tells.
    """
    bits = _largest(array.view(_SIGNED)) if array.size else 0
    if bits < 0:
        return bits + (1 << 32) <= _LOWEST_BITS
    return bits <= _HIGHEST_BITS and _largest_id(array) <= _LOWEST_BITS


def _largest_id(ids: Int32 | Float32) -> int:
    """Largest id, 0 when empty. Unsigned, a negative one is the largest: one reduction finds both ends."""
    return _largest(ids.view(_UNSIGNED)) if ids.size else 0


def _largest(array: npt.NDArray[Any]) -> int:
    return int(np.maximum.reduce(array)) if array.size >= SHORT else array.item(array.argmax())


@dataclass(frozen=True, slots=True)
class Batch:
    """B groups in their durable order: one learner step, from version ``step`` to version ``step + 1``."""

    step: int
    groups: tuple[Group, ...]
    replay: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to make one group, held until it is submitted, failed, or its holder's heartbeats stop.

    ``min_version`` is the oldest version whose tokens may enter (I2). In exact mode (I2b) ``exact_version`` is the
    one version that must make every token, and ``wave`` numbers the batch: the broker grants a wave whole in one
    reply, it enters the engine whole, in slot order, and nothing else is in flight with it (I3). ``driver`` names
    what turns the lease into samples.
    """

    group: int
    slot: int
    attempt: int
    problem: Problem
    samples: int
    min_version: int
    exact_version: int = -1
    wave: int = -1
    driver: str = "sample"

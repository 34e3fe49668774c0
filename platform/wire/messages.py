"""Every message of the wire. A request is answered by exactly one reply; hints (PUB) may be lost.

    generator ── Hello, LeaseRequest, SubmitGroup, FailGroup, ReturnLeases ──► broker
    learner 0 ── Hello, NextBatch, Commit, Checkpointed, HeldOut ────────────► broker
    evaluator ── Hello, NextEval, EvalResult ────────────────────────────────► broker
    refresher ── Hello, NextRefresh ─────────────────────────────────────────► broker
    scorer ── Hello, Serving ────────────────────────────────────────────────► broker
    generator ── ScoreRequest ───────────────────────────────────────────────► scorer
    all roles ── Heartbeat, Failure ─────────────────────────────────────────► broker
    launcher ── Hello, StatusRequest, Failure, StopRun ──────────────────────► broker
    broker ── VersionHint (PUB) ──► all

Arrays travel as raw frames behind the header (codec.py); here stand only the headers. A reply to a long poll
(LeaseRequest, NextBatch, NextEval, NextRefresh) may be empty: `waiting` says for what the broker waits, and the role
asks again.

Invariant: what a peer sends is within the ranges of its fields, or the codec refuses it: every integer fits SQLite's 64
bits and an exact float. What is measured may be any float here: who counts with it leaves out what is no number.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from offtrail.core.types import Axis, Lease, Problem, ScoredBy

PROTOCOL = 8

Index = Annotated[int, Meta(ge=0, lt=1 << 16)]
"""Of a process among those of its role."""
Pid = Annotated[int, Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
"""A group, a slot, an attempt, a number of tokens: JSON's largest exact integer is the end."""
Version = Annotated[int, Meta(ge=0, lt=1 << 31)]
"""Of the weights, or the step that makes the next one: arrays hold them as int32."""
VersionOrNone = Annotated[int, Meta(ge=-1, lt=1 << 31)]
"""−1 where there is none."""
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=1 << 20)]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all headers; the tag is the class name."""


class Hello(Message, frozen=True):
    """First message of a role: the broker refuses another protocol or another run. ``devices``: identity → name of
    those that its process holds.
    """

    role: Name
    index: Index
    pid: Pid
    run: Name
    protocol: Count = PROTOCOL
    devices: Annotated[dict[Name, Name], Meta(max_length=1 << 12)] = {}


class Welcome(Message, frozen=True):
    """The role is one of the run's. ``step`` is the version to start from, the newest checkpoint's; ``evaluate``: it is
    due for evaluation.
    """

    run: str
    step: int
    evaluate: bool = False


class LeaseRequest(Message, frozen=True):
    """Ask for up to ``room`` groups."""

    room: Count


class Leases(Message, frozen=True):
    """Granted leases, perhaps none; ``version`` is the newest published one."""

    leases: list[Lease]
    version: int
    stop: bool = False
    waiting: str = ""


class GroupHeader(Message, frozen=True):
    """The scalars of core.types.Group; its arrays stand in frames. ``channels``: (name, axis) of each."""

    group: Count
    slot: Count
    attempt: Count
    problem: Problem
    generator: Name
    temperature: float
    component_names: list[Name]
    channels: list[tuple[Name, Axis]] = []
    scored_by: dict[Name, ScoredBy] = {}
    queued_version: VersionOrNone = -1
    queued_at: float = 0.0
    counts: dict[Name, float] = {}


class SubmitGroup(Message, frozen=True):
    """A finished group; acknowledged only when it is durable."""

    header: GroupHeader


class GroupAck(Message, frozen=True):
    """``accepted`` is false for a late attempt or a refused group; ``reason`` then says why."""

    group: int
    accepted: bool
    reason: str = ""


class FailGroup(Message, frozen=True):
    """The holder gives the group up: it is refused as ``reason`` (failed, filtered, stale)."""

    group: Count
    attempt: Count
    reason: Name
    detail: Text = ""


class ReturnLeases(Message, frozen=True):
    """The holder cannot finish these, as (group, attempt): they are issued again, nothing is refused."""

    leases: list[tuple[Count, Count]]
    detail: Text


class NextBatch(Message, frozen=True):
    """Ask for the batch of a learner step."""

    step: Version


class BatchReply(Message, frozen=True):
    """The groups of one batch in their durable order; empty while ``waiting`` says for what.

    ``finished``: the run has no such step, the version before it is the last one: it is checkpointed and scored, then
    comes the end. ``stop``: the run is over, leave now.
    """

    step: int
    headers: list[GroupHeader]
    replay: bool = False
    finished: bool = False
    stop: bool = False
    waiting: str = ""


class Commit(Message, frozen=True):
    """The batch of ``step`` is trained and version ``step + 1`` is published under ``checksum``.

    ``metrics`` are the scalars of the step; ``histograms`` name → values; ``texts`` name → markdown for TensorBoard;
    ``tokens``: output tokens trained.
    Step −1 publishes the start: version 0 with no batch, or after a restart the checkpoint's version again.
    ``pinned_bytes``: what the version's weights take up until the evaluator has scored them; 0 = not kept. A version
    that turns out to be the last one once it is committed is committed again, pinned.
    """

    step: VersionOrNone
    version: Version
    checksum: Name
    pinned_bytes: Count = 0
    metrics: dict[Name, float] = {}
    histograms: dict[Name, list[float]] = {}
    texts: dict[Name, Text] = {}
    tokens: Count = 0


class Committed(Message, frozen=True):
    """The commit is durable. ``lineage`` rises when a replay's checksum differs from the logged one.

    ``evaluate``: the version after this one is due for evaluation: it is to be pinned. ``spared``: versions from before
    this launch that still wait for their score: their checkpoints are not to be pruned.
    """

    lineage: int
    diverged: bool = False
    evaluate: bool = False
    spared: list[Version] = []


class Checkpointed(Message, frozen=True):
    """The checkpoint in ``path`` covers all batches before ``step``: their payloads may go to the archive."""

    step: Version
    path: Text


class HeldOut(Message, frozen=True):
    """What the learner of a job without an evaluator has measured of a version, names as in docs/metrics.md (eval/…).
    It is sent before the version's Checkpointed.
    """

    version: Version
    metrics: dict[Name, float]


class NextEval(Message, frozen=True):
    """Ask for a version to evaluate."""


class EvalJob(Message, frozen=True):
    """Evaluate ``version`` (−1: nothing to do yet, ``waiting`` says for what).

    ``stored``: the checksum of a version from before this launch, which is not in the weight channel but in its
    checkpoint, or (version 0) the start model; empty: it is pinned in the channel.
    """

    version: int
    stop: bool = False
    waiting: str = ""
    stored: str = ""


class EvalResult(Message, frozen=True):
    """Scores of one version, names as in docs/metrics.md (eval/…). ``lost``: why a stored one is to be had no more."""

    version: Version
    metrics: dict[Name, float]
    texts: dict[Name, Text] = {}
    lost: Text = ""


class NextRefresh(Message, frozen=True):
    """Ask for the newest ``groups`` that were trained on, of the batches from learner step ``after`` on."""

    after: Version
    groups: Count


class RefreshJob(Message, frozen=True):
    """Groups of the batches before ``version``, the newest multiple of scorer.refresh_every, newest batch last (−1: it
    is not above ``after`` yet, ``waiting`` says for what). ``archived``: shard in trajectories/ → further ones that
    stand in it.
    """

    version: int
    headers: list[GroupHeader] = []
    archived: dict[str, list[int]] = {}
    stop: bool = False
    waiting: str = ""


class Heartbeat(Message, frozen=True):
    """Sent by a thread of every role, from a socket of its own, at broker.heartbeat_seconds.

    ``activity`` and ``waiting_on`` say what the role does now (I4); ``seconds`` are cumulative by activity, ``compute``
    the cumulative charges of the compute ledger (I6).
    """

    role: Name
    index: Index
    activity: Name
    waiting_on: Text
    since: float
    seconds: dict[Name, float]
    compute: dict[Name, float]
    gauges: dict[Name, float] = {}


class Serving(Message, frozen=True):
    """A scorer says where it answers ScoreRequests, once its models are loaded."""

    url: Name


class ScorerAt(msgspec.Struct, frozen=True):
    """Where a scorer answers, with the run's keys. ``life``: which of the processes of that name it is."""

    name: str
    url: str
    life: int


class Beat(Message, frozen=True):
    """Reply to a heartbeat. ``trained``: the last version is out, what is left is to score and to archive. ``scorers``:
    those that can be asked, by name; but for one whose heartbeats are lost.
    """

    version: int
    stop: bool = False
    trained: bool = False
    scorers: list[ScorerAt] = []


class ScoreRequest(Message, frozen=True):
    """Ask a model of scorer.models about n outputs of one prompt, whole or not.

    Its arrays, all int32: the prompt's tokens [P]; the outputs' lengths [n]; their tokens [T], one after another; and,
    of a model that reads steps, where those end [S], exclusive offsets in the T tokens, ascending.
    """

    model: Name


class Scored(Message, frozen=True):
    """One array, float32 and finite, by one version: [n] where the model reads outcomes (NaN of an output without
    tokens), [S] of steps, [T] of tokens.
    """

    model: str
    version: int


class Unscored(Message, frozen=True):
    """The model has no score for it: what it said is no number, or the request does not fit it. ``reason``: one line.
    Asked again, it would answer the same.
    """

    model: str
    reason: str


class Failure(Message, frozen=True):
    """A role says why it dies, or the launcher how one has died. ``final``: another start would not cure it.
    ``batch``: the learner step whose batch it failed on, or −1. ``pid``: who was found dead, 0 where it is the sender.
    """

    role: Name
    index: Index
    error: Text
    final: bool = False
    batch: VersionOrNone = -1
    pid: Pid = 0


class StatusRequest(Message, frozen=True):
    """The launcher asks how the run stands."""


class Status(Message, frozen=True):
    """``summary`` has the keys of summary.json, ``roles`` the last heartbeat of each, ``metrics`` the last step's."""

    summary: dict[str, Any]
    roles: list[Heartbeat]
    metrics: dict[str, float]
    failures: list[Failure]
    finished: bool


class StopRun(Message, frozen=True):
    """The launcher ends the run: nothing is leased any more, the summary is written, every reply says stop.

    Its groups stay in the ledger, where they are durable already; only a completed run archives what is left.
    """

    status: Annotated[str, Meta(pattern="^(completed|failed|interrupted)$")]
    reason: Text = ""


class Acknowledged(Message, frozen=True):
    """Plain acknowledgement."""


class Error(Message, frozen=True):
    """The request was refused; ``error`` is one line for a person."""

    error: str


class VersionHint(Message, frozen=True):
    """PUB: a version was published."""

    version: int


RequestMessage = (
    Hello | LeaseRequest | SubmitGroup | FailGroup | ReturnLeases | NextBatch | Commit | Checkpointed | HeldOut
    | NextEval | EvalResult | NextRefresh | Heartbeat | Failure | StatusRequest | StopRun | Serving | ScoreRequest
)  # fmt: skip
LAUNCHER = "launcher"
SENDERS: dict[type[Message], str] = {
    **dict.fromkeys((LeaseRequest, SubmitGroup, FailGroup, ReturnLeases), "generator"),
    **dict.fromkeys((NextBatch, Commit, Checkpointed, HeldOut), "learner"),
    **dict.fromkeys((NextEval, EvalResult), "evaluator"),
    Serving: "scorer",
    NextRefresh: "refresher",
    StopRun: LAUNCHER,
}
"""Whose message it is. Hello and StatusRequest are anybody's; a Heartbeat or a Failure speaks of the process that sends
it, and the launcher may send the Failure of any.
"""
ReplyMessage = (
    Welcome | Leases | GroupAck | BatchReply | Committed | EvalJob | RefreshJob | Beat | Status | Scored | Unscored
    | Acknowledged | Error
)  # fmt: skip

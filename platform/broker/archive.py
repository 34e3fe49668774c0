"""The archive: every sample that left the spool, as sealed Parquet shards in runs/NAME/trajectories/.

    shards.plan ──► Archive.seal (a thread: read, write, rename) ──► Archive.done ──► shards.sealed

Invariant: a payload is deleted only after the file that holds it stands under its final name. A file without a leading
dot is whole. The plan is durable and decides what a shard holds, so that writing it again after a crash replaces it by
itself. The broker's loop never waits for a shard; it only deletes the payloads afterwards. What Parquet cannot hold is
left out and named (the payload stays in the ledger); what the disk does not take ends the run. Every page has a
checksum, and `read_archive` verifies it: a shard that is damaged or gone is told by name.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offtrail.core.types import FINISH_REASONS, Channel, Group, Int32, Problem, ScoredBy
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.shards import names_standing, read_shard
from offtrail.platform.wire.groups import unpack_group

SHARD_BYTES = 32 << 20
"""Payload bytes of a shard: large enough to be read well, small enough to be written in about a second."""

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("group", pa.int64()),
        ("sample", pa.int32()),
        ("slot", pa.int64()),
        ("attempt", pa.int32()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("batch", pa.int64()),
        ("position", pa.int32()),
        ("lineage", pa.int32()),
        ("generator", pa.string()),
        ("temperature", pa.float32()),
        ("problem", pa.string()),
        ("prompt", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("finish", pa.string()),
        ("reward", pa.float32()),
        ("rewards", pa.map_(pa.string(), pa.float32())),
        ("submitted_at", pa.float64()),
        ("first_token_at", pa.float64()),
        ("last_token_at", pa.float64()),
        ("queued_at", pa.float64()),
        ("queued_version", pa.int32()),
        ("step_ends", pa.list_(pa.int32())),
        ("scored_by", pa.map_(pa.string(), pa.struct([("model", pa.string()), ("version", pa.int32())]))),
    ]
)
"""One row a sample. ``problem`` is JSON; ``batch`` and ``position`` are null for refused groups; ``step_ends`` are
offsets in the sample's own ``tokens``.

Each channel is a further column, ``AXIS/NAME`` of float32 or int32, null for groups without it: ``token/…`` and
``step/…`` hold a list, ``sample/…`` a number, and ``node/…`` the whole group's nodes, a list that stands with its
sample 0.
"""


GROUPS_AT_ONCE = 64
"""A column of text repeats a group's prompt for each of its samples, and pieces of it must stay below 2 GiB."""


def tables(run: str, groups: Sequence[tuple[dict[str, Any], Group]], left_out: dict[int, str]) -> list[pa.Table]:
    """Rows of SCHEMA and the channels for groups, each with what the ledger says of it (state, reason, batch, …); a
    group that Parquet cannot hold goes to ``left_out``, with the reason.
    """
    try:
        return [_rows(run, groups)] if groups else []
    except Exception as error:  # whatever an older broker let in
        if len(groups) == 1:
            left_out[groups[0][1].group] = _why(error)
            return []
    middle = len(groups) // 2
    return tables(run, groups[:middle], left_out) + tables(run, groups[middle:], left_out)


def _why(error: Exception) -> str:
    return f"the archive cannot hold it ({type(error).__name__}: {error})"


def _rows(run: str, told: Sequence[tuple[dict[str, Any], Group]]) -> pa.Table:
    groups = [group for _, group in told]
    columns = _of_samples(groups)
    rest = pa.schema([column for column in SCHEMA if column.name not in columns])
    once = pa.Table.from_pylist([_of_group(run, *one) for one in told], schema=rest)
    repeated = once.take(np.repeat(np.arange(len(groups)), [group.size for group in groups]))
    rows = pa.Table.from_arrays(
        [columns[name] if name in columns else repeated[name] for name in SCHEMA.names], schema=SCHEMA
    )
    for name in dict.fromkeys((c.axis, name) for group in groups for name, c in group.channels.items()):
        rows = rows.append_column("/".join(name), _channel_column(groups, *name))
    return rows


def _of_group(run: str, facts: dict[str, Any], group: Group) -> dict[str, Any]:
    """What all samples of a group have in common."""
    problem = group.problem
    told = {name: problem_value(problem, name) for name in ("task", "index", "prompt", "answer", "meta", "messages")}
    scored_by = [(name, {"model": by.model, "version": by.version}) for name, by in group.scored_by.items()]
    return {
        "run": run, **facts, "group": group.group, "slot": group.slot, "attempt": group.attempt,
        "generator": group.generator, "temperature": group.temperature, "prompt": problem.prompt,
        "problem": json.dumps(told, ensure_ascii=False), "prompt_tokens": group.prompt_tokens,
        "queued_at": group.queued_at, "queued_version": group.queued_version, "scored_by": scored_by,
    }  # fmt: skip


def _of_samples(groups: Sequence[Group]) -> dict[str, pa.Array]:
    """The columns in which the samples of a group differ."""
    token_starts = _starts([group.lengths for group in groups])
    times = np.concatenate([group.times for group in groups])
    components = [np.array(list(group.components.values()), np.float32) for group in groups]
    return {
        "sample": pa.array(np.concatenate([np.arange(group.size, dtype=np.int32) for group in groups])),
        "finish": pa.array(FINISH_REASONS).take(np.concatenate([group.finish for group in groups])),
        "reward": pa.array(np.concatenate([group.rewards for group in groups])),
        "rewards": pa.MapArray.from_arrays(
            _starts([np.full(group.size, len(group.components)) for group in groups]),
            pa.array([name for group in groups for _ in range(group.size) for name in group.components], pa.string()),
            pa.array(np.concatenate([values.T.ravel() for values in components])),
        ),
        "step_ends": pa.ListArray.from_arrays(
            _starts([_steps(group) for group in groups]),
            pa.array(np.concatenate([g.step_ends - _starts([g.lengths])[g.step_samples] for g in groups])),
        ),
    } | {
        name: pa.ListArray.from_arrays(token_starts, pa.array(np.concatenate([getattr(g, name) for g in groups])))
        for name in ("tokens", "logprobs", "versions")
    } | {
        name: pa.array(np.ascontiguousarray(times[:, place]))
        for place, name in enumerate(("submitted_at", "first_token_at", "last_token_at"))
    }  # fmt: skip


def _starts(lengths: Sequence[Any]) -> Int32:
    """Where the parts of all groups begin, and the last one's end."""
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)


def _steps(group: Group) -> Int32:
    """[G]: how many steps each sample has."""
    return np.bincount(group.step_samples, minlength=group.size).astype(np.int32)


def _channel_column(groups: Sequence[Group], axis: str, name: str) -> pa.ChunkedArray:
    """A channel of all groups; null for those without it."""
    pieces = [
        _by_sample(group, channel)
        if (channel := group.channels.get(name)) is not None and channel.axis == axis
        else pa.nulls(group.size)
        for group in groups
    ]
    # Permissive: a channel that is int32 in one group and float32 in another becomes float64, which holds both.
    parts = [pa.table({name: piece}) for piece in pieces]
    return pa.concat_tables(parts, promote_options="permissive")[name]


def _by_sample(group: Group, channel: Channel) -> pa.Array:
    """The channel's values, cut into one row a sample."""
    values = pa.array(channel.values)
    if channel.axis == "sample":
        return values
    if channel.axis == "node":
        nodes = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
        return pa.concat_arrays([nodes, pa.nulls(group.size - 1, nodes.type)])
    return pa.ListArray.from_arrays(_starts([group.lengths if channel.axis == "token" else _steps(group)]), values)


def problem_value(problem: Any, name: str) -> Any:
    """A field of a problem as plain JSON."""
    value = getattr(problem, name)
    return dict(value) if name == "meta" else [dict(m) for m in value] if name == "messages" else value


def write_shard(ledger: Path, folder: Path, run: str, name: str) -> dict[int, str]:
    """Write one planned shard and seal it by rename; the groups that it could not hold, and why.

    OSError when the disk does not take it, LedgerError when the ledger cannot be read.
    """
    groups: list[tuple[dict[str, Any], Group]] = []
    left_out: dict[int, str] = {}
    for facts, body in read_shard(ledger, name):
        try:
            groups.append((facts, unpack_group(body)))
        except Exception as error:  # whatever an older broker let in
            left_out[facts["group"]] = _why(error)
    rows = [part for at in range(0, len(groups), GROUPS_AT_ONCE)
            for part in tables(run, groups[at : at + GROUPS_AT_ONCE], left_out)]  # fmt: skip
    folder.mkdir(exist_ok=True)
    partial = folder / f".{name}"
    try:
        whole = pa.concat_tables(rows, promote_options="permissive") if rows else SCHEMA.empty_table()
        pq.write_table(whole, partial, compression="zstd", write_page_checksum=True)
        os.replace(partial, folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return left_out


class ArchiveError(ValueError):
    """A shard is damaged or gone; one line with its path and the way out."""


def read_archive(run_dir: Path, pattern: str = "*.parquet", **options: Any) -> Iterator[pa.Table]:
    """The sealed shards of a run whose names match, in the order of their names; ``options``: of pq.read_table.

    Raises ArchiveError where one is damaged, or was sealed and is not there.
    """
    folder = run_dir / "trajectories"
    names = {path.name for path in folder.glob(pattern)}
    way_out = "put a copy of it back: its groups are nowhere else, and only a new run would make such again"
    for name in names_standing(run_dir / "ledger.sqlite"):
        if Path(name).match(pattern) and name not in names:
            raise ArchiveError(f"{folder / name}: is gone, though it was sealed; {way_out}")
    for name in sorted(names):
        try:
            yield pq.read_table(folder / name, page_checksum_verification=True, **options)
        except (OSError, pa.ArrowException) as error:
            words = " ".join(str(error).split())
            raise ArchiveError(f"{folder / name}: is damaged ({words}); {way_out}") from error


@dataclass(frozen=True)
class Sealed:
    """What became of a shard: its file stands but for the groups ``left_out``, or it is set aside for ``why``."""

    name: str
    left_out: dict[int, str] = field(default_factory=dict)
    why: str = ""


def read_groups(file: Path, wanted: Container[int]) -> Iterator[Group]:
    """The wanted groups of a sealed shard, one after another, as they were before. OSError or ArrowException where it
    is damaged.
    """
    whole = pq.read_table(file, page_checksum_verification=True)
    kinds = {name: np.int32 if pa.types.is_int32(_values(whole, name)) else np.float32 for name in _channels(whole)}
    numbers = whole["group"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # a group's samples lie side by side
    for start, end in pairwise([*starts.tolist(), len(numbers)]):
        if numbers[start] in wanted:
            yield _group(whole.slice(start, end - start).to_pylist(), kinds)


def _channels(whole: pa.Table) -> list[str]:
    return [name for name in whole.schema.names if "/" in name]


def _values(whole: pa.Table, name: str) -> pa.DataType:
    kind = whole.schema.field(name).type
    return kind.value_type if pa.types.is_list(kind) else kind


def _group(rows: Sequence[dict[str, Any]], kinds: dict[str, Any]) -> Group:
    """A group of the rows of its samples."""
    samples = sorted(rows, key=lambda row: row["sample"])
    first, told = samples[0], json.loads(samples[0]["problem"])
    lengths = np.array([len(row["tokens"]) for row in samples], np.int32)
    starts = np.cumsum(lengths) - lengths
    columns: dict[str, list[float]] = {}
    for row in samples:
        for name, value in row["rewards"]:
            columns.setdefault(name, []).append(value)
    ends = [start + end for start, row in zip(starts, samples, strict=True) for end in row["step_ends"]]
    times = [[row["submitted_at"], row["first_token_at"], row["last_token_at"]] for row in samples]
    return Group(
        group=first["group"],
        slot=first["slot"],
        attempt=first["attempt"],
        problem=Problem(**told | {"messages": tuple(told["messages"])}),
        generator=first["generator"],
        temperature=first["temperature"],
        prompt_tokens=np.array(first["prompt_tokens"], np.int32),
        lengths=lengths,
        tokens=_joined(samples, "tokens", np.int32),
        logprobs=_joined(samples, "logprobs", np.float32),
        versions=_joined(samples, "versions", np.int32),
        finish=np.array([FINISH_REASONS.index(row["finish"]) for row in samples], np.uint8),
        rewards=np.array([row["reward"] for row in samples], np.float32),
        components={name: np.array(column, np.float32) for name, column in columns.items()},
        times=np.array(times, np.float64),
        step_ends=np.array(ends, np.int32),
        channels={name.partition("/")[2]: _channel(samples, name, kind) for name, kind in kinds.items()
                  if first[name] is not None},
        scored_by={name: ScoredBy(**by) for name, by in first["scored_by"]},
        queued_version=first["queued_version"],
        queued_at=first["queued_at"],
    )  # fmt: skip


def _joined(samples: Sequence[dict[str, Any]], name: str, kind: Any) -> Any:
    return np.concatenate([np.array(row[name], kind) for row in samples])


def _channel(samples: Sequence[dict[str, Any]], name: str, kind: Any) -> Channel:
    axis: Any = name.partition("/")[0]
    if axis == "sample":
        return Channel(axis, np.array([row[name] for row in samples], kind))
    return Channel(axis, np.array(samples[0][name], kind) if axis == "node" else _joined(samples, name, kind))


class Archive:
    """Seals planned shards in a thread of its own, one after another, in the order asked for."""

    def __init__(self, ledger: Path, folder: Path, run: str) -> None:
        self._ledger, self._folder, self._run = ledger, folder, run
        self._todo: queue.Queue[str | None] = queue.Queue()
        self._done: queue.Queue[Sealed | Exception] = queue.Queue()
        self._asked: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
        self._thread.start()

    def seal(self, names: Sequence[str]) -> None:
        """Ask for shards; those already asked for are in the works."""
        for name in names:
            if name not in self._asked:
                self._asked.add(name)
                self._todo.put(name)

    def done(self) -> list[Sealed]:
        """What became of shards since the last call. Raises OSError, naming the file, when the disk took one not."""
        found: list[Sealed] = []
        while not self._done.empty():
            sealed = self._done.get()
            if isinstance(sealed, Exception):
                raise sealed
            found.append(sealed)
        return found

    def close(self) -> None:
        """Finish the shard in the works and end the thread; the rest waits for the next start."""
        while not self._todo.empty():
            self._todo.get_nowait()
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        pa.array([0])  # its first array makes pyarrow import pandas: now, while the other roles load
        while (name := self._todo.get()) is not None:
            try:
                self._done.put(Sealed(name, write_shard(self._ledger, self._folder, self._run, name)))
            except LedgerError as error:
                self._done.put(error)
            except OSError as error:
                self._done.put(OSError(f"{self._folder / name}: {error}"))
            except Exception as error:
                self._done.put(Sealed(name, why=f"no file can be made of it ({type(error).__name__}: {error})"))

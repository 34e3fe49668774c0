"""weights.channel=distributed: the learner's rank 0 broadcasts a version into SGLang servers (NCCL, gloo on CPUs).

    all ranks gather ─► rank 0: pause all ─► begin ─► [bucket: POST to each ∥ broadcast] … ─► end ─► name ─► continue

Called by the learner between two steps, and while it waits for a batch (`tend`: a server that was started anew lacks
the version). The servers are those that the generators list in runs/NAME/servers/. Invariants: every shard is gathered
before the first server is spoken to, since two process groups that wait on each other are a deadlock; the version is
visible (its note is there, publish returns) when every server that answered holds it; a server that does not answer in
engine.hang_seconds is left out, and the others, which stay paused meanwhile, are given the whole version again: nobody
decodes with a part of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang import versions
from offtrail.platform.engines.sglang.client import Loop
from offtrail.platform.engines.sglang.control import ControlError, PauseMode, Server, flush
from offtrail.platform.engines.sglang.servers import Address, read_addresses
from offtrail.platform.engines.sglang.shapes import Shapes, check_shapes
from offtrail.platform.weights.memory import (
    Pushed,
    bytes_of,
    cut,
    fingerprint,
    note_path,
    read_note,
    remove_notes,
    write_note,
)
from offtrail.platform.weights.store import Publisher, WeightsError

log = logging.getLogger("offtrail.learner")

GROUP = "offtrail-weights"
ASK_SECONDS = 5.0
TRIES = 3
"""Pushes of one version, each to the servers that answered the one before."""


@dataclass
class PushedReader:
    """The reading end: the learner has brought the version, or brings it; a note holds its probe."""

    folder: Path

    @contextlib.contextmanager
    def open(self, version: int) -> Iterator[Pushed]:
        """Stands for the version. FileNotFoundError when a newer one has taken its place."""
        if not note_path(self.folder, version).exists():
            raise FileNotFoundError(f"version {version} is not in {self.folder}")
        yield Pushed(version)

    def probe(self, version: int) -> list[float]:
        """The learner's numbers on the fixed text; empty where there are none."""
        found: list[float] = read_note(self.folder, version)["probe"]
        return found


class DistributedChannel:
    """The publishing end. ``folder``: where the generators list their servers, of whom there are ``generators``;
    ``shapes``: of the model that they come up with.

    Raises ValueError, before a server is spoken to, for a version of another model, and WeightsError when no server
    takes one.
    """

    def __init__(
        self,
        store: Publisher,
        folder: Path,
        config: SglangConfig,
        *,
        dtype: torch.dtype | None,
        bucket_bytes: int,
        generators: int,
        shapes: Shapes,
    ) -> None:
        self.store, self.servers_folder, self.config = store, folder, config
        self.dtype, self.bucket_bytes, self.generators, self.shapes = dtype, bucket_bytes, generators, shapes
        self.bytes_published, self.bytes_last, self.delta_share = 0, 0, 1.0
        self._loop = Loop("weights")
        self._sender = ThreadPoolExecutor(1, "broadcast")
        self._group: dist.ProcessGroup | None = None
        self._members: tuple[Address, ...] = ()
        self._groups_made = 0
        self._version, self._tensors = -1, dict[str, Tensor]()
        self._holding: set[Address] = set()
        remove_notes(store.folder)

    def publish(self, version: int, tensors: Mapping[str, Tensor], probe: Sequence[float] = ()) -> str:
        """Broadcast to every server that is up; none at the very start, where each comes up with version 0 itself."""
        check_shapes(version, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.shapes)
        self._tensors = {name: self._rounded(tensor.detach()) for name, tensor in tensors.items()}
        self._version, self._holding = version, set()
        digest = fingerprint(self._tensors)
        if version:
            self._push(self._up())
        write_note(self.store.folder, version, {"checksum": digest, "probe": list(probe)})
        for old in self.store.folder.glob("v*.json"):
            if old != note_path(self.store.folder, version):
                old.unlink(missing_ok=True)
        return digest

    def pin(self, version: int) -> int:
        """A copy in the store, for the evaluator; its bytes."""
        self.store.publish(version, {name: tensor.cpu() for name, tensor in self._tensors.items()})
        return self.store.pin(version)

    def serve_late_readers(self) -> None:
        """Push the newest version to servers that came up since."""
        if self._version > 0 and set(self._up()) - self._holding:
            self._push(self._up())

    def close(self) -> None:
        """Leave the group, which its servers outlive."""
        self._loop.run(self._leave())
        self._loop.close()
        self._sender.shutdown(wait=False)
        remove_notes(self.store.folder)
        self.store.close()

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _up(self) -> list[Address]:
        found: list[Address] = []
        for index in range(self.generators):
            found += read_addresses(self.servers_folder / f"generator-{index}.json").values()
        return found

    # --- a push ---

    def _push(self, up: Sequence[Address]) -> None:
        """Until every server that answers holds the version. Where a push fails, all stay paused for the next try: some
        may hold a part of it.
        """
        servers = list(up)
        for _ in range(TRIES):
            if not servers:
                return  # all are starting: serve_late_readers gives it to them
            failed = self._loop.run(self._bring(servers))
            if not failed:
                self._holding = set(servers)
                self.bytes_last = sum(bytes_of(tensor, None) for tensor in self._tensors.values())
                self.bytes_published += self.bytes_last
                return
            self._loop.run(self._leave())
            asked = [self._server(address) for address in servers]
            silent = self._loop.run(_all(asked, lambda server: server.model_info(), limit=ASK_SECONDS))
            for address, error in failed.items():
                then = "it does not answer and is left out" if address in silent else "once more"
                log.warning("version %d to %s: %s: %s", self._version, address.url, error, then)
            servers = [address for address in servers if address not in silent]
        raise WeightsError(f"version {self._version}: no push of {TRIES} came to its end; see the servers' logs")

    async def _bring(self, addresses: Sequence[Address]) -> dict[Address, Exception]:
        """One push to all of them; who failed, and how."""
        abouts = await asyncio.gather(*(self._about(address) for address in addresses), return_exceptions=True)
        if failed := {a: e for a, e in zip(addresses, abouts, strict=True) if isinstance(e, Exception)}:
            return failed
        told = [about["version"] for about in abouts if not isinstance(about, BaseException)]
        servers = [self._server(a, versions.needs_session(v)) for a, v in zip(addresses, told, strict=True)]
        self._pause_mode = self._mode(told)
        for step in (self._join, self._pause, self._send, self._name, self._go_on):
            if failed := await step(servers):
                return failed
        return {}

    def _server(self, address: Address, has_sessions: bool = True) -> Server:
        return Server(address, self._loop.session, has_sessions, self.config.hang_seconds)

    async def _about(self, address: Address) -> dict[str, Any]:
        for key in (address.key, address.admin_key):  # which of them it wants differs between versions
            headers = {"Authorization": f"Bearer {key}"}
            async with self._loop.session.get(
                f"{address.url}/server_info", headers=headers, timeout=aiohttp.ClientTimeout(total=ASK_SECONDS)
            ) as reply:
                if reply.status == 200:
                    return dict(await reply.json())
        raise ControlError(f"{address.url}/server_info answered {reply.status} to both keys")

    def _mode(self, told: Sequence[str]) -> PauseMode:
        if self.config.kv_on_update == "keep":
            return "in_place"
        if self.config.pause_mode == "auto":
            return "retract" if all(versions.can_retract(version) for version in told) else "abort"
        return self.config.pause_mode

    async def _pause(self, servers: Sequence[Server]) -> dict[Address, Exception]:
        async def pause(server: Server) -> None:
            await server.post("/pause_generation", {"mode": self._pause_mode})
            if self._pause_mode != "in_place":
                await flush(server)
            if server.has_sessions:
                with contextlib.suppress(ControlError):  # of a push that failed
                    await server.post("/end_weight_update")
                await server.post("/begin_weight_update")

        return await _all(servers, pause)

    async def _send(self, servers: Sequence[Server]) -> dict[Address, Exception]:
        buckets = cut(self._tensors, self.bucket_bytes, None)

        async def receive(server: Server) -> None:
            for bucket in buckets:
                body = {
                    "names": bucket,
                    "dtypes": [str(self._tensors[name].dtype).removeprefix("torch.") for name in bucket],
                    "shapes": [list(self._tensors[name].shape) for name in bucket],
                    "group_name": self._group_name,
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                }
                await server.post("/update_weights_from_distributed", body)
            if server.has_sessions:
                await server.post("/end_weight_update")

        sending = asyncio.get_running_loop().run_in_executor(self._sender, self._broadcast, buckets)
        failed = await _all(servers, receive)
        if not failed:
            await sending
        return failed

    def _broadcast(self, buckets: Sequence[Sequence[str]]) -> None:
        """In a thread of its own: rank 0's side of every bucket, in the order in which the servers receive."""
        assert self._group is not None
        for bucket in buckets:
            flat = torch.cat([self._tensors[name].contiguous().view(-1).view(torch.uint8) for name in bucket])
            dist.broadcast(flat, 0, group=self._group)

    async def _name(self, servers: Sequence[Server]) -> dict[Address, Exception]:
        body = {"new_version": str(self._version), "abort_all_requests": False}
        return await _all(servers, lambda server: server.post("/update_weight_version", body))

    async def _go_on(self, servers: Sequence[Server]) -> dict[Address, Exception]:
        return await _all(
            servers,
            lambda server: server.post(
                "/continue_generation", {"torch_empty_cache": False} if server.has_sessions else {}
            ),
        )

    # --- the group ---

    async def _join(self, servers: Sequence[Server]) -> dict[Address, Exception]:
        """A process group of this learner and all ranks of all servers; kept while these are the same."""
        members = tuple(server.address for server in servers)
        if members == self._members and self._group is not None:
            return {}
        await self._leave()
        self._groups_made += 1
        self._group_name = f"{GROUP}-{self._groups_made}"
        ranks, backend = self.config.tensor_parallel, "nccl" if self.config.device.startswith("cuda") else "gloo"
        world, host = 1 + ranks * len(servers), _own_address(servers[0].address)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self.config.hang_seconds)
        )
        offsets = {server.address: 1 + i * ranks for i, server in enumerate(servers)}

        async def enter(server: Server) -> None:
            body = {
                "master_address": host,
                "master_port": store.port,
                "rank_offset": offsets[server.address],
                "world_size": world,
                "group_name": self._group_name,
                "backend": backend,
            }
            await server.post("/init_weights_update_group", body)

        joining = asyncio.get_running_loop().run_in_executor(
            self._sender, join_group, store, world, backend, self._group_name, self.config.hang_seconds
        )
        failed = await _all(servers, enter)
        if failed:
            return failed
        self._group = await joining
        self._members, self._store = members, store
        return {}

    async def _leave(self) -> None:
        """Give the group up. A thread that hangs in it, because a member died, is left to its time-out."""
        if self._group is not None:
            body, members = {"group_name": self._group_name}, [self._server(address) for address in self._members]
            await _all(members, lambda s: s.post("/destroy_weights_update_group", body), limit=ASK_SECONDS)
            with contextlib.suppress(Exception):
                dist.destroy_process_group(self._group)
        self._sender.shutdown(wait=False)
        self._sender = ThreadPoolExecutor(1, "broadcast")
        self._group, self._members = None, ()


async def _all(
    servers: Sequence[Server], work: Callable[[Server], Awaitable[Any]], *, limit: float | None = None
) -> dict[Address, Exception]:
    """The same for every server side by side; who failed, and how, or did not answer in ``limit`` seconds."""
    results = await asyncio.gather(
        *(asyncio.wait_for(work(server), limit) for server in servers), return_exceptions=True
    )
    return {
        server.address: result if isinstance(result, Exception) else ControlError(repr(result))
        for server, result in zip(servers, results, strict=True)
        if isinstance(result, BaseException)
    }


def join_group(store: c10d.Store, world: int, backend: str, name: str, timeout_s: float) -> dist.ProcessGroup:
    """Rank 0 of a group beside the learner's own world. torch has no public call for that: this is what
    ``init_process_group`` does, without making the group the default one, as SGLang does on its side.
    """
    group, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timedelta(seconds=timeout_s),
    )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _own_address(server: Address) -> str:
    """The address of this host as that server reaches it."""
    host, _, port = server.url.rpartition("//")[2].rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host.strip("[]"), int(port)))  # sends nothing
        return str(probe.getsockname()[0])

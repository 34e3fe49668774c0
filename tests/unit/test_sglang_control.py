"""Control calls in their order, against a server that only notes them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from offtrail.platform.engines.sglang.control import ControlError, Server, swap
from offtrail.platform.engines.sglang.servers import Address

HERE = Address("http://here", "", "", 1)


class Noted(Server):
    """Hands its samples back at the second abortion: one was on its way at the first."""

    def __init__(self, deadline_s: float = 60.0, needed: int = 2) -> None:
        super().__init__(HERE, None, has_sessions=False, deadline_s=deadline_s)  # type: ignore[arg-type]
        self.calls: list[str]
        self.back: asyncio.Event
        for name, value in (("calls", []), ("needed", needed), ("back", asyncio.Event())):
            object.__setattr__(self, name, value)

    async def post(
        self, path: str, body: dict[str, Any] | None = None, deadline_s: float | None = None
    ) -> dict[str, Any]:
        self.calls.append(path)
        if path == "/abort_request":
            assert body == {"abort_all": True}
            if self.calls.count(path) == self.needed:  # type: ignore[attr-defined]
                self.back.set()
        return {}

    async def drained(self) -> None:
        await self.back.wait()

    async def transfer(self, server: Server) -> None:
        assert server is self
        self.calls.append("transfer")


def test_an_aborting_pause_finds_nothing_running() -> None:
    async def work() -> list[str]:
        server = Noted()
        await swap(server, 3, "abort", server.transfer, drained=server.drained)
        return server.calls

    assert asyncio.run(work()) == [
        "/abort_request", "/abort_request", "/pause_generation", "/flush_cache", "transfer", "/update_weight_version",
        "/continue_generation",
    ]  # fmt: skip


def test_a_server_that_hands_nothing_back_is_not_paused() -> None:
    async def work() -> None:
        server = Noted(deadline_s=0.01, needed=10**6)
        with pytest.raises(ControlError, match=r"http://here has not handed its samples back in 0.01 s \(engine\.hang"):
            await swap(server, 3, "abort", server.transfer, drained=server.drained)
        assert set(server.calls) == {"/abort_request"}

    asyncio.run(work())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_other_pauses_abort_nothing(mode: Any) -> None:
    async def work() -> list[str]:
        server = Noted()
        await swap(server, 3, mode, server.transfer, drained=server.drained)
        return server.calls

    flushed = ["/flush_cache"] if mode == "retract" else []
    assert asyncio.run(work()) == [
        "/pause_generation", *flushed, "transfer", "/update_weight_version", "/continue_generation",
    ]  # fmt: skip

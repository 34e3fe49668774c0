"""job=chat with a server that says nothing."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import numpy as np
import pytest

from offtrail.platform.engines.sglang.servers import Address
from offtrail.platform.launcher.chat import CutError, Served


def test_a_server_that_says_nothing_for_hang_seconds_cuts_the_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(f"http://127.0.0.1:{silent.getsockname()[1]}", "key", "", 1)
        served = Served.__new__(Served)
        served.longest, served._patience, served._temperature, served._stop = 100, 0.1, 0.0, [2]
        served._server = SimpleNamespace(poll=lambda: None, ready=lambda: [0], address=lambda place: address)  # type: ignore[assignment]
        with pytest.raises(CutError, match="the server broke off \\(TimeoutError\\)"):
            next(served.answer(np.array([1], np.int32)))

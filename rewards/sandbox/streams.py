"""A whole program between stdin and stdout, which are pipes to the judge; all that it writes is read, and bounded."""

from __future__ import annotations

import os
import select

from offtrail.rewards.sandbox.runs import Dead, Run

LONGEST_OUTPUT = 1 << 20
"""Bytes."""


def run_to_its_end(run: Run, program: str, given: bytes, feed: int, drain: int) -> bytes:
    """All that a program writes to ``drain``, ``given`` through ``feed``; both descriptors are closed. Raises Dead."""
    output, left = bytearray(), memoryview(given)
    os.set_blocking(feed, False)
    poller = select.poll()
    opened = {feed, drain}
    try:
        run.send(program)
        poller.register(feed, select.POLLOUT)
        poller.register(drain, select.POLLIN)
        while drain in opened:  # the server alone holds its other end beside the program, and no longer than a fork
            ready = dict(poller.poll(run.left() * 1000))
            if feed in ready and not (left := _fed(feed, left)):
                poller.unregister(feed)
                os.close(feed)
                opened.remove(feed)
            if drain in ready:
                piece = os.read(drain, 1 << 16)
                output += piece
                if len(output) > LONGEST_OUTPUT:
                    raise Dead("reply", f"more than {LONGEST_OUTPUT:,} bytes of output")
                if not piece:
                    os.close(drain)
                    opened.remove(drain)
        run.loaded()
    finally:
        for one in opened:
            os.close(one)
        run.close()
    return bytes(output)


def _fed(feed: int, left: memoryview) -> memoryview:
    """What is still to be written; nothing where nobody reads it."""
    try:
        return left[os.write(feed, left[: 1 << 16]) :]
    except BlockingIOError:
        return left
    except OSError:
        return left[:0]

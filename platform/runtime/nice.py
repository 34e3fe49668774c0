"""Work that is nice to others until there is nobody to be nice to.

On Linux each thread has a niceness of its own, which those that it starts inherit, and which none but root can lower
again. So the process keeps its own: a nice thread does the work for it, and once `over` says so, it does the rest
itself. Elsewhere niceness is the whole process's, and stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Runs(Protocol):
    """Does work for its caller, somewhere."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """What the work gives, or raises."""


def here(work: Callable[[], T], /) -> T:
    """Runs it in the caller's thread."""
    return work()


class Nice:
    """``by`` nicer than its caller until ``over``, which is asked before each piece of work and is true once and for
    all; then ``alone`` is called, once. Of one thread at a time.
    """

    def __init__(self, by: int, over: Callable[[], bool], alone: Callable[[], None] = lambda: None) -> None:
        self._over, self._alone = over, alone
        self._thread = ThreadPoolExecutor(1, "nice", os.nice, (by,)) if by else None

    def run(self, work: Callable[[], T], /) -> T:
        """See Runs. What is begun is ended where it was begun."""
        if self._thread is not None and self._over():
            self.close()
            self._alone()
        return work() if self._thread is None else self._thread.submit(work).result()

    def close(self) -> None:
        """Wait for what was begun; from here on work is the caller's own."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

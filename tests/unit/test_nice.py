"""A nice thread works until nobody is to be let first; the process itself never becomes nicer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from offtrail.platform.runtime.nice import Nice


def niceness() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def of_the_process() -> int:
    """As the kernel shows it."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[16])


def test_it_is_nice_until_it_is_over_and_then_the_caller_itself_works() -> None:
    own, over, told = of_the_process(), False, list[str]()
    nice = Nice(5, lambda: over, lambda: told.append("alone"))
    threads = {nice.run(threading.get_ident) for _ in range(3)}
    assert (nice.run(niceness), niceness(), of_the_process()) == (min(19, own + 5), own, own)
    assert len(threads - {threading.get_ident()}) == 1
    assert told == []
    over = True
    assert (nice.run(niceness), nice.run(threading.get_ident)) == (own, threading.get_ident())
    assert told == ["alone"]
    nice.close()


def test_what_the_work_raises_is_raised() -> None:
    def fail() -> None:
        raise KeyError("of the work")

    nice = Nice(1, lambda: False)
    for _ in range(2):
        with pytest.raises(KeyError, match="of the work"):
            nice.run(fail)
    nice.close()
    with pytest.raises(KeyError, match="of the work"):
        nice.run(fail)


def test_who_is_not_to_be_nice_never_asks_and_needs_no_thread() -> None:
    nice = Nice(0, lambda: pytest.fail("asked"))
    assert nice.run(threading.get_ident) == threading.get_ident()

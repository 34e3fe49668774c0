"""Lines on disk instead of in memory: in a nameless file of a run's directory, which no kill leaves behind."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def spooled(folder: Path) -> Iterator[Spool]:
    """A spool whose file is gone at the end."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file)


class Spool:
    """Lines by number, which need not come in order; of each is held where it begins."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._begins = file, array("q")
        """The second by number, −1 of one that was not put."""

    def put(self, number: int, line: str) -> None:
        """Write a line with its end; half surrogates, which a reader refuses, come out as they went in."""
        self._begins.extend([-1] * (number + 1 - len(self._begins)))
        self._begins[number] = self._file.seek(0, 2)
        self._file.write(line.encode("utf-8", "surrogatepass"))

    def line(self, number: int) -> str:
        """What was put. Raises KeyError where nothing was."""
        if not 0 <= number < len(self._begins) or self._begins[number] < 0:
            raise KeyError(number)
        self._file.seek(self._begins[number])
        return self._file.readline().decode("utf-8", "surrogatepass")

"""metrics.jsonl and the event files of a run: one owner, the broker's process.

    learner ── Commit ──► broker ── Recorder.step ──────────► runs/NAME/metrics.jsonl   one object per learner step
    evaluator ── EvalResult ──► broker ── Recorder.evaluation ──► runs/NAME/tb/         the same names
                                                                 tracking.sinks        … in threads of their own

Invariant: metrics.jsonl holds exactly one object for each learner step, in order, key "step" = the version it produced;
row 0 holds the evaluation of version 0. A late evaluation of version n goes into row n: the file is written again from
that row on, so that its cost follows how late it is and not how long the run is. An evaluation that is earlier than its
row waits for it. A reader that meets a row in the making reads again (``read_rows``).
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from offtrail.platform.config.keys import deciding_settings, noted_settings
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.sinks.base import label_of
from offtrail.platform.tracking.sinks.worker import Sinks
from offtrail.platform.tracking.summary import finite, write_atomic

Row = dict[str, Any]
READINGS, READ_AGAIN_S = 5, 0.02
"""How often a file is read, and after what pause, before a row of it counts as damaged."""


class Recorder:
    """Writes what is recorded at once; call ``restore`` first when the run is resumed, or the old file is replaced."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._tb_folder = run_dir / "tb"
        self._board = None
        if config.tracking.tensorboard:
            # Imported here: it costs a quarter of a second, and a run may do without.
            from offtrail.platform.tracking.tensorboard import TensorBoard

            self._board = TensorBoard(self._tb_folder)
        self._hparams = hparams_of(config) if self._board else {}
        self.sinks = Sinks(run_dir, config)
        self._steps: list[int] = []
        self._rows: list[Row] = []
        self._ends: list[int] = []
        """Where each row's line ends in the file, in bytes."""
        self._early: dict[int, Row] = {}
        self._replace()

    @property
    def rows(self) -> list[Row]:
        """Copies of the rows, in order of "step"."""
        return [dict(row) for row in self._rows]

    @property
    def last(self) -> Row:
        """Copy of the newest row; empty before the first."""
        return dict(self._rows[-1]) if self._rows else {}

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Begin with the rows that survive a restart; whatever else the files hold of later steps is gone.

        Of several rows with one "step" the last counts.
        """
        kept = {int(row["step"]): dict(row) for row in rows}
        self._steps = sorted(kept)
        self._rows = [kept[step] for step in self._steps]
        self._early = {}
        self._replace()
        if self._board:
            self._board.restart(self._steps[-1] + 1 if self._steps else 0)
            self._board.hparams(self._hparams, label_of(self._path.parent))
            self._board.flush()
        self.sinks.restore(self._rows)

    def step(
        self,
        row: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Record one learner step; ``row["step"]`` is the version it produced. A replayed step replaces its row.

        Raises ValueError where "step" is missing or not a whole number.
        """
        step = row.get("step")
        if step is None or step != int(step):
            raise ValueError(f'a metrics row needs "step", the version it produced; got {step!r}')
        version = int(step)
        self._put(version, {**self._early.pop(version, {}), **row, "step": version}, replace=True)
        scalars = {name: value for name, value in row.items() if name != "step"}
        self._show(version, scalars, histograms, texts)
        self.sinks.step(version, scalars, texts)

    def evaluation(self, version: int, metrics: Mapping[str, float], texts: Mapping[str, str] | None = None) -> None:
        """Record the evaluation of ``version`` in its row; row 0 is made of nothing else."""
        if version == 0 or self._has(version):
            self._put(version, dict(metrics), replace=False)
        else:
            self._early.setdefault(version, {}).update(metrics)
        self._show(version, metrics, None, texts)
        self.sinks.scores(version, metrics, texts)

    def close(self) -> None:
        """Close the event file; trackers end by themselves (Sinks.finish)."""
        self.sinks.finish()
        if self._board:
            self._board.close()

    def _has(self, version: int) -> bool:
        at = bisect_left(self._steps, version)
        return self._steps[at : at + 1] == [version]

    def _put(self, version: int, values: Row, *, replace: bool) -> None:
        """Append the row where it is the newest, which is the common case; otherwise write the file from it on."""
        at = bisect_left(self._steps, version)
        values = finite(values)
        if at == len(self._steps):
            row = {"step": version, **values}
            self._steps.append(version)
            self._rows.append(row)
            self._write_from(at)
            return
        if self._steps[at] != version:
            self._steps.insert(at, version)
            self._rows.insert(at, {"step": version, **values})
        else:
            old = self._rows[at]
            evaluated = {name: value for name, value in old.items() if name.startswith("eval/")}
            self._rows[at] = {**(evaluated if replace else old), **values, "step": version}
        self._write_from(at)

    def _write_from(self, at: int) -> None:
        """Row ``at`` and those after it, in one write; all of the file where it is not the one that was written."""
        try:
            with self._path.open("r+b") as file:
                if os.fstat(file.fileno()).st_size == (self._ends[-1] if self._ends else 0):
                    start = self._ends[at - 1] if at else 0
                    lines = [_line(row) for row in self._rows[at:]]
                    file.seek(start)
                    file.write(b"".join(lines))
                    file.truncate()  # at the place where the writing ended
                    self._ends[at:] = _ends(lines, start)
                    return
        except FileNotFoundError:
            pass
        self._replace()

    def _replace(self) -> None:
        lines = [_line(row) for row in self._rows]
        write_atomic(self._path, b"".join(lines))
        self._ends = _ends(lines, 0)

    def _show(
        self,
        version: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None,
        texts: Mapping[str, str] | None,
    ) -> None:
        if self._board:
            self._board.write(version, scalars, histograms, texts)
            self._board.flush()


def hparams_of(config: Config) -> dict[str, str | float | bool]:
    """What decides the run's numbers, for TensorBoard's table of hyperparameters; what is no number or text, as text.

    ``tracking.sinks`` get all of the configuration.
    """
    found = deciding_settings(config) | noted_settings(config)
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in found.items()}


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of runs/NAME/metrics.jsonl; ValueError names the file and line of one that is not JSON."""
    path = run_dir / "metrics.jsonl"
    for _ in range(READINGS - 1):
        try:
            return _read(path)
        except ValueError:
            time.sleep(READ_AGAIN_S)
    return _read(path)


def _read(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error})") from None
    return rows


def _ends(lines: Sequence[bytes], start: int) -> list[int]:
    return [start + end for end in accumulate(map(len, lines))]


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"

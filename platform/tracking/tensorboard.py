"""TensorBoard event files without torch: scalars, histograms of plain lists, texts.

Owned by the Recorder. Invariant: everything written before `flush` returns is on disk, and a reader that follows a
resumed run sees each step once (`restart` tells it to forget later steps).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

BINS = 40


class TensorBoard:
    """One event file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def restart(self, next_step: int) -> None:
        """Make readers forget what earlier files of this folder hold from ``next_step`` on."""
        event = Event(wall_time=time.time(), step=next_step, session_log=SessionLog(status=SessionLog.START))
        self._writer.add_event(event)

    def write(
        self,
        step: int,
        scalars: Mapping[str, float | None],
        histograms: Mapping[str, Sequence[float]] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write one step; values that are not finite are left out (TensorBoard has no place for them)."""
        values = [
            Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in scalars.items()
            if value is not None and math.isfinite(value)
        ]
        for tag, samples in (histograms or {}).items():
            array = np.asarray(samples, np.float64)
            array = array[np.isfinite(array)]
            if array.size:
                values.append(Summary.Value(tag=tag, histo=histogram(array)))
        values += [_text(tag, text) for tag, text in (texts or {}).items()]
        if values:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def hparams(self, values: Mapping[str, str | float | bool], run: str) -> None:
        """The run's settings, for the table of the HParams tab."""
        summary = hparams_pb(dict(values), trial_id=run)
        self._writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))

    def flush(self) -> None:
        """Wait until everything is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def histogram(values: np.ndarray) -> HistogramProto:
    """Histogram of finite ``values`` [n], n ≥ 1: a bin around each integer where they are few integers, else BINS bins.

    A bin counts the values in (limit of the one before, its own limit], as TensorBoard reads limits.
    """
    low, high = float(values.min()), float(values.max())
    if high - low < BINS and np.array_equal(values, np.round(values)):
        limits = np.arange(low, high + 1) + 0.5
    else:
        limits = np.linspace(low, high, BINS + 1)[1:]
        limits[-1] = high
    counts = np.bincount(np.searchsorted(limits, values, side="left"), minlength=len(limits))
    return HistogramProto(
        min=low,
        max=high,
        num=float(values.size),
        sum=float(values.sum()),
        sum_squares=float((values**2).sum()),
        bucket_limit=limits.tolist(),
        bucket=counts.astype(np.float64).tolist(),
    )


def _text(tag: str, text: str) -> Summary.Value:
    tensor = TensorProto(
        dtype=DT_STRING,
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)

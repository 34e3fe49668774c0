"""The terminal view of a running job, fed with the broker's Status by the launcher.

Who does what, or waits for what, on whom and since when, stands in one line a role (I4); the rest is the newest row of
metrics.jsonl under the names of docs/metrics.md. `live` redraws in place, `plain` prints one line for each learner
step that it sees, `off` prints nothing; `auto` is live on a terminal and plain elsewhere.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.summary import LOSSES
from offtrail.platform.wire.messages import Heartbeat, Status

PLACE: ContextVar[str] = ContextVar("place", default="")
"""Where this run stands in a recipe, such as `stage 3/9`."""
LONG_WAIT_S = 10.0
VERY_LONG_WAIT_S = 60.0
TREND_STEPS = 24
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows one run; a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config = config
        self._console = console or Console()
        mode = config.tracking.progress
        self.mode = ("live" if self._console.is_terminal else "plain") if mode == "auto" else mode
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._step = -1
        self._trend: deque[float] = deque(maxlen=TREND_STEPS)
        self._warned: set[str] = set()
        self._live = Live(console=self._console, auto_refresh=False) if self.mode == "live" else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, status: Status) -> None:
        """Show a status; cheap enough for several a second."""
        step = int(status.metrics.get("step", 0))
        fresh = step > self._step
        if fresh:
            self._note(step, status)
        for line in status.summary.get("warnings", ()):
            if line not in self._warned:
                self._warned.add(line)
                self.tell(f"warning: {line}")
        if self._live:
            self._live.update(self.view(status), refresh=True)
        elif self.mode == "plain" and fresh and step > 0:
            self._console.print(self.line(status), highlight=False, soft_wrap=True)

    def tell(self, line: str) -> None:
        """Say something that happened once, such as a restart: above what is redrawn, and on plain terminals too."""
        if self.mode != "off":
            self._console.print(line, style="yellow", highlight=False, soft_wrap=True)

    def _note(self, step: int, status: Status) -> None:
        self._step = step
        if self._first is None and step > 0:
            self._first = (step, time.monotonic())
        accuracy = status.metrics.get("reward/accuracy")
        if accuracy is not None and math.isfinite(accuracy):
            self._trend.append(accuracy)

    def line(self, status: Status) -> str:
        """One learner step in one line."""
        show = _Shown(status)
        if self._config.supervised is not None:
            tokens = show("throughput/trained_tokens_per_second", ",.0f")
            return (
                f"step {self._step:>{len(str(self._config.steps))}}/{self._config.steps} · loss "
                f"{show.loss()} · {tokens} tokens/s{_held_out(show)}"
                f" · {_duration(time.monotonic() - self._began)}"
            )
        return (
            f"step {self._step:>{len(str(self._config.steps))}}/{self._config.steps}"
            f" · accuracy {show('reward/accuracy', '.3f')} · eval {_evaluation(show)}"
            f" · length {show('length/mean', '.1f')}"
            f" · staleness {show('staleness/mean', '.2f')} (max {show('staleness/max', '.0f')})"
            f" · {show('throughput/trained_tokens_per_second', ',.0f')} tokens/s"
            f" · queue {show('queue/groups', '.0f')}, leased {show('queue/leased', '.0f')}"
            f" · {_duration(time.monotonic() - self._began)}"
        )

    def view(self, status: Status) -> RenderableType:
        """The whole live view."""
        parts: list[RenderableType] = [self._bar(), Text(), self._metrics(_Shown(status)), Text(), _roles(status)]
        parts += [Text(f"{f.role}-{f.index} failed: {f.error}", style="bold red") for f in status.failures]
        return Group(*parts)

    def _bar(self) -> RenderableType:
        total, step = self._config.steps, max(0, self._step)
        row = Table.grid(padding=(0, 2))
        for _ in range(4):
            row.add_column(no_wrap=True)
        times = _duration(time.monotonic() - self._began)
        if (left := self._seconds_left()) is not None:
            times += f" · {_duration(left)} left"
        row.add_row(
            Text(" · ".join(filter(None, (PLACE.get(), self._config.run.name or self._config.job))), style="bold"),
            ProgressBar(total=max(1, total), completed=step, width=24),
            Text(f"step {step}/{total}", style="bold"),
            Text(times, style="dim"),
        )
        return row

    def _seconds_left(self) -> float | None:
        """From the pace since the first step that was seen: what came before is start-up."""
        if self._first is None or self._step <= self._first[0]:
            return None
        pace = (time.monotonic() - self._first[1]) / (self._step - self._first[0])
        return max(0.0, pace * (self._config.steps - self._step))

    def _metrics(self, show: _Shown) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        if self._config.supervised is not None:
            grid.add_row("loss", show.loss())
            if self._config.head is not None:
                grid.add_row("held-out accuracy", _evaluation(show))
            grid.add_row("tokens per second", show("throughput/trained_tokens_per_second", ",.0f"))
            return grid
        for name, shown in (
            ("training accuracy", f"{show('reward/accuracy', '.3f')}  {_trend(self._trend)}"),
            ("held-out accuracy", _evaluation(show)),
            ("answer length", f"mean {show('length/mean', '.1f')}, longest {show('length/max', '.0f')} tokens"),
            (
                "staleness",
                f"mean {show('staleness/mean', '.2f')}, max {show('staleness/max', '.0f')} of"
                f" {self._config.staleness.max}, stale tokens {show('staleness/stale_token_share', '.0%')}",
            ),
            (
                "tokens per second",
                f"{show('throughput/trained_tokens_per_second', ',.0f')} trained,"
                f" {show('throughput/generated_tokens_per_second', ',.0f')} generated",
            ),
            (
                "groups",
                f"{show('queue/leased', '.0f')} in flight, {show('queue/groups', '.0f')} queued,"
                f" {show('queue/refused', '.0f')} refused",
            ),
        ):
            grid.add_row(name, shown)
        return grid


class _Shown:
    """Formats a metric by name from the newest row or the summary; "–" where there is none yet."""

    def __init__(self, status: Status) -> None:
        self._sources = (status.metrics, status.summary)

    def value(self, name: str) -> float | None:
        for source in self._sources:
            found = source.get(name)
            if isinstance(found, (int, float)) and math.isfinite(found):
                return float(found)
        return None

    def __call__(self, name: str, form: str) -> str:
        value = self.value(name)
        return "–" if value is None else format(value, form)

    def loss(self) -> str:
        """Of a job that learns from examples."""
        return next((self(name, ".3f") for name in LOSSES if self.value(name) is not None), "–")


def _held_out(show: _Shown) -> str:
    """Where a job measures some."""
    last = _evaluation(show)
    return "" if last == "–" else f" · held-out accuracy {last}"


def _evaluation(show: _Shown) -> str:
    first, last = show("eval/accuracy_first", ".3f"), show("eval/accuracy_last", ".3f")
    if last == "–":
        return show("eval/accuracy", ".3f") if first == "–" else first
    return last if first == last else f"{first} → {last}"


def _roles(status: Status) -> RenderableType:
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    table.add_column("role", no_wrap=True)
    table.add_column("what it does, or waits for", min_width=34)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("busy", justify="right", no_wrap=True)
    now = time.time()
    for beat in sorted(status.roles, key=lambda beat: (beat.role, beat.index)):
        seconds = max(0.0, now - beat.since)
        table.add_row(f"{beat.role}-{beat.index}", _doing(beat, seconds), _age(seconds), _busy_share(beat))
    return table


def _doing(beat: Heartbeat, seconds: float) -> Text:
    kind, _, what = beat.activity.partition("/")
    if kind == "busy":
        return Text.assemble(("● ", "green"), what)
    if kind != "waiting":
        return Text.assemble(("○ ", "dim"), (beat.activity, "dim"))
    style = "red" if seconds > VERY_LONG_WAIT_S else "yellow" if seconds > LONG_WAIT_S else "dim"
    # A single word is whom it waits for; anything longer is the broker's own sentence.
    joint = ": " if " " in beat.waiting_on else " on "
    on = f"{joint}{beat.waiting_on}" if beat.waiting_on else ""
    return Text.assemble(("○ ", style), (f"waits for {what}{on}", style))


def _busy_share(beat: Heartbeat) -> str:
    busy = sum(seconds for name, seconds in beat.seconds.items() if name.startswith("busy/"))
    total = sum(beat.seconds.values())
    return f"{busy / total:.0%}" if total > 0 else "–"


def _trend(values: deque[float]) -> str:
    """Accuracies as blocks between 0 and 1."""
    block: Callable[[float], str] = lambda value: _BLOCKS[min(len(_BLOCKS) - 1, max(0, int(value * len(_BLOCKS))))]  # noqa: E731
    return "".join(map(block, values))


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < LONG_WAIT_S else _duration(seconds)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Live progress on stderr: a bar on a terminal, one line per stage where it is not one."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pare.records import Event
from pare.report import human_bytes


class ProgressDisplay:
    """Shows uploads, downloads and the events of a job; silent when `enabled` is false."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._console = Console(file=sys.stderr, highlight=False)
        self._live = enabled and self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_step = ("", 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, sentence: str) -> None:
        """Write a sentence above the bars."""
        if self._enabled:
            self._console.print(sentence, markup=False, soft_wrap=True)

    def bytes_of(self, file: str) -> Callable[[int, int], None]:
        """Return what shows the bytes of one file going over the wire."""

        def show(done: int, total: int) -> None:
            note = f"{human_bytes(done)} of {human_bytes(total)}"
            self._update(file, done / total if total else 1.0, note)

        return show

    def event(self, event: Event) -> None:
        """Show an event of a job."""
        data = event.data
        if event.kind == "state":
            state = str(data.get("state"))
            reason = ": ".join(str(data[name]) for name in ("reason", "detail") if data.get(name))
            reason = f" ({reason})" if reason else ""
            self._show_job(state, 1.0 if state == "succeeded" else None, state + reason)
        elif event.kind == "waiting":
            note = f"waiting: {data['detail']}" if data.get("reason") else "a worker can run it again"
            self._show_job("waiting" if data.get("reason") else "queued", None, note)
        elif event.kind == "progress":
            stage = str(data.get("stage"))
            message = f": {data['message']}" if data.get("message") else ""
            eta = f", {data['eta_seconds']:.0f} s left" if data.get("eta_seconds") else ""
            self._show_job(stage, float(data.get("fraction", 0.0)), f"{stage}{message}{eta}")

        elif event.kind == "resumed":
            self._show_job("resumed", data["fraction"], f"resumed from a checkpoint in {data['stage']}")

    def _show_job(self, stage: str, fraction: float | None, note: str) -> None:
        if self._live:
            self._update("job", fraction, note)
            return
        # In a log, one line for each stage and for each tenth of the way.
        step = (stage, int((fraction or 0.0) * 10))
        if self._enabled and step != self._last_step:
            self._last_step = step
            percent = "" if fraction is None else f"{fraction:4.0%} "
            self._console.print(f"job: {percent}{note}", markup=False, soft_wrap=True)

    def _update(self, name: str, fraction: float | None, note: str) -> None:
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1.0, note="")
            self._progress.update(self._tasks[name], completed=fraction, note=note)

"""Progress of one action: JSON lines on a private file descriptor, throttled, with a fraction that never falls."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.recipes.plan import CheckpointFile, Progress

SHORTEST_PAUSE_SECONDS = 0.2
"""Between two lines of one stage; a new stage is always told at once."""
ETA_SMOOTHING_SECONDS = 5.0
"""Time constant with which a new estimate replaces the old one."""
SMALLEST_SHARE = 1e-6
"""Of a stage; less than this says nothing about its pace."""
MAX_MESSAGE_CHARACTERS = 2000
MAX_METRICS = 50
MAX_METRIC_CHARACTERS = 100


def take_stdout() -> Callable[[bytes], None]:
    """Keep the real stdout for progress and point fd 1 at stderr, so that no library's print can pass for progress."""
    sys.stdout.flush()
    private = os.dup(1)  # not inheritable: children cannot write to it either
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def write(line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(private, view) :]

    return write


@dataclass(frozen=True)
class Stage:
    """A part of an action, with its guessed share of the time."""

    name: str
    weight: float
    step: int | None = None
    """Index into recipe.steps where the stage is a step."""


class Reporter:
    """Turns (stage, fraction of the stage) into Progress lines with one fraction over the whole action."""

    def __init__(self, write: Callable[[bytes], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._stages: tuple[Stage, ...] = ()
        self._current = -1
        self._fraction = 0.0
        self._started_at = self._entered_at = clock()
        self._inside = 0.0
        self._message = ""
        """The stage's newest."""
        self._first: tuple[float, float] | None = None
        """When the current stage first told of progress, and the share of it that was done: before that it prepared."""
        self._is_paced = False
        """Whether it has told of more since, so that its pace is known."""
        self._written_at = -math.inf
        self._pending: Progress | None = None
        self._eta_seconds: float | None = None
        self._eta_at = self._started_at

    def ready(self) -> None:
        """Say that the engine is warm and waits for its plan."""
        self._emit(Progress(stage="ready", fraction=0.0))

    def start(self) -> None:
        """Say that the plan is taken up; the clock of the estimate starts here."""
        self._started_at = self._entered_at = self._eta_at = self._clock()
        self._emit(Progress(stage="started", fraction=0.0))

    def expect(self, stages: Sequence[Stage]) -> None:
        """Name the stages of the action, in order; their weights share out the fraction."""
        self._stages = tuple(stages)
        self._current = -1

    def enter(self, name: str, message: str = "") -> None:
        """Begin the next expected stage."""
        self._message = message
        self._current += 1
        assert self._stages[self._current].name == name, f"{name} is not the next stage: {self._stages[self._current]}"
        self._flush()
        self._entered_at = self._clock()
        self._first, self._is_paced = None, False
        self._emit(self._line(0.0, message, {}))
        self.note(name)

    def report(self, fraction: float, message: str = "", **metrics: float | int | str | None) -> None:
        """Tell progress within the current stage, 0 to 1. A line too soon after the last waits for the next one.

        Not a stage's first words: the next line may be long in coming.
        """
        is_first = bool(message) and not self._message
        self._message = message
        line = self._line(fraction, message, metrics)
        if is_first or self._clock() - self._written_at >= SHORTEST_PAUSE_SECONDS:
            self._emit(line)
        elif metrics or self._pending is None or not self._pending.metrics:
            self._pending = line

    def announce(self, *, checkpoint: CheckpointFile | None = None, resumed: str | None = None) -> None:
        """Tell at once, with the place the work is at, of a checkpoint that was written or gone on from."""
        inside = self._pending or self._line(self._inside, self._message, {})
        self._emit(inside.model_copy(update={"checkpoint": checkpoint, "resumed": resumed}))

    def note(self, text: str) -> None:
        """Write a line to the job's log (stderr), with the seconds since the start."""
        print(f"{self._clock() - self._started_at:8.1f} s  {text}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Say that the action is complete."""
        self._flush()
        self._fraction = 1.0
        self._emit(Progress(stage="finished", fraction=1.0, eta_seconds=0.0))

    @property
    def stage(self) -> str:
        """The name of the current stage, for messages about failures."""
        return self._stages[self._current].name if self._current >= 0 else "started"

    def _line(self, fraction: float, message: str, metrics: dict[str, float | int | str | None]) -> Progress:
        stage = self._stages[self._current]
        total = sum(each.weight for each in self._stages)
        done = sum(each.weight for each in self._stages[: self._current])
        inside = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0
        self._inside = inside
        self._fraction = min(max(self._fraction, (done + stage.weight * inside) / total), 1.0)
        return Progress(
            stage=stage.name,
            step=stage.step,
            fraction=round(self._fraction, 6),
            eta_seconds=self._estimate(),
            message=_text(message, MAX_MESSAGE_CHARACTERS),
            metrics={name: _plain(value) for name, value in list(metrics.items())[:MAX_METRICS]},
        )

    def _estimate(self) -> float | None:
        now = self._clock()
        elapsed = now - self._started_at
        if self._first is None and self._inside > SMALLEST_SHARE:
            self._first = now, self._inside
        elif self._first is not None and not self._is_paced and self._inside - self._first[1] > SMALLEST_SHARE:
            self._is_paced, self._eta_seconds = True, None  # what was guessed before is no start for a measured pace
        if elapsed < 1.0 or self._fraction < 0.02:
            return None
        fresh = self._extrapolate(now)
        passed = now - self._eta_at
        if self._eta_seconds is None:
            self._eta_seconds = fresh
        else:
            share = 1.0 - math.exp(-passed / ETA_SMOOTHING_SECONDS)
            expected = max(self._eta_seconds - passed, 0.0)
            self._eta_seconds = expected + share * (fresh - expected)
        self._eta_at = now
        return round(self._eta_seconds, 1)

    def _extrapolate(self, now: float) -> float:
        """Return the seconds left: of this stage by its own pace, of the later ones by the pace of the earlier ones."""
        done, stage = self._stages[: self._current], self._stages[self._current]
        later = sum(each.weight for each in self._stages[self._current + 1 :])
        before, here = self._entered_at - self._started_at, now - self._entered_at
        work = sum(each.weight for each in done)
        if self._inside > SMALLEST_SHARE:
            # A guessed weight cannot know that a step trains for hours.
            whole = here / self._inside
            if self._first is not None and self._inside - self._first[1] > SMALLEST_SHARE:
                whole = (now - self._first[0]) / (self._inside - self._first[1])
            pace = before / work if work else whole / stage.weight
            return whole * (1.0 - self._inside) + pace * later
        pace = (before + here) / max(work, 1e-9)
        return pace * (stage.weight + later)

    def _flush(self) -> None:
        if self._pending is not None:
            self._emit(self._pending)

    def _emit(self, line: Progress) -> None:
        self._pending = None
        self._written_at = self._clock()
        self._write(json.dumps(line.model_dump(mode="json")).encode("ascii") + b"\n")


def _plain(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _text(value, MAX_METRIC_CHARACTERS) if isinstance(value, str) else value


def _text(value: str, num_characters: int) -> str:
    return value.encode("utf-8", "replace").decode("utf-8")[:num_characters]

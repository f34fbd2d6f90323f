"""Watching a job from the command line: progress on stderr, Ctrl-C leaves the job running."""

import sys

import typer

from pare.client import Client
from pare.commands.invocation import ExitCode
from pare.optimize import detached
from pare.progress import ProgressDisplay
from pare.records import Job


def watch(client: Client, job_id: str, *, timeout_seconds: float | None = None, quiet: bool = False) -> Job:
    """Return the job once it has finished; on Ctrl-C say how to come back and end with 130."""
    display = ProgressDisplay(enabled=not quiet)
    try:
        with display:
            display.say(f"job {job_id}")
            return client.jobs.wait(job_id, timeout_seconds=timeout_seconds, on_event=display.event)
    except KeyboardInterrupt:
        print(f"\n{detached(job_id)}", file=sys.stderr)
        raise typer.Exit(ExitCode.DETACHED) from None


def exit_as(job: Job) -> None:
    """End with the code for a job that failed or was cancelled."""
    if job.status in ("failed", "cancelled"):
        raise typer.Exit(ExitCode.FAILED)

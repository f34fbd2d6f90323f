"""`pare jobs events|logs|metrics|download`: what happened to a job and what it left behind."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import grid
from pare.progress import ProgressDisplay
from pare.report import human_bytes, report


def add_to(app: typer.Typer) -> None:
    """Add the commands to `pare jobs`."""
    for command in (events, logs, metrics, download):
        app.command()(service_command(command))


def events(
    call: Invocation,
    id: str,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job's last event.")] = False,
) -> None:
    """Print the events of a job, one JSON object a line with --follow."""
    with call.client() as client:
        if follow:
            for event in client.jobs.follow(id, after=after):
                print(json.dumps({"seq": event.seq, "kind": event.kind, "data": event.data}), flush=True)
            return
        page = client.jobs.events(id, after=after)
        items = list(page["items"])
        while len(page["items"]) == 200:
            page = client.jobs.events(id, after=items[-1]["seq"])
            items += page["items"]
    rows = ((str(i["seq"]), i["created_at"], i["kind"], _describe(i["data"])) for i in items)
    call.show({**page, "items": items}, grid(("seq", "at", "kind", "what"), rows))


def logs(
    call: Invocation,
    id: str,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the last.")] = None,
) -> None:
    """Print the log of a job's engine."""
    with call.client() as client:
        text = client.jobs.logs(id, attempt=attempt)
    if call.json:
        call.show({"id": id, "log": text})
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def metrics(call: Invocation, id: str) -> None:
    """Print original against result, and the verdict."""
    with call.client() as client:
        numbers = client.jobs.metrics(id)
    call.show(numbers.raw, report(numbers))


def download(
    call: Invocation,
    id: str,
    directory: Annotated[Path | None, typer.Argument(help="Default: a directory named like the job.")] = None,
) -> None:
    """Download and verify every artifact; run again to go on after a break."""
    target = directory or Path(id)
    with call.client() as client, ProgressDisplay(enabled=not call.json) as display:
        artifacts = client.jobs.artifacts(id)
        files = [
            client.artifacts.download(artifact, target, on_bytes=display.bytes_of(artifact.name))
            for artifact in artifacts
        ]
    items = [{**a.raw, "path": str(f)} for a, f in zip(artifacts, files, strict=True)]
    rows = ((str(f), human_bytes(a.size_bytes), a.sha256) for a, f in zip(artifacts, files, strict=True))
    call.show({"items": items}, grid(("file", "size", "sha256"), rows))


def _describe(data: dict[str, Any]) -> str:
    """Return an event's facts in one line, empty ones left out."""
    facts = ((name, value) for name, value in data.items() if value not in (None, "", {}, []))
    return ", ".join(f"{name}={value}" for name, value in facts)

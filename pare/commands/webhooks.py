"""`pare webhooks`: create, list, get, change, rotate, test, deliveries, redeliver, delete."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import grid
from pare.webhooks import Delivery, Webhook

app = typer.Typer(help="Endpoints of yours that hear what happens to jobs.", no_args_is_help=True)

Event = Annotated[
    list[str] | None, typer.Option(help="job.running, job.succeeded, job.failed or job.cancelled; may be repeated.")
]
Jobs = Annotated[str | None, typer.Option(help="all: every job of yours; named: those submitted with its id.")]
Description = Annotated[str | None, typer.Option(help="Your note.")]


@app.command()
@service_command
def create(
    call: Invocation, receiver: str, event: Event = None, jobs: Jobs = None, description: Description = None
) -> None:
    """Create a webhook for the URL of a receiver and print its secret, which is shown this once."""
    with call.client() as client:
        webhook = client.webhooks.create(receiver, events=event, jobs=jobs, description=description)
    call.show(webhook.raw, _page(webhook))


@app.command("list")
@service_command
def list_webhooks(
    call: Invocation, limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50
) -> None:
    """List webhooks."""
    with call.client() as client:
        webhooks = client.webhooks.list(limit=limit)
    rows = [(hook.id, hook.url, _state(hook), hook.jobs, ", ".join(hook.events)) for hook in webhooks]
    table = grid(("ID", "URL", "STATE", "JOBS", "EVENTS"), rows)
    call.show({"items": [webhook.raw for webhook in webhooks]}, table)


@app.command()
@service_command
def get(call: Invocation, id: str) -> None:
    """Show one webhook."""
    with call.client() as client:
        webhook = client.webhooks.get(id)
    call.show(webhook.raw, _page(webhook))


@app.command()
@service_command
def change(
    call: Invocation,
    id: str,
    receiver: Annotated[str | None, typer.Option(help="The URL where messages are sent.")] = None,
    event: Event = None,
    jobs: Jobs = None,
    description: Description = None,
    enable: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether messages are sent.")] = None,
) -> None:
    """Change a webhook, or enable one that was disabled."""
    with call.client() as client:
        webhook = client.webhooks.change(
            id, url=receiver, events=event, jobs=jobs, description=description, enabled=enable
        )
    call.show(webhook.raw, _page(webhook))


@app.command()
@service_command
def rotate(
    call: Invocation,
    id: str,
    overlap_seconds: Annotated[
        int | None, typer.Option(min=0, help="How long the old secret verifies as well; default a day.")
    ] = None,
) -> None:
    """Give a webhook a new secret and print it, this once."""
    with call.client() as client:
        webhook = client.webhooks.rotate(id, overlap_seconds=overlap_seconds)
    call.show(webhook.raw, _page(webhook))


@app.command()
@service_command
def test(call: Invocation, id: str) -> None:
    """Send a test message; `deliveries` shows what came of it."""
    with call.client() as client:
        delivery = client.webhooks.test(id)
    call.show(delivery.raw, _deliveries_table([delivery]))


@app.command()
@service_command
def deliveries(
    call: Invocation,
    id: str,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
) -> None:
    """List the messages to a webhook with what came of them."""
    with call.client() as client:
        found = client.webhooks.deliveries(id, limit=limit)
    call.show({"items": [delivery.raw for delivery in found]}, _deliveries_table(found))


@app.command()
@service_command
def redeliver(call: Invocation, id: str, delivery_id: str) -> None:
    """Send a message again, with the same id."""
    with call.client() as client:
        delivery = client.webhooks.redeliver(id, delivery_id)
    call.show(delivery.raw, _deliveries_table([delivery]))


@app.command()
@service_command
def delete(call: Invocation, id: str) -> None:
    """Delete a webhook with its messages."""
    with call.client() as client:
        client.webhooks.delete(id)
    call.show({"id": id, "deleted": True}, f"deleted {id}")


def _page(webhook: Webhook) -> Table:
    rows = [
        ("url", webhook.url),
        ("description", webhook.description),
        ("state", _state(webhook)),
        ("jobs", webhook.jobs),
        ("events", ", ".join(webhook.events)),
        ("created", webhook.created_at),
    ]
    if webhook.secret is not None:
        rows.append(("secret", f"{webhook.secret}  (shown this once)"))
    return grid((webhook.id, ""), rows)


def _state(webhook: Webhook) -> str:
    return "enabled" if webhook.enabled else f"disabled ({webhook.disabled_reason})"


def _deliveries_table(deliveries: Iterable[Delivery]) -> Table:
    rows = []
    for each in deliveries:
        last = each.attempts[-1] if each.attempts else None
        result = "" if last is None else str(last.status or last.error)
        waits = each.next_attempt_at or ""
        rows.append((each.id, each.type, each.job_id or "", each.state, str(len(each.attempts)), result, waits))
    return grid(("ID", "TYPE", "JOB", "STATE", "ATTEMPTS", "LAST", "NEXT"), rows)

"""`pare keys`: who may come in, for administrators of a service; `pare me`."""

from typing import Annotated

import typer

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import grid, keys_table

app = typer.Typer(help="Keys of the service, for its administrators.", no_args_is_help=True)

DAY_SECONDS = 24 * 3600


@app.command()
@service_command
def create(
    call: Invocation,
    owner: Annotated[str, typer.Option(help="Whose things it opens.")],
    scopes: Annotated[str, typer.Option(help="Of read,write,admin.")] = "read,write",
    name: Annotated[str | None, typer.Option(help="A note for the list.")] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, help="Default: it does not expire.")] = None,
) -> None:
    """Make a key and print it; it is shown only now."""
    lifetime = expires_in_days * DAY_SECONDS if expires_in_days is not None else None
    with call.client() as client:
        key, token = client.keys.create(owner, name=name, scopes=tuple(scopes.split(",")), expires_in_seconds=lifetime)
    call.show({"key": key.raw, "token": token}, token)


@app.command("list")
@service_command
def list_keys(
    call: Invocation,
    owner: Annotated[str | None, typer.Option(help="Only the keys of this owner.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
) -> None:
    """List keys."""
    with call.client() as client:
        keys = client.keys.list(owner=owner, limit=limit)
    call.show({"items": [key.raw for key in keys]}, keys_table(keys))


@app.command()
@service_command
def rotate(
    call: Invocation,
    id: str,
    grace_seconds: Annotated[
        int | None, typer.Option(min=0, help="How long the old one goes on, default a day; 0: it ends now.")
    ] = None,
) -> None:
    """Make a key that takes the place of another, and print it; it is shown only now."""
    with call.client() as client:
        key, token = client.keys.rotate(id, grace_seconds=grace_seconds)
    call.show({"key": key.raw, "token": token}, token)


@app.command()
@service_command
def revoke(call: Invocation, id: str) -> None:
    """End a key within seconds."""
    with call.client() as client:
        client.keys.revoke(id)
    call.show({"revoked": id}, f"revoked {id}")


@service_command
def me(call: Invocation) -> None:
    """Show who the service takes you for, and what your key may do."""
    with call.client() as client:
        answer = client.me()
    key = answer["key"]
    rows = [
        ("owner", str(answer["owner"])),
        ("scopes", ", ".join(answer["scopes"])),
        ("key", str(key["id"]) if key else "none is asked for"),
        ("expires", str(key["expires_at"] or "never") if key else ""),
    ]
    for name, limit in answer["limits"].items():
        used = answer["usage"].get(name)
        allowed = "no limit" if limit is None else f"of {limit:,}"
        rows.append((name, allowed if used is None else f"{used:,} ({allowed})"))
    call.show(answer, grid(("", ""), rows))

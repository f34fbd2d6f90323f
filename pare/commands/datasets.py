"""`pare datasets`: upload, list, get, delete."""

from pathlib import Path
from typing import Annotated

import typer

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import dataset_page, datasets_table
from pare.progress import ProgressDisplay

app = typer.Typer(help="Uploaded datasets.", no_args_is_help=True)


@app.command()
@service_command
def upload(
    call: Invocation,
    file: Annotated[Path, typer.Argument(help="A .npz, .safetensors or .parquet file, or a .zip of images.")],
    name: Annotated[str | None, typer.Option(help="A name for lists; default the file's.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the service has checked it.")] = True,
) -> None:
    """Upload a dataset and say what the service found in it."""
    with call.client() as client, ProgressDisplay(enabled=not call.json) as display:
        dataset = client.datasets.upload(file, name=name, on_bytes=display.bytes_of(file.name))
        if wait:
            dataset = client.datasets.wait(dataset.id)
    call.show(dataset.raw, dataset_page(dataset))


@app.command("list")
@service_command
def list_datasets(
    call: Invocation,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
) -> None:
    """List datasets."""
    with call.client() as client:
        datasets = client.datasets.list(limit=limit)
    call.show({"items": [dataset.raw for dataset in datasets]}, datasets_table(datasets))


@app.command()
@service_command
def get(call: Invocation, id: str) -> None:
    """Show one dataset with its columns."""
    with call.client() as client:
        dataset = client.datasets.get(id)
    call.show(dataset.raw, dataset_page(dataset))


@app.command()
@service_command
def delete(call: Invocation, id: str) -> None:
    """Delete a dataset that no unfinished job uses."""
    with call.client() as client:
        client.datasets.delete(id)
    call.show({"id": id, "deleted": True}, f"deleted {id}")

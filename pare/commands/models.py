"""`pare models`: upload, list, get, delete."""

from pathlib import Path
from typing import Annotated

import typer

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import architectures_table, model_page, models_table
from pare.progress import ProgressDisplay

app = typer.Typer(help="Uploaded models.", no_args_is_help=True)


@app.command()
@service_command
def upload(
    call: Invocation,
    file: Annotated[Path, typer.Argument(help="A .pt2 or .safetensors file, or a zip of a Hugging Face folder.")],
    name: Annotated[str | None, typer.Option(help="A name for lists; default the file's.")] = None,
    format: Annotated[str | None, typer.Option(help="pt2, hf, safetensors or onnx; default what the file is.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="safetensors: the program that uses the weights; see `models architectures`.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the service has checked it.")] = True,
) -> None:
    """Upload a model and say what the service found in it."""
    with call.client() as client, ProgressDisplay(enabled=not call.json) as display:
        model = client.models.upload(
            file, name=name, format=format, architecture=architecture, on_bytes=display.bytes_of(file.name)
        )
        if wait:
            model = client.models.wait(model.id)
    call.show(model.raw, model_page(model))


@app.command()
@service_command
def architectures(call: Invocation) -> None:
    """List the architectures that a safetensors file can be uploaded for."""
    with call.client() as client:
        items = client.models.architectures()
    call.show({"items": list(items)}, architectures_table(items))


@app.command("list")
@service_command
def list_models(
    call: Invocation,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
) -> None:
    """List models."""
    with call.client() as client:
        models = client.models.list(limit=limit)
    call.show({"items": [model.raw for model in models]}, models_table(models))


@app.command()
@service_command
def get(call: Invocation, id: str) -> None:
    """Show one model: inputs, outputs, and which technique applies to how many layers."""
    with call.client() as client:
        model = client.models.get(id)
    call.show(model.raw, model_page(model))


@app.command()
@service_command
def delete(call: Invocation, id: str) -> None:
    """Delete a model that no unfinished job uses."""
    with call.client() as client:
        client.models.delete(id)
    call.show({"id": id, "deleted": True}, f"deleted {id}")

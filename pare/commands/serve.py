"""`pare serve`: start the whole service. The one place where the client package meets the service's code, and late."""

from pathlib import Path
from typing import Annotated

import typer

from pare.errors import SetupMissing


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    data_dir: Annotated[Path, typer.Option(envvar="PARE_DATA_DIR", help="Where everything is kept.")] = Path(
        "pare-data"
    ),
) -> None:
    """Run the whole service on this machine: API, worker, dispatcher and broker, until Ctrl-C."""
    try:
        from worker.serve import serve as serve_everything
    except ImportError as error:
        raise SetupMissing("pare serve", error.name or "worker", "serve") from error
    serve_everything(host=host, port=port, data_dir=data_dir)

"""`pare demo`, `pare health`, `pare workers`, `pare version`: the service as a whole."""

from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from pare.commands.invocation import ExitCode, Invocation, service_command
from pare.commands.tables import grid, workers_table
from pare.errors import SetupMissing


@service_command
def version(call: Invocation) -> None:
    """Print the version."""
    number = installed_version("pare")
    call.show({"version": number}, f"pare {number}")


@service_command
def health(call: Invocation) -> None:
    """Show the state of the service's parts; exit code 1 when it is unavailable."""
    with call.client() as client:
        report = client.health()
    rows = [(name, _describe(check)) for name, check in report.get("checks", {}).items()]
    call.show(report, grid((str(report["status"]), ""), rows))
    if report["status"] == "unavailable":
        raise typer.Exit(ExitCode.FAILED)


@service_command
def workers(call: Invocation) -> None:
    """List the workers that are alive: what each has for a job, and how busy it is."""
    with call.client() as client:
        alive = client.workers.list()
    call.show({"items": [worker.raw for worker in alive]}, workers_table(alive))


def _describe(check: Any) -> str:
    if isinstance(check, dict):
        return ", ".join(f"{name}: {_describe(value)}" for name, value in check.items())
    return ", ".join(map(str, check)) if isinstance(check, list) else str(check)


def demo(
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep the service's data and the artifacts here; default: removed at the end.")
    ] = None,
) -> None:
    """Show everything on real data: train a small CNN, optimize it through the service, run what comes back."""
    for package in ("torch", "sklearn", "numpy"):
        if find_spec(package) is None:
            raise SetupMissing("pare demo", package, "demo")
    from pare.demo import run_demo

    run_demo(data_dir)

"""`pare config check`: are the settings of this environment fit for production? Read where the service runs."""

from dataclasses import asdict

import typer

from pare.commands.invocation import ExitCode, Invocation, service_command
from pare.commands.tables import grid
from pare.errors import SetupMissing

app = typer.Typer(help="The settings of a service, in the environment (PARE_...).", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The settings of a service, in the environment (PARE_...)."""


@app.command()
@service_command
def check(call: Invocation) -> None:
    """Show all that is wrong with the settings for production; exit code 1 when something is an error."""
    try:
        from worker.production import find_all
    except ImportError as error:
        raise SetupMissing("pare config check", error.name or "worker", "serve") from error
    environment, findings = find_all()
    rows = [(f"{each.severity} {each.code}", f"{each.cause}\nfix: {each.fix}") for each in findings]
    num_errors = sum(each.severity == "error" for each in findings)
    title = f"PARE_ENVIRONMENT={environment}: {num_errors} errors, {len(findings) - num_errors} warnings"
    call.show({"environment": environment, "findings": [asdict(each) for each in findings]}, grid((title, ""), rows))
    if num_errors:
        raise typer.Exit(ExitCode.FAILED)

"""What every command shares: the address of the service, the output format, stdout for results, stderr for the rest."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from pare.client import Client
from pare.errors import JobFailed, NotReachable, PareError, Refused, SetupMissing, UploadRejected, UsageError
from pare.report import to_text


class Output(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


class ExitCode:
    """What the shell is told."""

    OK = 0
    FAILED = 1
    """The job, or the service that was asked about, or its settings, or anything that has no code of its own."""
    USAGE = 2
    NOT_REACHABLE = 3
    REFUSED = 4
    BUG = 70
    DETACHED = 130


@dataclass
class Invocation:
    """One call of the command line; the callbacks of --url and -o fill it."""

    url: str | None = None
    output: Output = Output.TABLE

    @property
    def json(self) -> bool:
        """Whether results are printed as JSON."""
        return self.output is Output.JSON

    def client(self) -> Client:
        """Return a client of the service that --url or PARE_URL names."""
        return Client(self.url)

    def show(self, data: Any, table: RenderableType | None = None) -> None:
        """Print a result on stdout: `data` as JSON, or the table made for people."""
        if self.json or table is None:
            print(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            self._show_table(table)

    def _show_table(self, table: RenderableType) -> None:
        if sys.stdout.isatty():
            Console(highlight=False).print(table)
        else:
            # A pipe or a file gets lines that are long enough, without padding.
            print(to_text(table, width=160))

    def fail(self, error: PareError) -> int:
        """Print an error on stderr and return the exit code that belongs to it."""
        if self.json:
            print(json.dumps({"error": error.to_json()}, indent=2, ensure_ascii=False), file=sys.stderr)
        else:
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.print(f"error {error.code}: {error.detail}", style="red", markup=False)
            for problem in error.problems if isinstance(error, Refused) else ():
                console.print(f"  {problem.pointer or '/'}: {problem.detail}", markup=False)
            if error.fix:
                console.print(f"fix: {error.fix}", markup=False)
        return exit_code(error)


def exit_code(error: PareError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, JobFailed):
        return ExitCode.FAILED
    if isinstance(error, NotReachable):
        return ExitCode.NOT_REACHABLE
    if isinstance(error, Refused | UploadRejected):
        return ExitCode.REFUSED
    if isinstance(error, UsageError | SetupMissing):
        return ExitCode.USAGE
    return ExitCode.FAILED


def _invocation(context: typer.Context) -> Invocation:
    found = context.find_root().obj
    assert isinstance(found, Invocation)
    return found


def _set_url(context: typer.Context, value: str | None) -> str | None:
    if value is not None:
        _invocation(context).url = value
    return value


def _set_output(context: typer.Context, value: Output | None) -> Output | None:
    if value is not None:
        _invocation(context).output = value
    return value


Url = Annotated[
    str | None,
    typer.Option("--url", callback=_set_url, help="The service; default PARE_URL, then http://127.0.0.1:8000."),
]
Format = Annotated[Output | None, typer.Option("-o", "--output", callback=_set_output, help="table or json.")]


def service_command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function whose first parameter is the invocation a command with --url and -o."""
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters[0].annotation is Invocation

    @functools.wraps(function)
    def command(context: typer.Context, **values: Any) -> None:
        # The callbacks have already noted these two.
        del values["url"], values["output"]
        try:
            function(_invocation(context), **values)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader of our output went away (`pare jobs list | head`), which is its right.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    shared = {"url": Url, "output": Format}
    keyword = inspect.Parameter.KEYWORD_ONLY
    replaced = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(parameter.replace(kind=keyword) for parameter in parameters[1:]),
        *(inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in shared.items()),
    ]
    command.__signature__ = inspect.Signature(replaced)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in replaced}
    del command.__wrapped__
    return command

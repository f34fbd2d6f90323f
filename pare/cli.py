"""The `pare` command. Results on stdout, progress and errors on stderr, exit codes that scripts can use.

0    done
1    the job failed or was cancelled
2    the command makes no sense
3    the service does not answer
4    the service refused
130  Ctrl-C; a job that was watched goes on
"""

import os
import sys
import traceback
from typing import NoReturn

import stamina.instrumentation
import typer

from pare.commands import config, datasets, jobs, keys, models, webhooks
from pare.commands.distill import distill
from pare.commands.invocation import ExitCode, Format, Invocation, Url
from pare.commands.serve import serve
from pare.commands.service import demo, health, version, workers
from pare.commands.techniques import techniques
from pare.errors import PareError

app = typer.Typer(
    name="pare",
    help="Make trained PyTorch models smaller and faster, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(url: Url = None, output: Format = None) -> None:
    """Make trained PyTorch models smaller and faster, and prove it."""
    # Both options have callbacks that note their values.
    del url, output


app.add_typer(models.app, name="models")
app.add_typer(datasets.app, name="datasets")
app.add_typer(jobs.app, name="jobs")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(keys.app, name="keys")
app.add_typer(config.app, name="config")
app.command()(distill)
app.command()(techniques)
app.command()(serve)
app.command()(demo)
app.command()(health)
app.command()(workers)
app.command()(keys.me)
app.command()(version)


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; no exception gets out."""
    # Retries are part of normal work; their log lines would land between results.
    stamina.instrumentation.set_on_retry_hooks([])
    call = Invocation()
    try:
        app(args=arguments, obj=call, prog_name="pare")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK if end.code is None else ExitCode.USAGE
    except PareError as error:
        return call.fail(error)
    except KeyboardInterrupt:
        return ExitCode.DETACHED
    except Exception as error:
        if os.environ.get("PARE_DEBUG"):
            traceback.print_exc()
        return (
            call.fail(
                PareError(
                    f"{type(error).__name__}: {error}",
                    code="client_bug",
                    fix="This is a mistake in pare itself; PARE_DEBUG=1 shows where.",
                )
            )
            and ExitCode.BUG
        )
    return ExitCode.OK


def main() -> NoReturn:
    """Entry point of the `pare` script."""
    sys.exit(run())

"""`pare techniques`: what the service can do, and the parameters of one kind."""

from typing import Annotated

import typer

from pare.commands.invocation import Invocation, service_command
from pare.commands.tables import technique_page, techniques_table
from pare.errors import UsageError


@service_command
def techniques(
    call: Invocation,
    kind: Annotated[str | None, typer.Argument(help="Show the parameters of this kind.")] = None,
) -> None:
    """List the techniques, or show one with its parameters."""
    with call.client() as client:
        known = client.techniques.list()
    if kind is None:
        call.show({"items": [technique.raw for technique in known]}, techniques_table(known))
        return
    chosen = [technique for technique in known if technique.kind == kind]
    if not chosen:
        raise UsageError(
            f"there is no technique {kind!r}", fix=f"Choose one of {', '.join(technique.kind for technique in known)}."
        )
    call.show(chosen[0].raw, technique_page(chosen[0]))

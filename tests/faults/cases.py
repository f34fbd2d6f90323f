"""The list of cases. A case acts on a service and asserts what users see; the oracle asserts the rest afterwards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.stack import Stack

Run = Callable[[Stack], None]
SQLITE, POSTGRESQL = "sqlite", "postgresql"


@dataclass(frozen=True)
class Case:
    """A named fault and what is promised when it happens."""

    id: str
    name: str
    run: Run
    databases: tuple[str, ...]
    fast: bool
    """Part of `make test`; the others are run by `make test-faults`."""
    needs_root: bool = False
    programs: tuple[str, ...] = ()
    """What must be installed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the service that differ."""


CASES: dict[str, Case] = {}
"""By id; the modules with the cases fill it when they are imported."""


def case(
    case_id: str,
    *,
    databases: tuple[str, ...] = (SQLITE,),
    fast: bool = False,
    needs_root: bool = False,
    programs: tuple[str, ...] = (),
    **options: Any,
) -> Callable[[Run], Run]:
    """Put a function into the list."""

    def enter(run: Run) -> Run:
        assert case_id not in CASES, case_id
        CASES[case_id] = Case(case_id, run.__name__, run, databases, fast, needs_root, programs, options)
        return run

    return enter

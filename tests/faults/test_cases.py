"""Every case of the catalogue that is written here, on every database that it says, with the oracle at its end."""

from pathlib import Path

import pytest

from tests.faults.cases import Case
from tests.faults.running import ALL, run_case

PARAMETERS = [
    pytest.param(case, database, id=f"{case.id}-{case.name}-{database}", marks=[] if case.fast else pytest.mark.faults)
    for case in ALL
    for database in case.databases
]


@pytest.mark.parametrize(("case", "database"), PARAMETERS)
def test_the_contract_holds(case: Case, database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run_case(case, database, request, tmp_path)

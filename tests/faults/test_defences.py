"""Each defence is needed: without it, the case that it is for fails, and with the words that it fails with."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.cases import CASES, POSTGRESQL, SQLITE
from tests.faults.defences import DEFENCES
from tests.faults.running import ALL, run_case

pytestmark = pytest.mark.faults
PATIENCE_SECONDS = 25.0
"""What does not come is not waited for as long as what must."""


@dataclass(frozen=True)
class Removal:
    """A case that needs its defences. Two where one alone would do: the contract has a second line there."""

    without: tuple[str, ...]
    case: str
    failure: str
    """A regular expression for what the case or the oracle says."""
    database: str = SQLITE


REMOVALS = [
    Removal(("epoch",), "B5", "of the first|I3: an artifact of epoch 1|attempt"),
    Removal(("epoch", "self_fence"), "B4", "the paused owner's engine"),
    Removal(("compare_and_set",), "A11", "assert [0-9]+ == 1|I2: .* claims"),
    Removal(("early_ack", "compare_and_set"), "A15", "assert [0-9]+ == 1|I2: .* claims"),
    Removal(("reaper",), "B20", "in .*succeeded"),
    Removal(("reaper",), "B3", "taken from the dead worker"),
    Removal(("new_hints",), "A6", "in .*succeeded"),
    Removal(("outbox",), "A7", "marked as sent"),
    Removal(("ties",), "B3", "the end of the sandboxes"),
    Removal(("forced_end",), "B12", "the end of the engine|cancelled"),
    Removal(("self_fence",), "B21b", "before its lease does", POSTGRESQL),
    Removal(("begin_immediate",), "C7", "instead of waiting|503"),
    Removal(("digest",), "B19", "not the checkpoint"),
    Removal(("cancel_first",), "B13", "succeeded"),
    Removal(("cancel_look",), "B11", "cancelled"),
    Removal(("time_limits",), "B15", "in .*failed"),
    Removal(("time_limits",), "B16", "in .*failed"),
    Removal(("idempotency",), "C3", "committed, and forgotten", POSTGRESQL),
    Removal(("translation",), "C1", "500|Internal", POSTGRESQL),
    Removal(("outcome_retries",), "B21c", "done again|in .*succeeded", POSTGRESQL),
    Removal(("connection_looks",), "A16", "in .*succeeded"),
    Removal(("idle_limit",), "B4b", "in .*succeeded", POSTGRESQL),
]


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda removal: f"{removal.case}-without-{'+'.join(removal.without)}")
def test_the_case_fails_without_its_defence(removal: Removal, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case = CASES[removal.case]
    assert removal.database in case.databases
    with pytest.raises(AssertionError, match=removal.failure):
        run_case(case, removal.database, request, tmp_path, patience=PATIENCE_SECONDS, without=removal.without)


def test_every_defence_has_its_case() -> None:
    assert ALL
    assert {name for removal in REMOVALS for name in removal.without} == set(DEFENCES)

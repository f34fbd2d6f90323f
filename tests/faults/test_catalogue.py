"""docs/faults.md lists what there is: every case has its row, and every test that a row names exists."""

import re
from pathlib import Path

from tests.faults.cases import CASES
from tests.faults.running import ALL

PROJECT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([A-I]\d+[a-z]?) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`tests/[\w/]+\.py::test_\w+`")
NUM_OF_FAMILY = {"A": 18, "B": 27, "C": 12, "D": 24, "F": 12, "G": 8, "H": 10, "I": 6}
"""What strangers' files try, E, has a page of its own."""


def read_rows() -> dict[str, str]:
    found = ROW.findall((PROJECT / "docs" / "faults.md").read_text())
    assert len(dict(found)) == len(found), "an id stands twice"
    return dict(found)


def test_every_id_of_the_catalogue_has_a_row() -> None:
    wanted = {f"{family}{number}" for family, last in NUM_OF_FAMILY.items() for number in range(1, last + 1)}

    assert wanted <= set(read_rows())


def test_rows_and_cases_are_the_same() -> None:
    assert ALL
    assert {case_id for case_id, proof in read_rows().items() if proof.startswith("case")} == set(CASES)


def test_each_row_is_proven_or_says_why_not() -> None:
    for case_id, proof in read_rows().items():
        assert proof.startswith(("case", "`make ", "not covered: ")) or TEST.search(proof), case_id

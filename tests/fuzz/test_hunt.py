"""Altered files of every format: accepted or rejected by a documented code, and nothing else happens."""

from collections.abc import Iterator

import pytest

from tests.fuzz.hunt import documented_codes, hunt, judge
from tests.fuzz.samples import FORMATS, make_samples
from tests.fuzz.watched import Upload, Watch

SECONDS = 0.8
"""Of processor time for each format; `make fuzz` takes longer."""
SEED = 20


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    with Watch(tmp_path_factory.mktemp("watched")) as started:
        yield started


@pytest.mark.parametrize("format", FORMATS)
def test_altered_files_are_accepted_or_rejected_and_nothing_else(watch: Watch, format: str) -> None:
    for found in hunt(watch, format, SEED):
        assert not found.problems, found.problems[0][:2]
        if found.processor_seconds > SECONDS or found.num_files > 100:
            break
    assert len(found.counts) > 1


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_that_are_altered_are_valid(watch: Watch, format: str) -> None:
    for sample in make_samples(format):
        outcome = watch.check(sample)
        assert outcome.code is None, outcome
        assert judge(outcome, documented_codes()) is None


def test_what_a_check_must_not_do_is_seen(watch: Watch) -> None:
    """The watch itself: it tells of each forbidden thing, of a crash and of an endless check."""
    for act, word in ACTS.items():
        outcome = watch.check(Upload("act", "npz", act.encode()))
        assert word in f"{outcome.code} {outcome.violations}", (act, outcome)
        assert judge(outcome, documented_codes()) is not None


ACTS = {
    "import pickle; pickle.loads(b'cposix\\nsystem\\n.')": "pickle.find_class",
    "import os; os.system('true')": "os.system",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "socket",
    "open('../marker', 'w')": "open",
    "import os; os.mkdir('../marker')": "os.mkdir",
    "import os; os.kill(os.getpid(), 11)": "os.kill",
    "import ctypes; ctypes.string_at(0)": "CRASH",
    "raise SystemExit": "CRASH",
    "1 / 0": "engine_crash",
    "bytearray(2**40)": "out_of_memory",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass": "TIMEOUT",
}

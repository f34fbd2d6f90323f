"""Checking altered files of each format until the time is over: `make fuzz`.

python -m tests.fuzz.hunt [--seconds N] [--seed N] [--formats pt2,onnx] [--keep FOLDER]

Each file follows from the seed, its format and its number alone, so that one can be made again. What went wrong is
printed and kept as a file; the exit status is then 1.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.samples import FORMATS, make_samples
from tests.fuzz.watched import MIB, Outcome, Upload, Watch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "intake.md"
MAX_MEMORY_BYTES = 1024 * MIB
"""More than a check of a file of some kilobytes may need besides what the engine has loaded."""


@dataclass
class Hunt:
    """What was found in the files of one format."""

    format: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[int, str, Upload]] = field(default_factory=list)
    processor_seconds: float = 0.0

    @property
    def num_files(self) -> int:
        """How many files were checked."""
        return sum(self.counts.values())


def documented_codes() -> set[str]:
    """Return the codes that docs/intake.md explains."""
    return set(re.findall(r"^\| `([a-z_0-9]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))


def judge(outcome: Outcome, codes: set[str]) -> str | None:
    """Return what is wrong with the end of a check, None where the file was accepted or rejected as it should be."""
    if outcome.violations:
        return "did what no check may do: " + "; ".join(outcome.violations)
    if outcome.code is not None and outcome.code not in codes:
        return f"ended with {outcome.code}: {outcome.detail}"
    if outcome.memory_bytes > MAX_MEMORY_BYTES:
        return f"took {outcome.memory_bytes} bytes of memory"
    return None


def alter(samples: tuple[Upload, ...], seed: int, format: str, number: int) -> Upload:
    """Return the altered file of this number."""
    choice = random.Random(f"{seed}/{format}/{number}")
    return mutate(choice.choice(samples), choice)


def hunt(watch: Watch, format: str, seed: int) -> Iterator[Hunt]:
    """Check one file after another, yielding what was found so far after each."""
    samples, codes, found = make_samples(format), documented_codes(), Hunt(format)
    for number in range(sys.maxsize):
        upload = alter(samples, seed, format, number)
        outcome = watch.check(upload)
        found.counts[outcome.code or "accepted"] += 1
        found.processor_seconds += outcome.seconds
        if problem := judge(outcome, codes):
            found.problems.append((number, problem, upload))
        yield found


def main() -> int:
    """Run and return the exit status."""
    parser = argparse.ArgumentParser(prog="fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="for all formats together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="folder for the files that go wrong")
    options = parser.parse_args()
    formats = options.formats.split(",")
    print(f"seed {options.seed}, {options.seconds:g} s, formats {', '.join(formats)}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as place, Watch(Path(place)) as watch:
        for format in formats:
            end = time.monotonic() + options.seconds / len(formats)
            told = 0
            for found in hunt(watch, format, options.seed):
                for number, problem, upload in found.problems[told:]:
                    options.keep.mkdir(exist_ok=True)
                    path = options.keep / f"{format}-{options.seed}-{number}.bin"
                    path.write_bytes(upload.content)
                    print(f"{path} ({upload.architecture}): {problem[:600]}", flush=True)
                    failed = True
                told = len(found.problems)
                if time.monotonic() > end:
                    break
            ends = ", ".join(f"{code} {count}" for code, count in found.counts.most_common())
            print(f"{format}: {found.num_files} files, {len(found.problems)} wrong. {ends}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

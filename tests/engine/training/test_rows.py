"""Rows of a file: the right ones, in the order asked for, in any amount of memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worker.engine.training import rows
from worker.engine.training.rows import Rows, reorder

READER = """
import resource, sys
from pathlib import Path
import numpy as np
from worker.engine.training.rows import Rows

array = Rows(Path(sys.argv[1]), np.dtype(np.float32), (1 << 20, 256), 8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print(array[np.array([(1 << 20) - 1, 0, 5])].shape, sum(len(block) for block in array.blocks()))
"""


@pytest.mark.parametrize("chosen", [[], [3], [4, 5, 6, 0, 1, 6, 6], list(range(7))])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, chosen: list[int]) -> None:
    values = np.arange(7 * 3 * 2, dtype=np.int32).reshape(7, 3, 2)
    path = tmp_path / "rows"
    path.write_bytes(b"head" + values.tobytes())
    found = Rows(path, values.dtype, values.shape, 4)[np.array(chosen, dtype=np.int64)]
    np.testing.assert_array_equal(found, values[chosen])


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(20))
    with pytest.raises(EOFError, match="ends before its last row"):
        Rows(path, np.dtype(np.int64), (3,))[:]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 4), (1, 2, 3, 2)])
def test_columns_become_rows_block_by_block(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 100)
    values = np.random.default_rng(0).normal(size=shape)
    path = tmp_path / "columns"
    path.write_bytes(b"head" + values.tobytes("F"))
    assert b"".join(reorder(path, 4, values.dtype, shape)) == values.tobytes("C")


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not limit address space")
def test_an_array_larger_than_the_limit_of_address_space_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 + (1 << 30))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert (done.returncode, done.stdout.split()) == (0, ["(3,", "256)", str(1 << 20)]), done.stderr

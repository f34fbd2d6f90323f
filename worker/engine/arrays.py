"""Writing named arrays as .npz: no pickle, any name, and the same bytes for the same arrays."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_npz(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write what numpy.load reads. numpy.savez itself refuses an array named "file"."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # its date is the fixed 1980-01-01
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read it back, in order."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}

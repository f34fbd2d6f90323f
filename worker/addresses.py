"""Addresses that an engine takes without memory: the libraries of torch's CUDA build, where there is no GPU."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def count_cuda_library_bytes() -> int:
    """Return the size of the CUDA libraries that come with the installed torch; 0 for its CPU build.

    Importing torch maps them into every engine, GPU or not: some 3.5 GB of addresses (torch 2.13 for CUDA 13), of which
    hardly a page is read. A limit of addresses that is meant as one of memory has to leave room for them.
    """
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return 0
    return sum_libraries(Path(found.submodule_search_locations[0]))


def sum_libraries(torch: Path) -> int:
    """Return the size of the CUDA libraries in torch's folder and in the packages `nvidia` beside it."""
    libraries = [*torch.glob("lib/lib*cuda*.so*"), *torch.parent.glob("nvidia/**/*.so*")]
    return sum(path.stat().st_size for path in libraries if path.is_file() and not path.is_symlink())

"""Folders for what many tests share, which no test's own `tmp_path` can hold."""

import atexit
import shutil
import tempfile
from pathlib import Path


def make_folder() -> Path:
    """Return a new folder that is there until this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="pare-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory

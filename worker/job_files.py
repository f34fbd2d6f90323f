"""What goes into an engine's directory and what is taken out of it. Nothing that comes out is believed."""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from app.jobs import Claim, StoredFile
from app.recipes.plan import (
    MAX_RESULT_BYTES,
    DatasetFile,
    DatasetFormat,
    EngineError,
    EngineResult,
    ModelFile,
    Plan,
    Teacher,
)
from app.storage import Section
from worker.failures import AttemptFailed, defect
from worker.sandbox.launch import list_folder

_CHUNK_BYTES = 1024 * 1024
_MAX_ENTRIES, _MAX_DEPTH = 100_000, 100


@dataclass(frozen=True)
class Inputs:
    """The files in DIR/in, as the plan names them."""

    model: ModelFile | None
    datasets: tuple[DatasetFile, ...]
    teachers: tuple[Teacher, ...]


def place_inputs(directory: Path, claim: Claim, section: Section) -> Inputs:
    """Copy the job's files out of storage, each verified against its digest."""
    model = None
    if claim.model is not None:
        model = ModelFile.model_validate(_place_model(directory, claim.model, "model", section))
    teachers = [
        Teacher.model_validate({"id": stored.id, **_place_model(directory, stored, f"teacher{number}", section)})
        for number, stored in enumerate(claim.teachers)
    ]
    datasets = []
    for number, stored in enumerate(claim.datasets):
        name = f"data{number}.{stored.format}"
        _download(section, stored.sha256, stored.size_bytes, directory / "in" / name)
        data_format = cast(DatasetFormat, stored.format)
        datasets.append(DatasetFile(id=stored.id, file=name, format=data_format, sha256=stored.sha256))
    return Inputs(model, tuple(datasets), tuple(teachers))


def _place_model(directory: Path, stored: StoredFile, stem: str, section: Section) -> dict[str, str | None]:
    name = f"{stem}.{stored.format}"
    _download(section, stored.sha256, stored.size_bytes, directory / "in" / name)
    return {"file": name, "format": stored.format, "sha256": stored.sha256, "architecture": stored.architecture}


def _download(section: Section, sha256: str, size_bytes: int, path: Path) -> None:
    section.download(sha256, size_bytes, path)
    path.chmod(0o644)


def place_artifacts(source: Path, directory: Path, names: tuple[str, ...]) -> None:
    """Copy one engine's artifacts to the input of the engine that reloads them."""
    for name in names:
        path = directory / "in" / name
        shutil.copyfile(source / "out" / "artifacts" / name, path, follow_symlinks=False)
        path.chmod(0o644)


def write_plan(directory: Path, plan: Plan) -> None:
    """Write the plan, the last file before the engine may begin."""
    path = directory / "in" / "plan.json"
    path.write_text(plan.model_dump_json())
    path.chmod(0o644)


def read_result(directory: Path, action: str) -> EngineResult:
    """Read and check out/result.json; raises AttemptFailed."""
    try:
        handle = open_plain(directory / "out", "result.json")
    except FileNotFoundError:
        raise AttemptFailed(defect("no_result", "the engine ended without an error and without a result")) from None
    except OSError as error:
        raise AttemptFailed(defect("bad_result", f"result.json is not a plain file: {error.strerror}")) from None
    with os.fdopen(handle, "rb") as file:
        text = file.read(MAX_RESULT_BYTES + 1)
    if len(text) > MAX_RESULT_BYTES:
        raise AttemptFailed(defect("bad_result", f"result.json has more than {MAX_RESULT_BYTES} bytes"))
    try:
        result = EngineResult.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        lines = str(error).splitlines()
        raise AttemptFailed(
            defect("bad_result", f"result.json is not a result: {' '.join(lines[:6])}"[:2000])
        ) from None
    if result.error is None:
        _check_parts(result, action)
    return result


def _check_parts(result: EngineResult, action: str) -> None:
    expected = {
        "check_model": result.model is not None,
        "check_dataset": result.dataset is not None,
        "optimize": result.metrics is not None and bool(result.artifacts),
        "verify": True,
    }
    if not expected[action]:
        raise AttemptFailed(defect("bad_result", f"the result of {action} lacks its parts"))
    names = [artifact.name for artifact in result.artifacts]
    if len(set(names)) != len(names):
        raise AttemptFailed(defect("bad_result", "the result names an artifact twice"))


def check_artifacts(
    directory: Path, result: EngineResult, max_bytes: int, max_total_bytes: int, check_end: Callable[[], None]
) -> None:
    """Check that each named artifact is a plain file with the size and digest that the result claims.

    A file with holes is long but takes no disk until it is copied: hence the limit on the total, and `check_end`, which
    may raise, because reading nothing takes as long as reading something.
    """
    total_bytes = sum(artifact.size_bytes for artifact in result.artifacts)
    if total_bytes > max_total_bytes:
        detail = f"the artifacts have {total_bytes} bytes together; the limit is {max_total_bytes}"
        raise AttemptFailed(defect("artifact_too_large", detail))
    for artifact in result.artifacts:
        try:
            handle = open_plain(directory / "out", "artifacts", artifact.name)
        except OSError as error:
            detail = f"artifact {artifact.name} is not a plain file: {error.strerror}"
            raise AttemptFailed(defect("bad_artifact", detail)) from None
        with os.fdopen(handle, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > max_bytes:
                detail = f"artifact {artifact.name} has {size_bytes} bytes; the limit is {max_bytes}"
                raise AttemptFailed(defect("artifact_too_large", detail))
            digest = hashlib.sha256()
            if size_bytes == artifact.size_bytes:
                while chunk := file.read(_CHUNK_BYTES):
                    check_end()
                    digest.update(chunk)
        if (size_bytes, digest.hexdigest()) != (artifact.size_bytes, artifact.sha256):
            detail = f"artifact {artifact.name} is not what the result claims: {size_bytes} bytes, {digest.hexdigest()}"
            raise AttemptFailed(defect("bad_artifact", detail))


def open_plain(directory: Path, *names: str) -> int:
    """Open a regular file below `directory` without following any link."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    for name in names[:-1]:
        inner = _open_below(folder, name, os.O_RDONLY | os.O_DIRECTORY)
        folder = inner
    handle = _open_below(folder, names[-1], os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(handle)
        raise OSError(0, "a link, pipe, folder or device")
    return handle


def _open_below(folder: int, name: str, flags: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def measure_disk(directory: Path) -> tuple[int, int]:
    """Return the bytes and the number of files and folders that an engine has written, links not followed.

    Folders nested too deep to look into count as too many.
    """
    size_bytes = num_entries = 0
    folders = [(directory, 0)]
    while folders and num_entries <= _MAX_ENTRIES:
        folder, depth = folders.pop()
        if depth > _MAX_DEPTH:
            return size_bytes, _MAX_ENTRIES + 1
        # The engine is still at work: what vanishes meanwhile is not counted.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), list_folder(folder) as entries:
            for entry in entries:
                num_entries += 1
                with contextlib.suppress(FileNotFoundError):
                    size_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((Path(entry.path), depth + 1))
                if num_entries > _MAX_ENTRIES:
                    break
    return size_bytes, num_entries


def check_disk(directory: Path, max_bytes: int) -> None:
    """Raise AttemptFailed where the engine has written too much."""
    size_bytes = num_entries = 0
    for name in ("out", "tmp"):
        part_bytes, part_entries = measure_disk(directory / name)
        size_bytes, num_entries = size_bytes + part_bytes, num_entries + part_entries
    if size_bytes > max_bytes or num_entries > _MAX_ENTRIES:
        raise AttemptFailed(
            EngineError(
                code="disk_limit_exceeded",
                detail=f"the engine wrote {size_bytes} bytes in {num_entries} files and folders; the limits are "
                f"{max_bytes} bytes, {_MAX_ENTRIES} files and folders, and {_MAX_DEPTH} folders in each other",
                fix="Ask for fewer output formats, or raise PARE_WORKER_MAX_DISK_BYTES.",
            )
        )

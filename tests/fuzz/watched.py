"""Checking one uploaded file as the engine would, in a process that is watched: what it opens, needs and ends with.

The watched process is forked from one that is warm already, for each file anew, so that no file meets what another left
behind. A hook of the interpreter refuses, and tells of, what no check may do: unpickle, start a program, connect, write
outside of the job's directory.
"""

import json
import multiprocessing
import os
import resource
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

MIB = 2**20
_WAIT = 20
_FORBIDDEN = (
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "webbrowser.open"),
    *("ctypes.dlopen", "urllib.Request", "ftplib.connect", "os.kill"),
)
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Upload:
    """A file and what its uploader says it is."""

    kind: Literal["model", "dataset", "act"]
    """`act`: Python code, to see what the watch sees."""
    format: str
    content: bytes
    architecture: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a check ended: `code` is None where the file was accepted."""

    code: str | None
    detail: str = ""
    violations: tuple[str, ...] = ()
    """What the check did, or tried, that it must not."""
    seconds: float = 0.0
    """Of processor time: other work on the machine does not count."""
    memory_bytes: int = 0
    """More than the warm process had."""


class Watch:
    """Checks files one after another. `memory_bytes` and `seconds` are the limits of one."""

    def __init__(self, directory: Path, memory_bytes: int = 2048 * MIB, seconds: float = 30.0) -> None:
        self._directory, self._memory_bytes, self._seconds = directory, memory_bytes, seconds
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, directory, memory_bytes, seconds), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def check(self, upload: Upload) -> Outcome:
        """Check a file and tell what happened."""
        job, around = self._directory / "job", sorted(path.name for path in self._directory.iterdir())
        _empty(job)
        name = f"model.{upload.format}" if upload.kind == "model" else f"data0.{upload.format}"
        (job / "in" / name).write_bytes(upload.content)
        self._connection.send((name, upload.kind, upload.format, upload.architecture))
        outcome: Outcome = self._connection.recv()
        found = sorted({path.name for path in self._directory.iterdir()} - {*around, "job"})
        if found:
            outcome = Outcome(**{**asdict(outcome), "violations": (*outcome.violations, f"files outside: {found}")})
        return outcome


def _empty(job: Path) -> None:
    import shutil

    shutil.rmtree(job, ignore_errors=True)
    for name in ("in", "out", "tmp"):
        (job / name).mkdir(parents=True)


def _serve(connection: Connection, directory: Path, memory_bytes: int, seconds: float) -> None:
    from worker.engine.warming import warm_up

    os.environ["OMP_NUM_THREADS"] = "1"
    warm_up()
    _warm_more()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_watch(request, directory, memory_bytes, seconds))


def _warm_more() -> None:
    # What a check would import late: the hook cannot tell an import from a file that is opened for another reason.
    import PIL.BmpImagePlugin
    import PIL.JpegImagePlugin
    import PIL.MpoImagePlugin
    import PIL.PngImagePlugin
    import PIL.WebPImagePlugin  # noqa: F401
    import transformers  # noqa: F401

    import worker.engine.programs.hugging_face
    import worker.engine.programs.onnx_import
    import worker.engine.programs.state_dict
    import worker.engine.training.images
    import worker.engine.training.parquet  # noqa: F401


def _watch(request: Any, directory: Path, memory_bytes: int, seconds: float) -> Outcome:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _check(request, directory / "job", memory_bytes, seconds, writing)
    os.close(writing)
    base = _resident_bytes()
    told, ended = b"", False
    # A busy machine gives a process a part of the time only; one that waits for something uses none.
    deadline = started + _WAIT * seconds
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([reading], [], [], left)
        if ready:
            data = os.read(reading, 2**16)
            told += data
            if not data:
                ended = True
                break
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    spent = usage.ru_utime + usage.ru_stime
    memory = max(0, usage.ru_maxrss * 1024 - base)
    lines = [json.loads(line) for line in told.decode().splitlines()]
    violations = tuple(line["violation"] for line in lines if "violation" in line)
    result = next((line for line in lines if "code" in line), None)
    if not ended or os.waitstatus_to_exitcode(status) in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("TIMEOUT", f"more than {seconds} s", violations, spent, memory)
    if result is None:
        return Outcome("CRASH", f"status {os.waitstatus_to_exitcode(status)}", violations, spent, memory)
    return Outcome(result["code"], result["detail"], violations, spent, memory)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _check(request: Any, job: Path, memory_bytes: int, seconds: float, told: int) -> None:
    name, kind, format, architecture = request
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))

    def say(line: dict[str, Any]) -> None:
        os.write(told, json.dumps(line).encode() + b"\n")

    os.dup2(os.open(job / "log", os.O_WRONLY | os.O_CREAT, 0o600), 1)
    os.dup2(1, 2)
    try:
        from app.recipes.plan import Plan
        from worker.engine.actions import run_action
        from worker.engine.failures import translate_failure
        from worker.engine.progress import Reporter

        file: dict[str, Any] = {"file": name, "format": format, "sha256": "0" * 64}
        plan = Plan.model_validate(
            {"action": "check_model", "model": {**file, "architecture": architecture}}
            if kind == "model"
            else {"action": "check_dataset", "datasets": [{**file, "id": "dst_0"}]}
        )
        reporter = Reporter(lambda _: None)
        os.environ.update(HOME=str(job / "tmp"), TMPDIR=str(job / "tmp"))
        import tempfile

        tempfile.tempdir = str(job / "tmp")
        os.chdir(job)
        _forbid(job, say)
        try:
            if kind == "act":
                exec((job / "in" / name).read_text())
            else:
                run_action(plan, job, reporter)
            say({"code": None, "detail": ""})
        except Exception as failure:
            error = translate_failure(failure, reporter.stage)
            if error.code in ("engine_crash", "out_of_memory"):
                import traceback

                traceback.print_exc()
                where = traceback.extract_tb(failure.__traceback__)[-1]
                say({"code": error.code, "detail": f"{error.detail} at {where.filename}:{where.lineno}"})
            else:
                say({"code": error.code, "detail": error.detail})
    except BaseException as failure:
        say({"code": "CRASH", "detail": f"{type(failure).__name__}: {failure}"[:2000]})
    finally:
        os._exit(0)


def _forbid(job: Path, say: Any) -> None:
    inside = str(job)
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        wrong = event in _FORBIDDEN and not (event == "ctypes.dlopen" and _is_installed(arguments[0]))
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(each in mode for each in "wax+")) or bool(
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            wrong = writes and isinstance(path, str | bytes | os.PathLike) and not _lies_in(path, inside)
        elif event in _WRITES:
            # Relative to an open folder, whose own opening was looked at.
            relative = isinstance(arguments[-1], int) and arguments[-1] >= 0 and event != "os.chmod"
            named = isinstance(arguments[0], str | bytes | os.PathLike) and not relative
            wrong = named and not _lies_in(arguments[0], inside)
        if wrong:
            busy = True
            say({"violation": f"{event} {ascii(arguments)[:300]}"})
            busy = False
            raise PermissionError(f"{event} is forbidden")

    sys.addaudithook(hook)


def _is_installed(library: Any) -> bool:
    # Packages load their own libraries when they are first used; nothing of an upload can lie there.
    # torch's CUDA build asks NVIDIA's own library for GPUs, by its plain name.
    known = (None, "libc.so.6", "libnvidia-ml.so.1")
    return library in known or _lies_in(library, os.path.realpath(sys.prefix) + os.sep)


def _lies_in(path: Any, inside: str) -> bool:
    return os.path.realpath(os.fsdecode(path)).startswith(inside) or os.fsdecode(path) == os.devnull

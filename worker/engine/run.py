"""The engine's process: warm up, wait for "go", turn DIR/in into DIR/out, report on the way.

    python -m worker.engine.run DIR

It prints Progress lines on stdout: first `ready`, when everything heavy is imported; then it waits for the line "go"
on stdin. The end of stdin instead of "go" ends it with 0. After "go" it says `started`, does what DIR/in/plan.json asks
and writes DIR/out/result.json, last and atomically. It exits with 0 when there is a result, be it an error that was
understood. SIGTERM ends it at once, whatever it is doing. The line "stop" ends it too, with 75, but lets a training
step write a checkpoint first.
"""

import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from pydantic import ValidationError

from app.recipes.plan import EngineError, EngineResult, Plan
from worker.engine.progress import Reporter, take_stdout


def main() -> int:
    """Run one action and return the exit status."""
    write = take_stdout()
    _end_on_signal()
    directory = Path(sys.argv[1]).resolve()
    _keep_caches_in(directory / "tmp")
    reporter = Reporter(write)

    from worker.engine import warming  # everything heavy: after stdout is safe, before the engine says it is ready

    warming.warm_up()
    reporter.ready()
    word = sys.stdin.readline()
    if word == "":
        return 0
    if word.strip() != "go":
        print(f"expected the line 'go' on stdin, got {word[:80]!r}", file=sys.stderr)
        return 2
    reporter.start()
    _write_result(directory / "out", _act(directory, reporter))
    return 0


def _act(directory: Path, reporter: Reporter) -> EngineResult:
    from worker.engine.actions import run_action
    from worker.engine.checkpoints.stop import StopRequest
    from worker.engine.errors import EngineFailure
    from worker.engine.failures import translate_failure

    path = directory / "in" / "plan.json"
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as failure:
        detail = f"{path.name} is not a plan: {failure}"[:8000]
        return EngineResult(
            error=EngineError(code="bad_plan", detail=detail, fix="Report this as a defect of Pare's worker.")
        )
    try:
        stop = StopRequest()
        stop.listen()
        result = run_action(plan, directory, reporter, stop)
    except Exception as failure:  # the edge of the process: every failure becomes a result
        error = translate_failure(failure, reporter.stage)
        if not isinstance(failure, EngineFailure) or failure.__cause__ is not None:
            traceback.print_exc()
        reporter.note(f"{error.code}: {error.detail}")
        return EngineResult(error=error)
    reporter.finish()
    return result


def _write_result(directory: Path, result: EngineResult) -> None:
    directory.mkdir(exist_ok=True)
    temporary = directory / "result.json.part"
    with temporary.open("wb") as file:
        file.write(result.model_dump_json().encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / "result.json")


def _keep_caches_in(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(directory)
    tempfile.tempdir = str(directory)


def _end_on_signal() -> None:
    # A Python handler would wait for the running operator to return; a thread woken by the C handler does not. And the
    # default action would not do: as process 1 of a namespace the engine would ignore SIGTERM.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing)

    def wait() -> None:
        # Other signals that have a handler in Python, such as a step's alarm, come through here too.
        while (number := os.read(reading, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
            pass
        os._exit(128 + number)

    threading.Thread(target=wait, name="end-on-signal", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())

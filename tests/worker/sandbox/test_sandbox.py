"""What each isolation lets an engine do, found out from inside."""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.worker.conftest import wait_until
from worker.sandbox import launcher
from worker.sandbox.detect import detect
from worker.sandbox.isolation import Isolation, Limits
from worker.sandbox.launch import SandboxProcess, remove_directory, start
from worker.sandbox.layout import PROJECT

LIMITS = Limits(memory_bytes=2**30, file_bytes=2**20, num_processes=40, num_files=64)
ALLOWED_VARIABLES = {
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE", "HOME", "LANG", "LOGNAME", "PATH", "PWD", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
    "PYTHONNOUSERSITE", "PYTHONPATH", "TMPDIR", "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "USER",
}  # fmt: skip


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    found = detect(request.param)
    if found.method != request.param:
        pytest.skip(f"{request.param} does not work on this machine: {found.problems}")
    return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "job"
    remove_directory(tmp_path / "job")


@pytest.fixture
def public() -> Iterator[Path]:
    """A copy of the code below /tmp, where the engine finds its own scratch, that every user may read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        checkout = Path(place) / "checkout"
        for package in ("app", "worker"):
            shutil.copytree(PROJECT / package, checkout / package)
        Path(place).chmod(0o755)
        yield checkout


def run(isolation: Isolation, job: Path, code: str, limits: Limits = LIMITS) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a sandbox."""
    sandbox = start(isolation, job, [sys.executable, "-S", "-c", code, "{job}"], limits)
    output, errors = sandbox.process.communicate(timeout=60)
    status = sandbox.kill(isolation.isolates)
    return subprocess.CompletedProcess([], status, output.decode(), errors.decode())


def probe(isolation: Isolation, job: Path, outside: Path, *, loopback: bool = False) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-S", "-m", "worker.sandbox.probe", "{job}", str(outside), port]
        sandbox = start(isolation, job, command, LIMITS, loopback=loopback)
        output, errors = sandbox.process.communicate(timeout=60)
        sandbox.kill(isolation.isolates)
    assert output, errors
    facts: dict[str, Any] = json.loads(output)
    return facts


def test_every_probe_is_denied(
    isolation: Isolation, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("PARE_DATABASE_URL", "postgresql://user:password@host/db")

    facts = probe(isolation, job, secret)

    denied = ("reads_outside", "reads_shadow", "writes_outside", "writes_system", "writes_in", "connects")
    assert [name for name in denied if facts[name]] == []
    assert facts["writes_out"]
    assert facts["writes_tmp"]
    assert facts["interfaces"] == []
    assert not facts["talks_within"]
    assert facts["processes"] <= 2
    assert set(facts["environment"]) <= ALLOWED_VARIABLES
    assert facts["capabilities"] == 0
    assert facts["no_new_privileges"]
    assert facts["seccomp"] == "2"
    if os.getuid() == 0:
        assert facts["user"] not in (0, os.getuid())


def test_processes_of_a_sandbox_talk_to_each_other_where_they_are_let(
    isolation: Isolation, job: Path, tmp_path: Path
) -> None:
    facts = probe(isolation, job, tmp_path / "secret", loopback=True)

    assert facts["talks_within"]
    assert not facts["connects"], "the loopback outside is another one"
    assert facts["interfaces"] == []


def test_the_probe_finds_what_is_open_without_isolation(job: Path, tmp_path: Path) -> None:
    bare = Isolation("none", own_user=False, user_namespace=False, landlock=False, seccomp=False, linux=True)
    secret = tmp_path / "secret"
    secret.write_text("secret")

    facts = probe(bare, job, secret)

    assert facts["reads_outside"]
    assert facts["writes_outside"]
    assert facts["writes_in"]
    assert facts["connects"]


def test_landlock_alone_closes_the_files_and_tcp(job: Path, tmp_path: Path) -> None:
    second = detect("none")
    if not second.landlock:
        pytest.skip("no Landlock in this kernel")
    secret = tmp_path / "secret"
    secret.write_text("secret")

    facts = probe(second, job, secret)

    open_ways = ("reads_outside", "reads_shadow", "writes_outside", "writes_system", "writes_in", "connects")
    assert [name for name in open_ways if facts[name]] == []
    assert not facts["talks_within"], "its network is everybody's"
    assert facts["writes_out"]


def test_two_sandboxes_run_as_different_users(isolation: Isolation, tmp_path: Path) -> None:
    if not isolation.own_user:
        pytest.skip("only root can change the user")
    users = []
    for name in ("a", "b", "c"):
        users.append(
            run(isolation, tmp_path / name, "import os; print(os.getuid(), os.getgid(), os.getgroups())").stdout
        )
        remove_directory(tmp_path / name)

    assert len(set(users)) > 1
    assert not any(user.startswith("0 ") for user in users)


def test_another_jobs_directory_cannot_be_seen(isolation: Isolation, job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "in"
    other.mkdir(parents=True)
    (other / "model.pt2").write_text("theirs")

    done = run(
        isolation, job, f"import os; print(os.path.exists({str(other)!r}), os.listdir('/job'), os.listdir('/tmp'))"
    )

    assert done.stdout.split(" ", 1)[0] == "False"
    assert "theirs" not in done.stdout


LIMIT_CASES = {
    "memory": ("x = bytearray(2**31)", "MemoryError"),
    "file size": ("open('/job/out/x', 'wb').write(b'x' * 2**21)", "File too large"),
    "open files": ("l = [open('/dev/null') for _ in range(100)]", "Too many open files"),
    "processes": ("import os\nwhile os.fork(): pass\nimport time; time.sleep(3)", "Resource temporarily unavailable"),
    "core dumps": ("import resource; print(resource.getrlimit(resource.RLIMIT_CORE)); 1/0", "ZeroDivisionError"),
    "namespaces": ("import ctypes; r = ctypes.CDLL(None).unshare(0x10000000); 1 / (r + 1)", "ZeroDivisionError"),
    "sockets beyond the network namespace": ("import socket; socket.socket(40, 1)", "Address family not supported"),
    "mounts": ("import ctypes as c; r = c.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None); 1 / (r + 1)", "ZeroDiv"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMIT_CASES)
def test_each_limit_holds(isolation: Isolation, job: Path, case: str) -> None:
    code, error = LIMIT_CASES[case]

    done = run(isolation, job, code)

    assert error in done.stderr
    assert done.returncode != 0


def test_killing_the_sandbox_ends_a_process_that_left_its_session(isolation: Isolation, job: Path) -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  print('out', flush=True)\n"
        "time.sleep(600)"
    )
    sandbox = start(isolation, job, [sys.executable, "-S", "-c", code, "{job}"], LIMITS)
    assert sandbox.process.stdout is not None
    assert sandbox.process.stdout.readline() == b"out\n"

    sandbox.kill(isolation.isolates)

    assert sandbox.process.stdout.read() == b"", "the last writer is gone"
    _close(sandbox)


def test_a_sandbox_that_is_killed_while_it_starts_leaves_no_process(isolation: Isolation, job: Path) -> None:
    marker = f"early-{uuid4().hex}"
    code = "import time; time.sleep(600)"
    for number in range(40):
        sandbox = start(isolation, job, [sys.executable, "-S", "-c", code, marker], LIMITS)
        time.sleep(number % 20 * 0.0005)
        sandbox.kill(isolation.isolates)
        _close(sandbox)
        remove_directory(job)
    wait_until(lambda: not _running(marker), 20, "the end of every process")


def test_a_sandbox_that_ends_while_it_is_killed(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = start(detect("none"), job, [sys.executable, "-S", "-c", "import time; time.sleep(600)"], LIMITS)

    def end(_: int) -> None:  # as Popen's own does where it finds that the process has ended: it is waited for
        monkeypatch.undo()
        sandbox.process.kill()
        sandbox.process.wait()

    monkeypatch.setattr(sandbox.process, "send_signal", end)
    assert sandbox.kill(isolated=True) == -signal.SIGKILL
    _close(sandbox)


@pytest.mark.parametrize("method", ["bubblewrap", "namespaces", "none"])
def test_a_sandbox_dies_with_the_process_that_started_it(method: str, tmp_path: Path) -> None:
    marker = f"orphan-{os.getpid()}-{method}"
    code = (
        "import sys, time; from pathlib import Path; from worker.sandbox.detect import detect;"
        "from worker.sandbox.launch import start; from worker.sandbox.isolation import Limits;"
        f"start(detect({method!r}), Path({str(tmp_path / 'job')!r}),"
        f"[sys.executable, '-S', '-c', 'import time; time.sleep(600)', {marker!r}], Limits(None, 2**20));"
        "print('started', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    deadline = time.monotonic() + 60
    # The engine itself: what starts it has the same words in its command line, earlier than its ties.
    while not _running(marker, first="-S") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _running(marker, first="-S")

    parent.kill()
    parent.wait()
    parent.stdout.close()

    end = time.monotonic() + 60
    while _running(marker) and time.monotonic() < end:
        time.sleep(0.02)
    assert _running(marker) == []
    remove_directory(tmp_path / "job")


def test_sigterm_reaches_the_engine_and_its_status_comes_back(isolation: Isolation, job: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); print('on', flush=True);"
        "time.sleep(600)"
    )
    sandbox = start(isolation, job, [sys.executable, "-S", "-c", code], LIMITS)
    assert sandbox.process.stdout is not None
    sandbox.process.stdout.readline()

    sandbox.terminate()

    assert sandbox.process.wait(60) == 42
    sandbox.kill(isolation.isolates)
    _close(sandbox)


@pytest.mark.parametrize("method", ["bubblewrap", "namespaces"])
def test_an_ordinary_user_gets_the_same_isolation(method: str, public: Path) -> None:
    python = Path("/usr/bin/python3")
    if os.getuid() != 0 or not python.exists():
        pytest.skip("only root can become an ordinary user, who needs a Python outside of /root")
    code = f"from worker.sandbox.detect import detect; i = detect({method!r}); print(i.method, i.own_user, i.problems)"
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(public)}
    done = subprocess.run(
        [*become, python, "-S", "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=False
    )

    assert done.stdout.startswith(f"{method} False"), done.stdout + done.stderr


def test_torch_and_onnxruntime_work_inside(isolation: Isolation, job: Path) -> None:
    code = (
        "import torch, onnxruntime, sys; m = torch.nn.Linear(4, 4);"
        "p = torch.export.export(m, (torch.randn(2, 4),)); torch.export.save(p, sys.argv[1] + '/out/m.pt2');"
        "print('fine')"
    )
    limits = Limits(memory_bytes=8 * 2**30, file_bytes=2**30)
    sandbox = start(isolation, job, [sys.executable, "-c", code, "{job}"], limits, num_threads=1)
    output, errors = sandbox.process.communicate(timeout=120)
    sandbox.kill(isolation.isolates)

    assert output == b"fine\n", errors
    assert (job / "out" / "m.pt2").stat().st_size > 0


def test_a_project_below_tmp_is_seen(isolation: Isolation, public: Path, tmp_path: Path) -> None:
    code = f"""
from worker.sandbox.detect import detect
from worker.sandbox.layout import PROJECT
found = detect({isolation.method!r})
assert str(PROJECT) == {str(public)!r}
print(found.method, found.own_user, found.user_namespace)
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(public)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [isolation.method, str(isolation.own_user), str(isolation.user_namespace)], (
        done.stderr
    )


def test_a_directory_is_refused_that_is_in_use(isolation: Isolation, job: Path) -> None:
    run(isolation, job, "pass")

    with pytest.raises(FileExistsError):
        run(isolation, job, "pass")


def _close(sandbox: SandboxProcess) -> None:
    for pipe in (sandbox.process.stdin, sandbox.process.stdout, sandbox.process.stderr):
        if pipe is not None:
            pipe.close()


def _running(marker: str, first: str | None = None) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marker.encode() in words and (first is None or words[1:3] == [first.encode(), b"-c"]):
                found.append(entry.name)
    return found


def test_nothing_is_mounted_in_the_namespaces_of_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An `unshare` or `bwrap` that does nothing: as root, the new root would become that of the whole machine."""
    entered: list[Any] = []
    monkeypatch.setattr(launcher, "build_root", lambda **root: entered.append(root))
    outside = {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "pid")}
    with pytest.raises(OSError, match=r"namespaces of its own \(mnt, pid\)"):
        launcher.confine({"outside": outside, "root": {}})
    assert not entered


def test_a_sandbox_shares_no_namespace_with_us(isolation: Isolation, job: Path) -> None:
    names = ("mnt", "pid", "net", "ipc", "uts")
    done = run(isolation, job, f"import os; print([os.readlink(f'/proc/self/ns/{{n}}') for n in {names}])")
    inside = ast.literal_eval(done.stdout)
    assert not set(inside) & {str(Path(f"/proc/self/ns/{name}").readlink()) for name in names}

"""Find out which isolation works on this machine by trying it: a probe really runs in each one, best first."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from worker.sandbox import bubblewrap, namespaces
from worker.sandbox.isolation import Isolation, Limits, Method
from worker.sandbox.launch import remove_directory, start

_PROBE_SECONDS = 20.0
_LIMITS = Limits(memory_bytes=4 * 2**30, file_bytes=2**20)


@cache
def detect(requested: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto") -> Isolation:
    """Return the best isolation that works here, or the requested one if it does, else the one called `none`."""
    problems: list[str] = []
    for method in _candidates(requested):
        for isolation in _variants(method):
            problem = _try(isolation)
            if problem is None:
                return _with_problems(isolation, problems)
            problems.append(f"{method}: {problem}")
    plain = Isolation("none", own_user=False, user_namespace=False, landlock=False, seccomp=False, linux=_is_linux())
    for isolation in (_second_layers(plain), plain):
        if _probe(isolation)[0] is not None:
            return _with_problems(isolation, problems)
    raise RuntimeError(f"no process can be started as an engine here: {_probe(plain)[1]}")


def _with_problems(isolation: Isolation, problems: list[str]) -> Isolation:
    return Isolation(**{**vars(isolation), "problems": tuple(problems)})


def _is_linux() -> bool:
    return sys.platform == "linux"


def _candidates(requested: str) -> list[Method]:
    if not _is_linux() or requested == "none":
        return []
    wanted: list[Method] = ["bubblewrap", "namespaces"]
    return [method for method in wanted if requested in ("auto", method)]


def _second_layers(isolation: Isolation) -> Isolation:
    if not _is_linux():
        return isolation
    from worker.sandbox.kernel import landlock_version
    from worker.sandbox.seccomp import build_filter

    layers = {"landlock": landlock_version() > 0, "seccomp": build_filter() is not None}
    return Isolation(**{**vars(isolation), **layers})


def _variants(method: Method) -> list[Isolation]:
    """Root changes to a user of its own; others, and roots of containers without that right, get a user namespace."""
    installed = bubblewrap.is_installed() if method == "bubblewrap" else namespaces.is_installed()
    if not installed:
        return []
    variants = []
    for own_user in (True, False) if os.getuid() == 0 else (False,):
        bare = Isolation(method, own_user, user_namespace=not own_user, landlock=False, seccomp=False, linux=True)
        full = _second_layers(bare)
        variants += [full, replace(full, shared_proc=True)]
    return variants


def _try(isolation: Isolation) -> str | None:
    """Return why this isolation does not hold here, None when it does."""
    facts, output = _probe(isolation)
    if facts is None:
        return output
    wrong = [name for name in ("reads_outside", "reads_shadow", "writes_outside", "writes_system", "writes_in",
                               "connects", "interfaces", "reads_processes") if facts[name]]  # fmt: skip
    wrong += [f"not {name}" for name in ("writes_out", "writes_tmp", "no_new_privileges") if not facts[name]]
    wrong += ["capabilities"] if facts["capabilities"] else []
    wrong += ["sees other processes"] if facts["processes"] > 3 and not isolation.shared_proc else []
    return f"the probe found: {', '.join(wrong)}" if wrong else None


def _probe(isolation: Isolation) -> tuple[dict[str, Any] | None, str]:
    """Run the probe; return what it found, or None and the reason."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pare-probe-")))
        secret = place / "secret"
        secret.write_text("secret")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        job = place / "job"
        stack.callback(remove_directory, job)
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-S", "-m", "worker.sandbox.probe", "{job}", str(secret), port]
        sandbox = start(isolation, job, command, _LIMITS)
        try:
            output, errors = sandbox.process.communicate(timeout=_PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return None, "the probe did not answer"
        finally:
            sandbox.kill(isolation.isolates)
        with contextlib.suppress(ValueError):
            facts: dict[str, Any] = json.loads(output)
            return facts, ""
        return None, errors.decode(errors="replace").strip()[-300:] or f"exit status {sandbox.exit_status()}"

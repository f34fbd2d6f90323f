"""A Docker engine and a composed service, as the tests speak to them."""

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0

T = TypeVar("T")


def call(*command: str, check: bool = True, seconds: float = 1200.0, env: dict[str, str] | None = None) -> str:
    """Run a command in the project's root and return what it printed; its complaint is the failure's text."""
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if check and run.returncode != 0:
        pytest.fail(f"{shlex.join(command)} -> {run.returncode}\n{run.stdout[-6000:]}\n{run.stderr[-6000:]}")
    return run.stdout


def wait_for(what: str, seconds: float, look: Callable[[], T | None]) -> T:
    """Look again and again until there is an answer."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.25)


@dataclass(frozen=True)
class Images:
    """The tags of what was built."""

    service: str
    worker: str


@dataclass(frozen=True)
class Stack:
    """The composed service, seen from outside."""

    project: str
    url: str
    environment: dict[str, str]

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Call Compose, version 2 where there is one."""
        program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        return call(*program, "--project-name", self.project, *arguments, check=check, env=self.environment)

    def containers(self, service: str) -> list[str]:
        """Return the ids of the running containers of a service."""
        return self.compose("ps", "--quiet", service).split()

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what the engine knows about a container."""
        found: list[dict[str, Any]] = json.loads(call("docker", "inspect", container))
        return found[0]

    def execute(self, container: str, *command: str) -> str:
        """Run a command inside a container as the container's own user."""
        return call("docker", "exec", container, *command)


def find_free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def run_stack(images: Images, *up: str, **environment: str) -> Iterator[Stack]:
    """Bring the composed service up, and take it down again; `up` are more arguments, such as services to start."""
    port = find_free_port()
    environment = {
        "PARE_SERVICE_IMAGE": images.service,
        "PARE_WORKER_IMAGE": images.worker,
        "PARE_POSTGRES_PASSWORD": secrets.token_hex(16),
        "PARE_BROKER_PASSWORD": secrets.token_hex(16),
        "PARE_PUBLISH": f"127.0.0.1:{port}",
        "PARE_ENGINE_THREADS": "1",
        **environment,
    }
    stack = Stack(f"pare-test-{secrets.token_hex(4)}", f"http://127.0.0.1:{port}", environment)
    try:
        stack.compose("up", "--detach", "--no-build", *up)
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "60", check=False)[-40_000:])
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "10", check=False)

"""Images built by a real engine and the composed service, brought up once and always taken down."""

import os
import secrets
import shlex
import socket
from collections.abc import Iterator

import pytest

from tests.docker.composed import Images, Stack, call


@pytest.fixture(scope="session")
def images() -> Images:
    call("docker", "info", seconds=30)
    options = shlex.split(os.environ.get("DOCKER_BUILD_ARGS", ""))
    for target in ("service", "worker"):
        call(
            "docker",
            "build",
            *options,
            "--target",
            target,
            "--tag",
            f"pare-{target}:test",
            ".",
            env={"DOCKER_BUILDKIT": "1"},
        )
    return Images("pare-service:test", "pare-worker:test")


@pytest.fixture(scope="session")
def stack(images: Images) -> Iterator[Stack]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "PARE_SERVICE_IMAGE": images.service,
        "PARE_WORKER_IMAGE": images.worker,
        "PARE_POSTGRES_PASSWORD": secrets.token_hex(16),
        "PARE_BROKER_PASSWORD": secrets.token_hex(16),
        "PARE_PUBLISH": f"127.0.0.1:{port}",
        "PARE_ENGINE_THREADS": "1",
    }
    stack = Stack(f"pare-test-{secrets.token_hex(4)}", f"http://127.0.0.1:{port}", environment)
    try:
        stack.compose("up", "--detach", "--no-build", "--scale", "worker=2")
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "60", check=False)[-40_000:])
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "10", check=False)

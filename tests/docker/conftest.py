"""Images built by a real engine and the composed service, brought up once and always taken down."""

import os
import shlex
from collections.abc import Iterator

import pytest

from tests.docker.composed import Images, Stack, call, run_stack


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
    with run_stack(images, "--scale", "worker=2") as stack:
        yield stack

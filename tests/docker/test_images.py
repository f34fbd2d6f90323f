"""What is in the images, and what is not."""

import pytest

from tests.docker.composed import Images, call

pytestmark = pytest.mark.docker


def run(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    return call("docker", "run", "--rm", "--network", "none", *options, image, *command)


def test_service_image_has_no_torch_and_no_tools(images: Images) -> None:
    code = (
        "import importlib.util as u, shutil; "
        "print([n for n in ('torch','numpy','onnxruntime','pip','setuptools') if u.find_spec(n)], "
        "[n for n in ('gcc','make','git','bwrap') if shutil.which(n)])"
    )
    assert run(images.service, "python", "-c", code).split() == ["[]", "[]"]


def test_service_image_has_what_api_and_dispatcher_import_late(images: Images) -> None:
    run(images.service, "python", "-c", "import app.main, worker.dispatch, kombu.transport.redis, psycopg, uvicorn")


def test_worker_image_has_torch_and_bubblewrap_but_no_tools(images: Images) -> None:
    code = (
        "import importlib.util as u, shutil; "
        "print([n for n in ('torch','onnxruntime','pip') if u.find_spec(n)], "
        "[n for n in ('gcc','make','git','bwrap') if shutil.which(n)])"
    )
    assert run(images.worker, "python", "-c", code).strip() == "['torch', 'onnxruntime'] ['bwrap']"


@pytest.mark.parametrize("name", ["service", "worker"])
def test_image_runs_as_a_user_that_owns_only_its_data(images: Images, name: str) -> None:
    code = (
        "import os; print(os.getuid(), os.getgid(), "
        "[p for p in ('/', '/opt/pare', '/usr', '/etc', '/var/lib/pare') if os.access(p, os.W_OK)])"
    )
    assert run(getattr(images, name), "python", "-c", code).strip() == "10001 10001 ['/var/lib/pare']"


def test_worker_image_under_the_engines_own_profile_finds_no_isolation(images: Images) -> None:
    """Fail closed: without docker/seccomp-worker.json there are no namespaces, and the worker must know it."""
    code = "from worker.sandbox.detect import detect; print(detect('auto').method)"
    options = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp")
    assert run(images.worker, "python", "-c", code, options=options).strip() == "none"

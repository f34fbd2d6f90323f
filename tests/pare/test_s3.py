"""Downloads by links into a bucket: verified, and resumed, like those from the service itself."""

import random
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from pare.client import Client
from pare.errors import TransferCorrupt
from pare.records import Artifact

CONTENT = random.Random(0).randbytes(2_000_000)


@pytest.fixture
def service_settings(service_settings: Settings, s3_url: str) -> Settings:
    return service_settings.model_copy(update={"storage_url": s3_url})


@pytest.fixture
def artifact(client: Client, hands: Any, model_id: str) -> Artifact:
    job = client.jobs.submit(model_id, {"steps": [{"kind": "prune_magnitude"}]})
    hands.run(job.id, {"model.onnx": CONTENT})
    (artifact,) = client.jobs.artifacts(job.id)
    return artifact


def test_download_follows_the_link_and_goes_on_with_what_is_there(
    client: Client, artifact: Artifact, tmp_path: Path
) -> None:
    assert client.artifacts.download(artifact, tmp_path / "one").read_bytes() == CONTENT

    (tmp_path / "two").mkdir()
    (tmp_path / "two" / f".model.onnx.{artifact.sha256[:16]}.partial").write_bytes(CONTENT[:1_500_000])
    seen: list[int] = []
    path = client.artifacts.download(artifact, tmp_path / "two", on_bytes=lambda done, _: seen.append(done))
    assert path.read_bytes() == CONTENT
    assert seen[0] > 1_500_000

    (tmp_path / "three").mkdir()
    (tmp_path / "three" / f".model.onnx.{artifact.sha256[:16]}.partial").write_bytes(bytes(1000))
    with pytest.raises(TransferCorrupt):
        client.artifacts.download(artifact, tmp_path / "three")

"""Files over a good and a bad wire: verified both ways, resumed where they broke, never half there under their name."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from pare.client import Client
from pare.errors import NotReachable, TooLarge, TransferCorrupt, UsageError
from pare.records import Artifact

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def artifact(client: Client, hands: Any, model_id: str) -> Artifact:
    job = client.jobs.submit(model_id, {"steps": [{"kind": "prune_magnitude"}]})
    hands.run(job.id, {"model.onnx": CONTENT})
    (artifact,) = client.jobs.artifacts(job.id)
    return artifact


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_download_is_verified_and_shows_its_progress(client: Client, artifact: Artifact, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = client.artifacts.download(artifact, tmp_path / "out", on_bytes=lambda *numbers: seen.append(numbers))

    assert path.read_bytes() == CONTENT
    assert _files(tmp_path / "out") == ["model.onnx"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_cut_download_goes_on_where_it_was(wire: Any, artifact: Artifact, tmp_path: Path) -> None:
    wire.cut_after = [1_000_000, 700_000, 200]
    with Client(wire.url) as client:
        path = client.artifacts.download(artifact, tmp_path / "out")

    assert path.read_bytes() == CONTENT
    ranges = [
        line for sent in wire.requests for line in sent.decode().splitlines() if line.lower().startswith("range:")
    ]
    starts = [int(line.split("=")[1].rstrip("-")) for line in ranges]
    assert len(starts) >= 2
    assert 0 < starts[0] <= 1_000_000 < starts[1] <= 1_700_000


def test_a_later_call_goes_on_with_what_is_there(client: Client, wire: Any, artifact: Artifact, tmp_path: Path) -> None:
    wire.cut_after = [1_500_000, *[100] * 50]
    with Client(wire.url) as broken, pytest.raises(NotReachable):
        broken.artifacts.download(artifact, tmp_path / "out")
    (partial,) = (tmp_path / "out").iterdir()
    assert partial.name.endswith(".partial")
    begun = partial.stat().st_size
    assert 0 < begun < len(CONTENT)

    seen: list[int] = []
    path = client.artifacts.download(artifact, tmp_path / "out", on_bytes=lambda done, _: seen.append(done))
    assert path.read_bytes() == CONTENT
    assert seen[0] > begun
    assert _files(tmp_path / "out") == ["model.onnx"]


def test_changed_bytes_never_get_the_files_name(wire: Any, artifact: Artifact, tmp_path: Path) -> None:
    # One byte value becomes another: the length stays, the digest does not. Headers hold no such byte.
    wire.change = lambda piece: piece.replace(b"\xfe", b"\xff")
    with Client(wire.url) as client, pytest.raises(TransferCorrupt) as caught:
        client.artifacts.download(artifact, tmp_path / "out")

    assert artifact.sha256 in caught.value.detail
    assert _files(tmp_path / "out") == []


def test_a_wrong_partial_file_is_found_out_and_the_next_call_succeeds(
    client: Client, artifact: Artifact, tmp_path: Path
) -> None:
    partial = tmp_path / f".model.onnx.{artifact.sha256[:16]}.partial"
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(TransferCorrupt):
        client.artifacts.download(artifact, tmp_path)

    assert client.artifacts.download(artifact, tmp_path).read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_begun_again(client: Client, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / f".model.onnx.{artifact.sha256[:16]}.partial").write_bytes(bytes(len(CONTENT) + 5))

    assert client.artifacts.download(artifact, tmp_path).read_bytes() == CONTENT


def test_a_file_that_is_there_and_right_is_not_fetched_again(wire: Any, artifact: Artifact, tmp_path: Path) -> None:
    with Client(wire.url) as client:
        client.artifacts.download(artifact, tmp_path)
        before = wire.num_connections, len(wire.requests)
        client.artifacts.download(artifact, tmp_path)
    assert (wire.num_connections, len(wire.requests)) == before

    (tmp_path / "model.onnx").write_bytes(bytes(len(CONTENT)))
    with Client(wire.url) as client:
        assert client.artifacts.download(artifact, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", ".hidden", "a\\b", ""])
def test_a_name_that_leads_elsewhere_is_refused(client: Client, artifact: Artifact, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain file name"):
        client.artifacts.download(replace(artifact, name=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_upload_that_arrives_changed_is_reported_with_its_id(wire: Any, tmp_path: Path) -> None:
    # The service answers with the digest of what it got; here the answer's digest is changed on its way.
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK" + bytes(100))
    with Client(wire.url) as client:
        digest = client.models.upload(file).sha256.encode()
        wire.change = lambda piece: piece.replace(digest, b"0" * 64)
        with pytest.raises(TransferCorrupt) as caught:
            client.models.upload(file)
        wire.change = bytes
        assert client.models.list()[0].id in caught.value.detail


def test_an_upload_over_the_limit_says_the_limit(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "big.npz"
    numpy.savez(file, x=numpy.random.default_rng(0).random(700_000))
    with pytest.raises(TooLarge) as caught:
        client.datasets.upload(file)

    assert "5000000" in caught.value.detail.replace(",", "").replace("_", "")
    assert client.datasets.list() == ()


def test_an_upload_of_nothing_is_a_usage_error(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.pt2 is not a file"):
        client.models.upload(tmp_path / "missing.pt2")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"neither \.npz, \.safetensors"):
        client.datasets.upload(tmp_path / "data.csv")

"""What only a store in a bucket has: its URL, its links."""

from urllib.parse import urlsplit

import pytest

from app.errors import ConfigurationError, Unavailable
from app.storage import open_storage
from tests.app.storage.conftest import OWNER, put


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://", "bucket"),
        ("s3:///prefix", "bucket"),
        ("s3://key:secret@bucket/x", "bucket alone"),
        ("s3://bucket/x?endpont=http://host", "endpont"),
    ],
)
def test_urls_that_make_no_sense_are_refused_without_their_secrets(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        open_storage(url)
    assert "secret" not in caught.value.detail
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.fix


def test_prefixes_of_a_bucket_are_stores_of_their_own(s3_url: str) -> None:
    one, other = (open_storage(s3_url.replace("/pare?", f"/{name}?")).section(OWNER) for name in ("a/b", "c"))
    blob = put(one, b"x")
    assert one.exists(blob.sha256)
    assert not other.exists(blob.sha256)


def test_links_go_where_clients_reach_the_store(s3_url: str) -> None:
    section = open_storage(f"{s3_url}&public_endpoint=https://files.example.com").section(OWNER)
    blob = put(section, b"x")
    link = section.link(blob.sha256, 60)
    assert link is not None
    assert urlsplit(link).netloc == "files.example.com"


def test_store_on_a_disk_has_no_links(tmp_path_factory: pytest.TempPathFactory) -> None:
    section = open_storage(tmp_path_factory.mktemp("store").as_uri()).section(OWNER)
    assert section.link(put(section, b"x").sha256, 60) is None


def test_bucket_that_is_not_there_is_unavailable(s3_url: str) -> None:
    storage = open_storage(s3_url.replace("s3://", "s3://no-"))
    with pytest.raises(Unavailable):
        put(storage.section(OWNER), b"x")
    with pytest.raises(Unavailable):
        storage.ping()

"""Webhooks reach public addresses alone, however an address is written (server-side request forgery)."""

import ipaddress
from functools import partial
from pathlib import Path

import pytest

from app.settings import Settings
from app.webhooks.addresses import DestinationRefused, Destinations, is_public, resolve_name

PRIVATE = (
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.8", "192.0.0.170", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "3fff::1", "5f00::1",
    "fc00::1", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "fe80::1%lo",
)  # fmt: skip
PUBLIC = ("1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "198.20.0.1", "2606:4700::1111", "2001:4860:4860::8888")
NUMERIC = ("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0x7f000001", "[::1]", "[::ffff:7f00:1]")


def answer(addresses: list[str], _host: str, _port: int) -> list[str]:
    return addresses


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str, settings: Settings) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["8.8.8.8", address]):
        destinations = Destinations(settings, partial(answer, addresses))
        with pytest.raises(DestinationRefused):
            destinations.resolve("example.com", 443)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_public(address: str, settings: Settings) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert Destinations(settings, lambda _host, _port: [address]).resolve("example.com", 443) == [address]


@pytest.mark.parametrize("host", NUMERIC)
def test_other_spellings_of_loopback_are_resolved_before_they_are_judged(host: str, settings: Settings) -> None:
    destinations = Destinations(settings)  # the system's own resolver
    with pytest.raises(DestinationRefused):
        destinations.resolve(*destinations.check_url(f"https://{host}/"))


def test_spellings_in_other_digits_are_no_url(settings: Settings) -> None:
    assert resolve_name("\u2460\u2461\u2466.0.0.1", 443) == ["127.0.0.1"], "the system's resolver takes them"
    with pytest.raises(DestinationRefused, match="ASCII"):
        Destinations(settings).check_url("https://\u2460\u2461\u2466.0.0.1/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/", "scheme"),
        ("ftp://example.com/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("gopher://example.com/", "scheme"),
        ("//example.com/", "scheme"),
        ("https:///path", "host"),
        ("https://user@example.com/", "user name"),
        ("https://user:word@example.com/", "user name"),
        ("https://example.com@127.0.0.1/", "user name"),
        ("https://example.com:22/", "port"),
        ("https://example.com:6379/", "port"),
        ("https://example.com:0/", "port"),
        ("https://example.com:99999/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com/a b", "printable"),
        ("https://example.com/\r\nX: y", "printable"),
        ("https://example.com\\@127.0.0.1/", "printable"),
        ("https://example.com/" + "a" * 2048, "at most"),
    ],
)
def test_urls_that_are_refused(url: str, reason: str, settings: Settings) -> None:
    with pytest.raises(DestinationRefused, match=reason):
        Destinations(settings).check_url(url)


def test_a_name_that_is_not_there_is_answered_like_one_inside(settings: Settings) -> None:
    def nothing(_host: str, _port: int) -> list[str]:
        raise OSError

    answers = set()
    for resolve in (nothing, partial(answer, []), partial(answer, ["10.0.0.1"])):
        with pytest.raises(DestinationRefused) as refused:
            Destinations(settings, resolve).resolve("db.internal", 443)
        answers.add(str(refused.value))
    assert len(answers) == 1


def test_the_operator_can_allow_a_network(settings: Settings, tmp_path: Path) -> None:
    allowed = Settings(
        data_dir=tmp_path, webhook_schemes=("http",), webhook_ports=(8080,),
        webhook_networks=(ipaddress.IPv4Network("10.1.2.0/24"),),
    )  # fmt: skip
    destinations = Destinations(allowed, lambda host, _port: [host])
    assert destinations.check_url("http://10.1.2.3:8080/x") == ("10.1.2.3", 8080)
    assert destinations.resolve("10.1.2.3", 8080) == ["10.1.2.3"]
    for address in ("10.1.3.1", "127.0.0.1", "::ffff:10.1.2.3"):
        with pytest.raises(DestinationRefused):
            destinations.resolve(address, 8080)
    assert settings.webhook_networks == ()

"""Webhooks from the client and the command line, against a real service."""

import json

import pytest

from pare import verify_webhook
from pare.cli import run
from pare.client import Client
from pare.errors import Conflict, InvalidRequest
from pare.webhooks import Delivery

URL = "https://8.8.8.8/hook"


def test_the_client_does_everything_with_a_webhook(client: Client) -> None:
    created = client.webhooks.create(URL, events=["job.failed"], jobs="named", description="mine")
    assert created.secret is not None
    assert created.secret not in repr(created)
    assert client.webhooks.get(created.id).secret is None
    assert [hook.id for hook in client.webhooks.list()] == [created.id]
    assert client.webhooks.change(created.id, enabled=False).disabled_reason == "by_owner"
    with pytest.raises(Conflict):
        client.webhooks.test(created.id)
    client.webhooks.change(created.id, enabled=True)
    sent = client.webhooks.test(created.id)
    assert (sent.type, sent.state, sent.attempts) == ("webhook.test", "pending", ())
    assert client.webhooks.deliveries(created.id) == (sent,)
    again = client.webhooks.redeliver(created.id, sent.id)
    assert isinstance(again, Delivery)
    assert client.webhooks.delivery(created.id, sent.id).id == again.id
    assert client.webhooks.rotate(created.id, overlap_seconds=60).secret != created.secret
    client.webhooks.delete(created.id)
    assert client.webhooks.list() == ()
    with pytest.raises(InvalidRequest):
        client.webhooks.create("https://127.0.0.1/")


def test_the_command_line_does_it_too(
    capsys: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, code: int = 0) -> str:
        assert run(["webhooks", *arguments]) == code
        return capsys.readouterr().out

    created = json.loads(call("create", URL, "--event", "job.failed", "--jobs", "named", "-o", "json"))
    assert created["events"] == ["job.failed"]
    assert "whsec_" not in call("get", created["id"])
    assert created["id"] in call("list")
    assert "disabled (by_owner)" in call("change", created["id"], "--disable")
    assert "enabled" in call("change", created["id"], "--enable")
    delivery = json.loads(call("test", created["id"], "-o", "json"))
    assert "webhook.test" in call("deliveries", created["id"])
    assert "pending" in call("redeliver", created["id"], delivery["id"])
    assert "whsec_" in call("rotate", created["id"])
    call("create", "http://10.0.0.1/", code=4)
    call("delete", created["id"])


def test_the_check_for_receivers_is_part_of_the_package() -> None:
    assert callable(verify_webhook)

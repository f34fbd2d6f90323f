"""Messages leave the dispatcher: to a real receiver, at least once, with the same id after a crash."""

import json
import socket
from typing import Any

import pytest
from sqlalchemy import select, update

from app.db.clock import db_now
from app.db.tables import DeliveryRow
from app.jobs import cancel_job
from app.webhooks.deliveries import send_test
from app.webhooks.endpoints import create_endpoint
from pare.webhooks import verify_webhook
from tests.app.webhooks.receiver import Receiver, say
from tests.worker.conftest import Bench, Start, wait_until

pytestmark = pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)


def add_endpoint(bench: Bench, url: str) -> tuple[str, str]:
    with bench.database.session() as session:
        row = create_endpoint(session, owner="local", url=url, description="", events=["job.cancelled"], jobs="all")
        return row.id, row.secret


def stay_silent(connection: socket.socket) -> None:
    connection.recv(1)


def allow(*ports: int) -> dict[str, str]:
    return {
        "PARE_WEBHOOK_SCHEMES": '["http"]',
        "PARE_WEBHOOK_PORTS": json.dumps(ports),
        "PARE_WEBHOOK_NETWORKS": '["127.0.0.0/8"]',
    }


def messages(bench: Bench) -> list[Any]:
    with bench.database.read() as session:
        return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.created_at)))


def test_a_message_is_sent_while_others_wait_for_silent_receivers(bench: Bench, start: Start) -> None:
    silent = [Receiver(stay_silent) for _ in range(3)]
    with silent[0], silent[1], silent[2], Receiver(say(200)) as receiver:
        for each in silent:
            add_endpoint(bench, each.url)
        _, secret = add_endpoint(bench, receiver.url)
        job_id = bench.queue()
        with bench.database.session() as session:
            cancel_job(session, "local", job_id)
        start("worker.dispatch", wait=False, **allow(receiver.port, *(each.port for each in silent)))
        wait_until(lambda: receiver.received, what="the message")
        (got,) = receiver.received
        message = verify_webhook(secret, got.headers, got.body)
        assert message["data"]["job_id"] == job_id
        assert message["type"] == "job.cancelled"
        wait_until(lambda: [row.state for row in messages(bench)].count("delivered") == 1, what="the note")


def test_a_dispatcher_killed_between_sending_and_noting_sends_again_with_the_same_id(
    bench: Bench, start: Start
) -> None:
    dispatchers: list[Any] = []

    def kill_the_sender(connection: socket.socket) -> None:
        if len(receiver.received) == 1:
            dispatchers[0].process.kill()
            dispatchers[0].process.wait(30)
        else:
            say(204)(connection)

    with Receiver(kill_the_sender) as receiver:
        webhook_id, secret = add_endpoint(bench, receiver.url)
        dispatchers.append(start("worker.dispatch", wait=False, **allow(receiver.port)))
        with bench.database.session() as session:
            send_test(session, "local", webhook_id)
        wait_until(lambda: dispatchers[0].process.poll() is not None, what="the end of the dispatcher")
        (row,) = messages(bench)
        assert (row.state, row.num_attempts) == ("pending", 1)
        with bench.database.session() as session:
            session.execute(update(DeliveryRow).values(lease_until=db_now(-1)))
        start("worker.dispatch", wait=False, **allow(receiver.port))
        wait_until(lambda: messages(bench)[0].state == "delivered", what="the delivery")
        first, second = receiver.received
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == row.id
        assert first.body == second.body
        assert verify_webhook(secret, second.headers, second.body)["type"] == "webhook.test"

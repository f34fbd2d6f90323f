"""The dispatcher's senders of webhooks: a thread for each message on its way, so that none waits for another."""

import threading
import time

import structlog

from app.db.session import Database
from app.errors import PareError
from app.webhooks.deliveries import claim_due, deliver_one, is_due
from app.webhooks.sending import Parcel, Sender

MAX_COURIERS = 8
_log = structlog.get_logger(__name__)


class Couriers:
    """Those that are under way."""

    def __init__(self, database: Database, sender: Sender) -> None:
        self._database = database
        self._sender = sender
        self._threads: list[threading.Thread] = []

    def send_due(self) -> int:
        """Send what is due, as far as there are couriers; return how many went."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        num_free = MAX_COURIERS - len(self._threads)
        with self._database.read() as session:
            due = num_free > 0 and is_due(session)
        if not due:
            return 0
        with self._database.session() as session:
            parcels = claim_due(session, num_free)
        for parcel in parcels:
            # A daemon: a receiver that answers nothing must not keep the process. The message's lease runs out then.
            thread = threading.Thread(target=self._deliver, args=(parcel,), daemon=True, name=parcel.delivery_id)
            self._threads.append(thread)
            thread.start()
        return len(parcels)

    def join(self, seconds: float) -> None:
        """Wait for those under way."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _deliver(self, parcel: Parcel) -> None:
        try:
            deliver_one(self._database, self._sender.send, parcel)
        except PareError as error:
            _log.warning(
                "what came of a webhook could not be written down", delivery=parcel.delivery_id, error=error.code
            )

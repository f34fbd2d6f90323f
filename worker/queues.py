"""The queues of hints: one for each device kind."""

from collections.abc import Iterable


def name_queue(device: str) -> str:
    """Return the queue in which the hints for jobs of a device kind stand."""
    return f"pare.{device}"


def name_queues(devices: Iterable[str]) -> str:
    """Return the queues of several kinds as Celery's command line takes them."""
    return ",".join(name_queue(device) for device in devices)

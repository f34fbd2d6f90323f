"""What the API process counts about itself for Prometheus: requests by route, method and status, and their time."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""The route of requests for paths that are not there; a path itself would be a label that anybody can make up."""
BUCKETS_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)


class Measures:
    """The counters of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self._requests = Counter("pare_http_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "pare_http_request_seconds",
            "Time from the request's head to the end of its answer; that of an event stream is its whole life.",
            ("route", "method"),
            buckets=BUCKETS_SECONDS,
            registry=self._registry,
        )

    def note_request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Count one request; `status` 499 means that the client went away first."""
        method = method if method in METHODS else "OTHER"
        self._requests.labels(route or UNMATCHED, method, str(status)).inc()
        self._seconds.labels(route or UNMATCHED, method).observe(seconds)

    def render(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._registry)

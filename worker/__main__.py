"""`python -m worker`: a Celery worker with every option set."""

import sys

from app.errors import PareError
from app.logs import configure_logs
from worker.queues import name_queues


def main() -> None:
    """Run until stopped."""
    try:
        from worker.celery_app import app, shares  # it reads the settings
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        raise SystemExit(1) from None
    configure_logs("worker")  # Celery does it too, but later than it warns
    queues = name_queues(shares[0].accepts)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["--quiet", "worker", "--loglevel", "INFO", "--queues", queues, "--hostname", "pare@%h", *quiet])


if __name__ == "__main__":
    main()

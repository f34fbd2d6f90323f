"""`python -m worker`: a Celery worker with every option set."""

from worker.celery_app import app, shares
from worker.queues import name_queues


def main() -> None:
    """Run until stopped."""
    queues = name_queues(shares[0].accepts)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", "--loglevel", "INFO", "--queues", queues, "--hostname", "pare@%h", *quiet])


if __name__ == "__main__":
    main()

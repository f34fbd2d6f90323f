"""`python -m worker`: a Celery worker with every option set."""

from worker.celery_app import app
from worker.presence import QUEUE


def main() -> None:
    """Run until stopped."""
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", "--loglevel", "INFO", "--queues", QUEUE, "--hostname", "pare@%h", *quiet])


if __name__ == "__main__":
    main()

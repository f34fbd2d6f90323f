"""`python -m worker.health`: exit 0 when a worker of this host is alive and takes jobs; for container health checks."""

import socket
import sys

from app.db.session import Database
from app.errors import PareError
from app.jobs import list_workers
from app.settings import load_settings


def find_problem() -> str | None:
    """Return what is wrong with the workers of this host, None when one of them serves."""
    settings = load_settings()
    database = Database(settings.database_url, num_connections=1)
    try:
        with database.read() as session:
            seen = list_workers(session, settings.worker_seen_seconds)
    except PareError as error:
        return f"{error.code}: {error.detail}"
    finally:
        database.dispose()
    here = [row.facts for row in seen if row.host == socket.gethostname()[:255]]
    if not here:
        return f"no worker of {socket.gethostname()} was seen in the last {settings.worker_seen_seconds:g} s"
    if not any(facts.get("accepts_jobs") for facts in here):
        return f"the workers of {socket.gethostname()} take no jobs: {here[0]}"
    return None


def main() -> None:
    """Print the problem, if any, and exit accordingly."""
    problem = find_problem()
    if problem is not None:
        sys.exit(problem)


if __name__ == "__main__":
    main()

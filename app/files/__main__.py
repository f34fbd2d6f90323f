"""`python -m app.files collect|scrub|reconcile`: look after the store named by the settings."""

import argparse
import sys
from collections.abc import Iterable

from app.db.session import Database
from app.errors import PareError
from app.files.check import Finding, reconcile, scrub
from app.files.collect import collect
from app.settings import load_settings
from app.storage import open_storage

_DESCRIPTION = "Look after the store. Exits with 1 where a file that is needed is not right, with 2 on errors."


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m app.files", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="remove files that nothing needs any more, now")
    collecting.add_argument("--grace-seconds", type=float, help="leave files alone that are younger than this")
    commands.add_parser("scrub", help="read every file; put those that have rotted into quarantine")
    commands.add_parser("reconcile", help="compare rows and files, as after a restore; changes nothing")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings()
        database = Database(settings.database_url)
        storage = open_storage(settings.storage_url)
        if options.command == "collect":
            grace_seconds = settings.collect_grace_seconds if options.grace_seconds is None else options.grace_seconds
            done = collect(database, storage, grace_seconds)
            print(f"removed {done.num_blobs} files with {done.num_bytes} bytes that no row names, "
                  f"{done.num_abandoned} unfinished, {done.num_quarantined} from quarantine")  # fmt: skip
            return 0
        return _report((scrub if options.command == "scrub" else reconcile)(database, storage))
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        return 2


def _report(findings: Iterable[Finding]) -> int:
    num_lost = num_unnamed = unnamed_bytes = 0
    for found in findings:
        names = ", ".join(found.named_by) or "no row"
        print(f"{found.kind} {found.section}/{found.sha256} {found.size_bytes} bytes: {names}")
        num_lost += found.is_loss
        if not found.named_by:
            num_unnamed += 1
            unnamed_bytes += found.size_bytes
    print(
        f"{num_lost} files that are needed are not right; {num_unnamed} with {unnamed_bytes} bytes are named by no row"
    )
    return 1 if num_lost else 0


if __name__ == "__main__":
    raise SystemExit(main())

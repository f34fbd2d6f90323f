"""`python -m app.access`: make, list, rotate and revoke keys in the service's own database.

It needs the service's settings (PARE_DATABASE_URL, or PARE_DATA_DIR) and no running service: this is how the first
administrator gets a key. The key is all that `create` and `rotate` print on stdout.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.access.audit import SERVICE, record_action
from app.access.keys import MAX_GRACE_SECONDS, OWNER_NAME, SCOPES, Scope, create_key, revoke_key, rotate_key
from app.db.access_tables import KeyRow
from app.db.session import Database
from app.errors import PareError
from app.settings import Settings, load_settings

DAY_SECONDS = 24 * 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        database = Database(settings.database_url)
        try:
            with database.session() as session:
                text = str(options.run(session, settings, options))
        finally:
            database.dispose()
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        return 1
    if text:
        print(text)
    return 0


def _create(session: Session, settings: Settings, options: argparse.Namespace) -> str:
    lifetime = options.expires_in_days * DAY_SECONDS if options.expires_in_days is not None else None
    row, text = create_key(
        session,
        environment=settings.key_environment,
        owner=options.owner,
        name=options.name,
        scopes=options.scopes,
        expires_in_seconds=lifetime,
    )
    record_action(session, owner=SERVICE, action="create_key", target=row.id, outcome="done")
    print(f"{row.id} of {row.owner} ({', '.join(row.scopes)}); it is shown only now:", file=sys.stderr)
    return text


def _list(session: Session, _settings: Settings, _options: argparse.Namespace) -> str:
    lines = []
    for row in session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)):
        ended = (
            "revoked" if row.revoked_at else f"expires {row.expires_at:%Y-%m-%d %H:%M}" if row.expires_at else "live"
        )
        used = f"used {row.last_used_at:%Y-%m-%d %H:%M}" if row.last_used_at else "never used"
        lines.append(f"{row.id}  {row.owner}  {','.join(row.scopes)}  {ended}  {used}  {row.name}")
    return "\n".join(lines)


def _rotate(session: Session, settings: Settings, options: argparse.Namespace) -> str:
    row, text = rotate_key(
        session, environment=settings.key_environment, key_id=options.key_id, grace_seconds=options.grace_seconds
    )
    record_action(session, owner=SERVICE, action="rotate_key", target=options.key_id, outcome="done")
    print(f"{row.id} takes the place of {options.key_id}; it is shown only now:", file=sys.stderr)
    return text


def _revoke(session: Session, _settings: Settings, options: argparse.Namespace) -> str:
    revoke_key(session, options.key_id)
    record_action(session, owner=SERVICE, action="revoke_key", target=options.key_id, outcome="done")
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.access", description="Keys of this service.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key and print it")
    create.add_argument("--owner", required=True, type=_owner, help="whose things it opens")
    create.add_argument("--scopes", type=_scopes, default=["read", "write"], help="of read,write,admin")
    create.add_argument("--name", default="key", help="a note for the list")
    create.add_argument("--expires-in-days", type=_positive, help="default: it does not expire")
    create.set_defaults(run=_create)
    commands.add_parser("list", help="list all keys, oldest first").set_defaults(run=_list)
    rotate = commands.add_parser("rotate", help="make a key that takes the place of another, and print it")
    rotate.add_argument("key_id")
    rotate.add_argument(
        "--grace-seconds", type=_grace, default=DAY_SECONDS, help="how long the old one goes on; 0: it ends now"
    )
    rotate.set_defaults(run=_rotate)
    revoke = commands.add_parser("revoke", help="end a key within seconds")
    revoke.add_argument("key_id")
    revoke.set_defaults(run=_revoke)
    return parser


def _owner(text: str) -> str:
    if not re.fullmatch(OWNER_NAME, text):
        raise argparse.ArgumentTypeError("lower-case letters, digits, - and _, at most 40")
    return text


def _scopes(text: str) -> list[Scope]:
    named = set(text.split(","))
    if named - set(SCOPES):
        raise argparse.ArgumentTypeError(f"some of {','.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in named]


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 36_500:
        raise argparse.ArgumentTypeError("a number of days above 0")
    return number


def _grace(text: str) -> int:
    number = int(text)
    if not 0 <= number <= MAX_GRACE_SECONDS:
        raise argparse.ArgumentTypeError(f"from 0 to {MAX_GRACE_SECONDS}")
    return number


if __name__ == "__main__":
    sys.exit(main())

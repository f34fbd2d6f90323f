"""`python -m app.db`: bring the database named by the settings up to date."""

from app.db.session import Database
from app.settings import load_settings


def main() -> None:
    """Run the missing migrations; a second runner waits and finds nothing to do."""
    database = Database(load_settings().database_url)
    database.upgrade()
    database.dispose()


if __name__ == "__main__":
    main()

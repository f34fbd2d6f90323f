"""`python -m app.db`: bring the database named by the settings up to date."""

from app.db.session import Database
from app.settings import load_settings


def main() -> None:
    """Run the missing migrations; a second runner waits and finds nothing to do."""
    settings = load_settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    database.upgrade()
    database.dispose()


if __name__ == "__main__":
    main()

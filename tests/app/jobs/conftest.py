"""Fixtures of the job tests."""

import pytest

from app.db.session import Database
from app.settings import Settings
from tests.app.jobs.world import World


@pytest.fixture
def world(database: Database, settings: Settings) -> World:
    """A small world in a fresh database, of each kind in turn."""
    return World(database, settings)

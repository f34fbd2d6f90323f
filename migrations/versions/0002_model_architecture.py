"""The catalogue's program of an uploaded state dict.

Revision ID: 0002
Revises: 0001
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("models", sa.Column("architecture", sa.String(length=300), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "architecture")

"""The collector asks which rows name a blob.

Revision ID: 0006
Revises: 0005
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = ("models", "datasets", "artifacts", "logs")


def upgrade() -> None:
    for table in TABLES:
        op.create_index(f"ix_{table}_sha256", table, ["sha256"], unique=False)


def downgrade() -> None:
    for table in TABLES:
        op.drop_index(f"ix_{table}_sha256", table_name=table)

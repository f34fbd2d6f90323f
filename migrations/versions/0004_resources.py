"""What jobs need, and the order in which they are claimed.

Revision ID: 0004
Revises: 0003
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

WAITING = ["state", "needs_device", "priority", "owner", "created_at", "id",
           "needs_num_devices", "needs_memory_bytes", "needs_num_threads"]  # fmt: skip


def upgrade() -> None:
    for column in (
        sa.Column("needs_device", sa.String(length=10), server_default="cpu", nullable=False),
        sa.Column("needs_num_devices", sa.Integer(), server_default="0", nullable=False),
        sa.Column("needs_memory_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("needs_num_threads", sa.Integer(), server_default="1", nullable=False),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("waiting_reason", sa.String(length=40), nullable=True),
    ):
        op.add_column("jobs", column)
    # Checks of uploads that wait go first from now on.
    op.execute("UPDATE jobs SET priority = 100 WHERE action <> 'optimize'")
    op.create_index("ix_jobs_waiting", "jobs", WAITING, unique=False)
    op.create_index("ix_jobs_owner_claimed", "jobs", ["owner", "claimed_at"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_owner_claimed", table_name="jobs")
    op.drop_index("ix_jobs_waiting", table_name="jobs")
    op.execute("UPDATE jobs SET priority = 0 WHERE action <> 'optimize'")
    for name in ("waiting_reason", "claimed_at", "needs_num_threads", "needs_memory_bytes", "needs_num_devices",
                 "needs_device"):  # fmt: skip
        op.drop_column("jobs", name)

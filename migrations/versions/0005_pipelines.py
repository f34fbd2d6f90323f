"""Jobs made of other jobs, and the models that one of these jobs makes for the next.

Revision ID: 0005
Revises: 0004
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | Sequence[str] | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_OF_PIPELINES = "parent_id IS NOT NULL OR action = 'distill'"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("parent_id", sa.String(length=40), nullable=True))
        jobs.add_column(sa.Column("part", sa.String(length=60), nullable=True))
        jobs.create_foreign_key("fk_jobs_parent_id", "jobs", ["parent_id"], ["id"], ondelete="CASCADE")
        jobs.create_unique_constraint("uq_jobs_parent_id", ["parent_id", "part"])
    with op.batch_alter_table("models") as models:
        models.add_column(sa.Column("made_by", sa.String(length=40), nullable=True))
        models.create_index("ix_models_made_by", ["made_by"])


def downgrade() -> None:
    # What was made of parts makes no sense without them. SQLite does not cascade while tables change.
    for table in ("events", "artifacts", "outbox", "logs"):
        op.execute(f"DELETE FROM {table} WHERE job_id IN (SELECT id FROM jobs WHERE {_OF_PIPELINES})")
    op.execute(f"DELETE FROM jobs WHERE {_OF_PIPELINES}")
    op.execute("DELETE FROM models WHERE made_by IS NOT NULL")
    with op.batch_alter_table("models") as models:
        models.drop_index("ix_models_made_by")
        models.drop_column("made_by")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_constraint("uq_jobs_parent_id", type_="unique")
        jobs.drop_constraint("fk_jobs_parent_id", type_="foreignkey")
        jobs.drop_column("part")
        jobs.drop_column("parent_id")

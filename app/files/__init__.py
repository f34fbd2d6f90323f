"""Rows and the files they name: what keeps the two in step, and what finds out when they are not."""

from app.files.references import hold

__all__ = ["hold"]

"""Who asks. The one place where keys and tenants will come in."""

from typing import Annotated

from fastapi import Depends


def current_owner() -> str:
    """Return the owner whose things this request may see and change."""
    return "local"


Owner = Annotated[str, Depends(current_owner)]

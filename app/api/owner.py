"""Who asks: the caller that app/api/guard.py recognized, and the owner whose things the request may see and change."""

from typing import Annotated

from fastapi import Depends, Request

from app.access.keys import Caller

CALLER = "pare.caller"
"""In the scope of every request that got past the guard."""


def caller_of(request: Request) -> Caller:
    """Return who sends this request."""
    caller: Caller = request.scope[CALLER]
    return caller


# Async, so that FastAPI takes no thread for it.
async def current_caller(request: Request) -> Caller:
    """Return who sends this request."""
    return caller_of(request)


async def current_owner(request: Request) -> str:
    """Return the owner whose things this request may see and change."""
    return caller_of(request).owner


CurrentCaller = Annotated[Caller, Depends(current_caller)]
Owner = Annotated[str, Depends(current_owner)]

"""What answers share. Answers have no optional fields: every field is always there, null where there is nothing."""

from fastapi import Response
from pydantic import BaseModel, ConfigDict


class View(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)


def answer_view(view: View) -> Response:
    """Return the answer 200. FastAPI would make the same of the view, but check it first, in another thread."""
    return Response(view.model_dump_json(), media_type="application/json")


class ErrorView(View):
    """Why something was rejected or failed."""

    code: str
    """Stable name of the cause."""
    detail: str
    """What happened, with the values."""
    fix: str
    """What to do about it."""
    retryable: bool
    """Whether the same thing can succeed later."""


class SelfLink(View):
    """Where to find this thing."""

    self: str
    """Its URL path."""

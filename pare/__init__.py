"""The client library and the command line of Pare."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pare.client import Client as Client
    from pare.errors import PareError as PareError
    from pare.result import Result as Result
    from pare.webhooks import verify_webhook as verify_webhook

__all__ = ["Client", "PareError", "Result", "verify_webhook"]

_HOMES = {
    "Client": "pare.client", "Result": "pare.result", "PareError": "pare.errors", "verify_webhook": "pare.webhooks",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Late, so that `import pare` and the command line's --help stay instant.
    if name not in _HOMES:
        raise AttributeError(f"module 'pare' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

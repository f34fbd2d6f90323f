"""How a model file is refused: one place that builds ModelRejected with a code, the values and the fix."""

import reprlib
from typing import NoReturn

from worker.engine.errors import ModelRejected

EXPORT_LINES = (
    "Export the model as a torch.export program and upload that:\n"
    "    import torch\n"
    "    program = torch.export.export(model.eval(), example_inputs)  # a tuple of tensors\n"
    '    torch.export.save(program, "model.pt2")'
)
"""The three lines that turn any live module into what Pare accepts."""


def reject(code: str, detail: str, fix: str | None = None) -> NoReturn:
    """Raise ModelRejected."""
    raise ModelRejected(detail, code=code, fix=fix or EXPORT_LINES)


def shown(value: object) -> str:
    """Return a value as it may be quoted in an error: printable ASCII, at most 80 characters."""
    # Not of the whole value: it may be deep or long beyond measure.
    text = ascii(value[:100]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 80

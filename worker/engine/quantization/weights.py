"""Which parameters of a program a coding step may put in few bits, and which it leaves as they are, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.program import Program

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.LSTM, nn.GRU, nn.RNN,
)  # fmt: skip
NUM_NAMED = 10
DECODED_AT_EVERY_CALL = (
    "In model.pt2 these weights stay in few bits, in the file and in memory. They are decoded at every call, one layer "
    "at a time, and computed with in 32-bit floats: smaller, and mostly slower, most of all for few rows at a time. Of "
    "embedding tables only the rows are decoded that are looked up."
)
"""What is true of coded weights in the file that torch runs."""
LEAVE_SOME = "Leave this step out, or let the earlier one leave layers to it with skip_layers."
"""The way out where an earlier step has put everything in few bits."""


@dataclass(frozen=True)
class Weight:
    """One parameter, once, however many layers share it."""

    name: str
    """The first name the module gives it."""
    layers: tuple[str, ...]
    """All layers that hold it, in the module's order."""
    parameter: nn.Parameter


@dataclass
class Weights:
    """What a coding step finds."""

    chosen: list[Weight] = field(default_factory=list)
    coded_before: list[str] = field(default_factory=list)
    """Names of parameters that an earlier step has put in few bits."""
    shared: list[str] = field(default_factory=list)
    """Layers left out because an embedding shares their weight and embeddings are not asked for."""
    embeddings: list[str] = field(default_factory=list)
    """Embeddings left out because they are not asked for."""


def find_weights(program: Program, skip_layers: Iterable[str] = (), *, embeddings: bool) -> Weights:
    """Find the float32 weights, of two axes or more, of linear, convolution and recurrent layers, and of embeddings.

    Raises RecipeRefused where `skip_layers` names what is not there.
    """
    skipped = set(skip_layers)
    unknown = sorted(skipped - {name for name, _ in program.module.named_modules()})
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    holders: dict[int, list[str]] = {}
    layers = dict(program.module.named_modules())
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    aliases = {alias for name in program.encodings for alias in _aliases(program, name)}
    found = Weights()
    for name, parameter in program.module.named_parameters():
        owners = holders[id(parameter)]
        kinds = [layers[owner] for owner in owners]
        if parameter.dtype != torch.float32 or skipped & set(owners):
            continue
        tables = [owner for owner in owners if isinstance(layers[owner], nn.Embedding)]
        if parameter.ndim < 2 or not any(isinstance(kind, (*LAYERS, nn.Embedding)) for kind in kinds):
            continue
        if name in aliases:
            found.coded_before.append(name)
        elif tables and not embeddings:
            found.embeddings += tables
            found.shared += [owner for owner in owners if owner not in tables]
        else:
            found.chosen.append(Weight(name, tuple(owners), parameter))
    return found


def refuse_nothing(found: Weights, skip_layers: Iterable[str]) -> None:
    """Raise StepFailed where nothing is left to code."""
    if found.chosen:
        return
    reasons = [
        f"{text}: {', '.join(names[:NUM_NAMED])}"
        for text, names in (
            ("already in few bits", found.coded_before),
            ("embeddings", found.embeddings),
            ("skipped", sorted(set(skip_layers))),
        )
        if names
    ]
    raise StepFailed(
        f"no weights are left to code ({'; '.join(reasons) or 'the model has none'})",
        code="nothing_to_quantize",
        fix=LEAVE_SOME if found.coded_before else None,
    )


def name_some(names: Iterable[str]) -> str:
    """Return the first names and how many more there are."""
    listed = list(dict.fromkeys(names))
    more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
    return ", ".join(listed[:NUM_NAMED]) + more


def _aliases(program: Program, name: str) -> tuple[str, ...]:
    return next((group for group in program.tied if name in group), (name,))

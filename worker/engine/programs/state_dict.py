"""A safetensors state dict and the name of an architecture: the catalogue's program with the user's weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from app.recipes.architectures import Architecture, UnknownArchitecture, parse_architecture
from worker.engine.catalogue.entry import Entry, Shapes, Values
from worker.engine.catalogue.registry import CATALOGUE
from worker.engine.programs.convert import convert
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject
from worker.engine.programs.weights_file import read_header, read_tensors

STATE_DICT_FIX = (
    "Give the architecture that the weights were trained with (GET /v1/architectures lists them and whose names they "
    "use), or export the live model with torch.export and upload the .pt2."
)
_COUNTER = "num_batches_tracked"
_SHOWN = 5


def open_state_dict(path: Path, directory: Path, text: str | None) -> Program:
    """Check the safetensors file at `path` and return the architecture `text` with its weights, in float32."""
    if text is None:
        reject(
            "architecture_missing", "A safetensors file needs the architecture that uses its weights.", STATE_DICT_FIX
        )
    try:
        architecture, given = parse_architecture(text)
    except UnknownArchitecture as error:
        reject("unknown_architecture", f"{error}.", STATE_DICT_FIX)
    entry = CATALOGUE[architecture.name]
    stored, _ = read_header(path)
    names = _rename(entry, list(stored))
    shapes = {name: stored[old].shape for name, old in names.items()}
    values = _complete(architecture, entry, given, shapes)
    module = _build(architecture, entry, values, shapes)
    tensors = read_tensors(path)
    _load(module, {name: tensors[old] for name, old in names.items()})
    inputs, lengths = entry.inputs(values)
    program = convert(module, inputs, lengths, directory, STATE_DICT_FIX)
    program.notes = tuple(_note_guesses(architecture, values, given))
    return program


def _note_guesses(architecture: Architecture, values: Values, given: Values) -> Iterator[str]:
    """Yield what was assumed without anything in the weights that could contradict it."""
    name, parameters = architecture.name, architecture.parameters
    if "heads" in parameters and "heads" not in given:
        yield (
            f"The number of attention heads is a guess: {values['heads']}, one for every 64 of the width. The weights "
            f"fit any number, and with a wrong one the outputs are wrong; say it with architecture={name}:heads=N."
        )
    if "image_size" not in given and "image_size" in parameters and parameters["image_size"].default is not None:
        yield (
            f"The weights fit images of any size; {values['image_size']} by {values['image_size']} pixels was assumed. "
            f"Say another with architecture={name}:image_size=N."
        )


def _rename(entry: Entry, names: list[str]) -> dict[str, str]:
    """Return name in the catalogue -> name in the file, without what the program does not need."""
    # DataParallel and Lightning put these in front of every name.
    prefix = next((word for word in ("module.", "model.") if all(name.startswith(word) for name in names)), "")
    renamed: dict[str, str] = {}
    for old in names:
        name = entry.rename(old.removeprefix(prefix))
        if entry.optional and name.endswith(entry.optional):
            continue
        if name in renamed:
            reject("weights_do_not_fit", f"{renamed[name]} and {old} are both {name}.", STATE_DICT_FIX)
        renamed[name] = old
    return renamed


def _complete(architecture: Architecture, entry: Entry, given: Values, shapes: Shapes) -> Values:
    defaults = {key: each.default for key, each in architecture.parameters.items() if each.default is not None}
    values: Values = {**defaults, **entry.infer(shapes), **given}
    for key, parameter in architecture.parameters.items():
        if key not in values:
            reject(
                "weights_do_not_fit",
                f"The weights do not say the {key} of {architecture.name}: the tensors it is read from are missing. "
                f"The file begins with {', '.join(sorted(shapes)[:_SHOWN])}.",
                STATE_DICT_FIX,
            )
        if not parameter.low <= values[key] <= parameter.high:
            reject(
                "weights_do_not_fit",
                f"The weights make {key} of {architecture.name} {values[key]}; {parameter.low:g} to {parameter.high:g} "
                "is allowed.",
                STATE_DICT_FIX,
            )
    if "heads" in values and "width" in values and values["width"] % values["heads"]:
        reject(
            "unknown_architecture",
            f"{architecture.name}: width {values['width']} is no multiple of heads {values['heads']}.",
            STATE_DICT_FIX,
        )
    return values


def _build(architecture: Architecture, entry: Entry, values: Values, shapes: Shapes) -> nn.Module:
    """Return the module, on no memory until its tensors are known to be those of the file."""
    with torch.device("meta"):
        skeleton = entry.build(values, shapes)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    # A tied output layer may be saved once or under both names; a step counter may be missing.
    tied = {name for name in expected if name not in dict(skeleton.named_parameters())} & {"lm_head.weight"}
    missing = sorted(
        name for name in expected.keys() - shapes.keys() if not name.endswith(_COUNTER) and name not in tied
    )
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
    words = [
        f"missing: {_list(missing)}" if missing else "",
        f"unexpected: {_list(unexpected)}" if unexpected else "",
        "; ".join(f"{name} has shape {shapes[name]} instead of {expected[name]}" for name in wrong[:_SHOWN]),
    ]
    if missing or unexpected or wrong:
        reject(
            "weights_do_not_fit",
            f"The weights are not those of {architecture.name} with "
            f"{', '.join(f'{key}={value}' for key, value in values.items())}: {'; '.join(filter(None, words))}.",
            STATE_DICT_FIX,
        )
    return entry.build(values, shapes)


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = module.state_dict()
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            # Two names of one tensor must hold the same values.
            before = seen.setdefault(own[name].data_ptr(), tensor) if own[name].dim() else tensor
            if before is not tensor and not torch.equal(before, tensor):
                reject("weights_do_not_fit", f"{name} is tied to another weight that has other values.", STATE_DICT_FIX)
            own[name].copy_(tensor)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

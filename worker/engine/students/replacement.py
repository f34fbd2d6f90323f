"""A model of the catalogue in a teacher's place: new weights, the teacher's inputs and outputs."""

from dataclasses import replace
from pathlib import Path

from app.recipes.architectures import Architecture, parse_architecture
from app.recipes.facts import TensorFacts
from worker.engine.catalogue.entry import Values
from worker.engine.catalogue.registry import CATALOGUE
from worker.engine.errors import ModelRejected, RecipeRefused
from worker.engine.programs.convert import convert
from worker.engine.programs.program import Program, Signature

FIX = "Name a student with the inputs and the output of the job's model."


def build_student(text: str, teacher: Program, directory: Path) -> Program:
    """Return the architecture with new random weights, for the teacher's inputs; raises RecipeRefused.

    The random state of torch decides the weights. Sizes that the text does not give are those of the teacher.
    """
    architecture, given = parse_architecture(text)
    values = _complete(architecture, given, teacher.signature)
    entry = CATALOGUE[architecture.name]
    if "heads" in values and values["width"] % values["heads"]:
        raise refuse(f"{architecture.name}: width {values['width']} is no multiple of heads {values['heads']}")
    if "patch" in values and values["image_size"] % values["patch"]:
        raise refuse(
            f"{architecture.name}: image_size {values['image_size']} is no multiple of patch {values['patch']}"
        )
    module = entry.build(values, {})
    inputs, lengths = entry.inputs(values)
    try:
        student = convert(module, inputs, lengths, directory, FIX)
    except ModelRejected as error:
        raise refuse(f"{text} cannot be built: {error.detail}") from error
    return take_place(student, teacher)


def take_place(student: Program, teacher: Program) -> Program:
    """Return the student under the teacher's names, with its tokenizer; raises RecipeRefused where it does not fit."""
    mine, theirs = student.signature, teacher.signature
    for what, own, wanted in (("inputs", mine.inputs, theirs.inputs), ("outputs", mine.outputs, theirs.outputs)):
        if len(own) != len(wanted) or not all(_fits(a, b) for a, b in zip(own, wanted, strict=True)):
            raise refuse(f"the student's {what} are {_show(own)}, the model's are {_show(wanted)}")
    names = [each.name for each in mine.inputs], [each.name for each in theirs.inputs]
    if set(names[0]) == set(names[1]) and names[0] != names[1]:
        raise refuse(f"the student takes its inputs in the order {names[0]}, the model in the order {names[1]}")
    if mine.batch_size not in (None, theirs.batch_size):
        raise refuse(f"the student was exported with a fixed batch of {mine.batch_size}")
    inputs = tuple(replace_name(a, b.name) for a, b in zip(mine.inputs, theirs.inputs, strict=True))
    outputs = tuple(replace_name(a, b.name) for a, b in zip(mine.outputs, theirs.outputs, strict=True))
    return replace(student, signature=replace(mine, inputs=inputs, outputs=outputs), tokenizer=teacher.tokenizer)


def replace_name(facts: TensorFacts, name: str) -> TensorFacts:
    """Return the same tensor under another name."""
    return facts.model_copy(update={"name": name})


def refuse(what: str) -> RecipeRefused:
    """Return the error for a student that cannot take the model's place."""
    return RecipeRefused(f"the student does not fit: {what}", code="student_does_not_fit", fix=FIX)


def _complete(architecture: Architecture, given: Values, signature: Signature) -> Values:
    values: Values = {key: each.default for key, each in architecture.parameters.items() if each.default is not None}
    values |= _read_teacher(architecture, signature)
    for key, value in given.items():
        if key in ("num_classes", "channels", "image_size") and values.get(key, value) != value:
            raise refuse(f"{architecture.name}:{key}={value:g}, and the model's is {values[key]:g}")
    values |= given
    if "heads" in architecture.parameters and "width" in values:
        values.setdefault("heads", max(1, int(values["width"]) // 64))
    missing = [key for key in architecture.parameters if key not in values]
    if missing:
        example = ",".join(f"{key}=N" for key in missing)
        raise refuse(
            f"{architecture.name} has no weights here to read its {', '.join(missing)} from; "
            f"write {architecture.name}:{example}"
        )
    return values


def _read_teacher(architecture: Architecture, signature: Signature) -> Values:
    """Return the sizes that the teacher's signature tells."""
    found: Values = {}
    output = signature.outputs[0].shape
    if isinstance(output[-1], int):
        found[("num_classes" if "num_classes" in architecture.parameters else "vocabulary")] = output[-1]
    if "image_size" in architecture.parameters:
        if len(signature.inputs) != 1 or len(signature.inputs[0].shape) != 4:
            raise refuse(f"{architecture.name} takes one batch of images, the model takes {_show(signature.inputs)}")
        _, channels, height, width = signature.inputs[0].shape
        if height != width or not isinstance(height, int) or not isinstance(channels, int):
            raise refuse(f"{architecture.name} takes square images of one size, the model {_show(signature.inputs)}")
        found |= {"channels": channels, "image_size": height}
    return found


def _fits(one: TensorFacts, other: TensorFacts) -> bool:
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(isinstance(a, str) or a == b for a, b in zip(one.shape, other.shape, strict=True))
    )


def _show(tensors: tuple[TensorFacts, ...]) -> str:
    return ", ".join(f"{each.name} {each.dtype} {list(each.shape)}" for each in tensors)

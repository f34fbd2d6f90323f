"""A model of the catalogue in a teacher's place: new weights, the teacher's inputs and outputs."""

from dataclasses import replace
from pathlib import Path

from app.recipes.facts import TensorFacts
from app.recipes.student_sizes import StudentMisfit, complete_sizes, show_tensors
from worker.engine.catalogue.registry import CATALOGUE
from worker.engine.errors import ModelRejected, RecipeRefused
from worker.engine.programs.convert import convert
from worker.engine.programs.program import Program

FIX = "Name a student with the inputs and the output of the job's model."


def build_student(text: str, teacher: Program, directory: Path) -> Program:
    """Return the architecture with new random weights, for the teacher's inputs; raises RecipeRefused.

    The random state of torch decides the weights. Sizes that the text does not give are those of the teacher.
    """
    try:
        architecture, values = complete_sizes(text, teacher.signature.inputs, teacher.signature.outputs)
    except StudentMisfit as error:
        raise refuse(str(error)) from error
    entry = CATALOGUE[architecture.name]
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
            raise refuse(f"the student's {what} are {show_tensors(own)}, the model's are {show_tensors(wanted)}")
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


def _fits(one: TensorFacts, other: TensorFacts) -> bool:
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(isinstance(a, str) or a == b for a, b in zip(one.shape, other.shape, strict=True))
    )

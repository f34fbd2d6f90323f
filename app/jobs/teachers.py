"""The other models of a job, teachers and students: which its recipe names, whether they fit, and that they stay."""

from collections.abc import Iterator, Mapping

from sqlalchemy import ColumnElement, Text, and_, cast

from app.db.tables import JobRow
from app.errors import Problem
from app.jobs.bindings import point, suggest
from app.jobs.lifecycle import CHECKS, TERMINAL
from app.recipes.distillation import Distill
from app.recipes.facts import ModelFacts, TensorFacts
from app.recipes.recipe import Recipe
from app.recipes.students import TakeStudent

STEPS = "/recipe/steps"


def name_teachers(recipe: Recipe) -> tuple[str, ...]:
    """Return the ids of the models that the steps name, each once."""
    return tuple(dict.fromkeys(model_id for _, _, model_id in list_teachers(recipe)))


def list_teachers(recipe: Recipe) -> Iterator[tuple[int, str, str]]:
    """Yield (index of the step, field, model id) of every other model that a step names."""
    for index, step in enumerate(recipe.steps):
        if isinstance(step, Distill) and step.teacher_model_id is not None:
            yield index, "teacher_model_id", step.teacher_model_id
        elif isinstance(step, TakeStudent) and step.model_id is not None:
            yield index, "student", step.model_id


def learns_from(model_id: str) -> ColumnElement[bool]:
    """Return the condition that a job is unfinished and its recipe names this model: no other field holds model ids."""
    # Ids are unguessable and of one form, so a search in the recipe's text finds the field and nothing else.
    named = cast(JobRow.recipe, Text).contains(model_id, autoescape=True)
    return and_(JobRow.state.not_in(TERMINAL), JobRow.action.not_in(CHECKS), named)


def find_teacher_problems(recipe: Recipe, model: ModelFacts, teachers: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield what keeps a teacher from teaching this model, at the step that names it; and unknown layers in pairs."""
    for index, field, model_id in list_teachers(recipe):
        other = teachers[model_id]
        place, noun = point(STEPS, index, field), "student" if field == "student" else "teacher"
        yield from (Problem(place, text) for text in _compare_inputs(model, other, noun))
        yield from (Problem(place, text) for text in _compare_outputs(recipe, model, other, noun))
    student: ModelFacts | None = model
    for index, step in enumerate(recipe.steps):
        if isinstance(step, TakeStudent):
            student = None if step.model_id is None else teachers[step.model_id]
        if not isinstance(step, Distill):
            continue
        teacher = model if step.teacher_model_id is None else teachers[step.teacher_model_id]
        for position, pair in enumerate(step.pairs):
            for side, name, facts in (("student", pair.student, student), ("teacher", pair.teacher, teacher)):
                known = {layer.name for layer in facts.layers} if facts is not None else {name}
                if name not in known:
                    place = point(STEPS, index, "pairs", position, side)
                    yield Problem(place, f"the {side} has no layer {name!r}; {suggest(name, known)}")


def _compare_inputs(model: ModelFacts, teacher: ModelFacts, noun: str) -> Iterator[str]:
    mine, theirs = ({tensor.name: tensor for tensor in facts.inputs} for facts in (model, teacher))
    if set(mine) != set(theirs):
        yield f"the {noun}'s inputs are {sorted(theirs)}, the model's are {sorted(mine)}; they must be the same"
        return
    for name, tensor in mine.items():
        other = theirs[name]
        if tensor.dtype != other.dtype or not _takes(tensor, other):
            yield (
                f"input {name!r} of the {noun} is {other.dtype} {list(other.shape)}, "
                f"of the model {tensor.dtype} {list(tensor.shape)}"
            )


def _compare_outputs(recipe: Recipe, model: ModelFacts, teacher: ModelFacts, noun: str) -> Iterator[str]:
    named = recipe.data.output if recipe.data else None
    index = next((at for at, tensor in enumerate(model.outputs) if tensor.name == named), 0)
    everything = named is None and (recipe.data is None or recipe.data.task == "none")
    for place in range(len(model.outputs)) if everything else [index]:
        tensor = model.outputs[place]
        if place >= len(teacher.outputs):
            yield f"the {noun} has {len(teacher.outputs)} outputs, the model has {len(model.outputs)}"
            return
        other = teacher.outputs[place]
        if not _alike(tensor, other):
            yield (
                f"output {place} of the {noun} is {other.dtype} {list(other.shape)}, "
                f"of the model {tensor.dtype} {list(tensor.shape)}; both must be alike"
            )


def _takes(given: TensorFacts, wanted: TensorFacts) -> bool:
    """Whether a tensor of one shape is always good for another: where one size varies, the other must."""
    return len(given.shape) == len(wanted.shape) and all(
        isinstance(want, str) or want == have for have, want in zip(given.shape, wanted.shape, strict=True)
    )


def _alike(one: TensorFacts, other: TensorFacts) -> bool:
    return len(one.shape) == len(other.shape) and all(
        isinstance(first, str) or isinstance(second, str) or first == second
        for first, second in zip(one.shape, other.shape, strict=True)
    )

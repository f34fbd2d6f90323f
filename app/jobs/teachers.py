"""The other models that a job learns from: which its recipe names, whether they fit, and that they stay meanwhile."""

from collections.abc import Iterator, Mapping

from sqlalchemy import ColumnElement, Text, and_, cast

from app.db.tables import JobRow
from app.errors import Problem
from app.jobs.bindings import point, suggest
from app.jobs.lifecycle import TERMINAL
from app.recipes.distillation import Distill
from app.recipes.facts import ModelFacts, TensorFacts
from app.recipes.recipe import Recipe

STEPS = "/recipe/steps"


def name_teachers(recipe: Recipe) -> tuple[str, ...]:
    """Return the ids of the models that the steps name as teachers, each once."""
    return tuple(dict.fromkeys(model_id for _, model_id in list_teachers(recipe)))


def list_teachers(recipe: Recipe) -> Iterator[tuple[int, str]]:
    """Yield (index of the step, model id) of every teacher that a step names."""
    for index, step in enumerate(recipe.steps):
        if isinstance(step, Distill) and step.teacher_model_id is not None:
            yield index, step.teacher_model_id


def learns_from(model_id: str) -> ColumnElement[bool]:
    """Return the condition that a job is unfinished and its recipe names this model: no other field holds model ids."""
    # Ids are unguessable and of one form, so a search in the recipe's text finds the field and nothing else.
    named = cast(JobRow.recipe, Text).contains(model_id, autoescape=True)
    return and_(JobRow.state.not_in(TERMINAL), JobRow.action == "optimize", named)


def find_teacher_problems(recipe: Recipe, model: ModelFacts, teachers: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield what keeps a teacher from teaching this model, at the step that names it; and unknown layers in pairs."""
    for index, model_id in list_teachers(recipe):
        teacher = teachers[model_id]
        place = point(STEPS, index, "teacher_model_id")
        yield from (Problem(place, text) for text in _compare_inputs(model, teacher))
        yield from (Problem(place, text) for text in _compare_outputs(recipe, model, teacher))
    for index, step in enumerate(recipe.steps):
        if not isinstance(step, Distill):
            continue
        teacher = model if step.teacher_model_id is None else teachers[step.teacher_model_id]
        for position, pair in enumerate(step.pairs):
            for side, name, facts in (("student", pair.student, model), ("teacher", pair.teacher, teacher)):
                known = {layer.name for layer in facts.layers}
                if name not in known:
                    place = point(STEPS, index, "pairs", position, side)
                    yield Problem(place, f"the {side} has no layer {name!r}; {suggest(name, known)}")


def _compare_inputs(model: ModelFacts, teacher: ModelFacts) -> Iterator[str]:
    mine, theirs = ({tensor.name: tensor for tensor in facts.inputs} for facts in (model, teacher))
    if set(mine) != set(theirs):
        yield f"the teacher's inputs are {sorted(theirs)}, the model's are {sorted(mine)}; they must be the same"
        return
    for name, tensor in mine.items():
        other = theirs[name]
        if tensor.dtype != other.dtype or not _takes(tensor, other):
            yield (
                f"input {name!r} of the teacher is {other.dtype} {list(other.shape)}, "
                f"of the model {tensor.dtype} {list(tensor.shape)}"
            )


def _compare_outputs(recipe: Recipe, model: ModelFacts, teacher: ModelFacts) -> Iterator[str]:
    named = recipe.data.output if recipe.data else None
    index = next((at for at, tensor in enumerate(model.outputs) if tensor.name == named), 0)
    everything = named is None and (recipe.data is None or recipe.data.task == "none")
    for place in range(len(model.outputs)) if everything else [index]:
        tensor = model.outputs[place]
        if place >= len(teacher.outputs):
            yield f"the teacher has {len(teacher.outputs)} outputs, the model has {len(model.outputs)}"
            return
        other = teacher.outputs[place]
        if not _alike(tensor, other):
            yield (
                f"output {place} of the teacher is {other.dtype} {list(other.shape)}, "
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

"""Does a recipe fit a model and its data? A pure function from facts to problems, each with its place."""

from collections.abc import Iterator

from app.errors import Problem
from app.jobs.bindings import DATA, find_binding_problems, find_column, find_split_problems, point, suggest
from app.jobs.labels import find_label_problems
from app.jobs.parallel_plans import find_plan_problems
from app.recipes.base import DataNeed
from app.recipes.data import Data
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.recipe import Recipe
from app.recipes.student_sizes import StudentMisfit, complete_sizes
from app.recipes.students import TakeStudent
from app.recipes.training import TrainingSettings

STEPS = "/recipe/steps"


def find_problems(
    recipe: Recipe, model: ModelFacts, dataset: DatasetFacts | None, evaluation: DatasetFacts | None
) -> list[Problem]:
    """Return everything that is wrong; `dataset` and `evaluation` are those the recipe names."""
    problems = [*_check_steps(recipe, model), *_check_training(recipe, model)]
    if recipe.data is not None:
        assert dataset is not None, "the recipe names a dataset"
        problems += find_binding_problems(recipe.data, model, dataset)
        problems += find_split_problems(recipe.data, dataset)
        problems += find_label_problems(recipe.data, model, dataset)
        problems += _check_rows(recipe.data, model, dataset, evaluation)
        if evaluation is not None:
            problems += _check_independence(recipe, recipe.data)
            problems += _check_evaluation(recipe.data, dataset, evaluation)
    return problems


def _check_steps(recipe: Recipe, model: ModelFacts) -> Iterator[Problem]:
    capabilities = {capability.kind: capability for capability in model.capabilities}
    names = {layer.name for layer in model.layers}
    for index, step in enumerate(recipe.steps):
        if isinstance(step, TakeStudent):
            yield from _check_student(step, index, model)
            return  # what follows works on another model; the engine says whether it fits
        capability = capabilities.get(step.kind)
        if capability is not None and not capability.applicable:
            reason = capability.missing or "no layer of it qualifies"
            yield Problem(point(STEPS, index, "kind"), f"{step.kind} cannot work on this model: {reason}")
            continue
        skipped = getattr(step, "skip_layers", ())
        known = names | set(capability.layers if capability else ())
        for position, name in enumerate(skipped):
            if name not in known:
                place = point(STEPS, index, "skip_layers", position)
                yield Problem(place, f"the model has no layer {name!r}; {suggest(name, known)}")
        if capability is None or not capability.layers:
            continue
        remaining = set(capability.layers) - set(skipped)
        if not remaining:
            place = point(STEPS, index, "skip_layers")
            yield Problem(place, f"all {len(capability.layers)} layers that {step.kind} works on are left out")
        refusal = step.refuse([layer.type for layer in model.layers if layer.name in remaining])
        if refusal is not None:
            yield Problem(point(STEPS, index), f"{step.kind} cannot work on this model: {refusal}")


def _check_student(step: TakeStudent, index: int, model: ModelFacts) -> Iterator[Problem]:
    if step.model_id is not None:
        return  # compared with the other models that the recipe names
    try:
        complete_sizes(step.student, model.inputs, model.outputs)
    except StudentMisfit as misfit:
        yield Problem(point(STEPS, index, "student"), str(misfit))


def _check_training(recipe: Recipe, model: ModelFacts) -> Iterator[Problem]:
    task = recipe.data.task if recipe.data else "none"
    replaced = False
    for index, step in enumerate(recipe.steps):
        replaced = replaced or isinstance(step, TakeStudent)  # what follows trains another model
        inner = getattr(step, "training", None)
        settings, place = (inner, (index, "training")) if inner is not None else (step, (index,))
        if not isinstance(settings, TrainingSettings):
            continue
        if settings.label_smoothing and task != "classification":
            yield Problem(
                point(STEPS, *place, "label_smoothing"),
                f"smoothing is for classification; recipe.data.task is {task!r}",
            )
        if settings.parallel is not None and not replaced:
            place_of_plan = point(STEPS, *place, "parallel")
            yield from (Problem(place_of_plan, text) for text in find_plan_problems(settings.parallel, model))
        if settings.augmentations and not any(len(tensor.shape) == 4 for tensor in model.inputs):
            shapes = [list(tensor.shape) for tensor in model.inputs]
            yield Problem(
                point(STEPS, *place, "augmentations"), f"they are for 4-d image inputs; the model's are {shapes}"
            )


def _check_rows(
    data: Data, model: ModelFacts, dataset: DatasetFacts, evaluation: DatasetFacts | None
) -> Iterator[Problem]:
    place = point(DATA, "dataset_id")
    held_out = 0
    if evaluation is None:
        if dataset.num_rows < 2:
            yield Problem(
                place, f"the dataset has {dataset.num_rows} rows; one to train on and one to measure on are needed"
            )
            return
        if data.split_column is not None:
            return  # how many rows have which value is known only to the engine
        held_out = min(max(round(dataset.num_rows * data.evaluation_fraction), 1), dataset.num_rows - 1)
    elif evaluation.num_rows < 1:
        yield Problem(point(DATA, "evaluation_dataset_id"), "the evaluation dataset has no rows")
    num_training, needed = dataset.num_rows - held_out, model.batch_size or 1
    if num_training < needed:
        why = f"the model was exported with a fixed batch of {needed}" if model.batch_size else "one is needed"
        yield Problem(place, f"{num_training} of {dataset.num_rows} rows are for training, too few: {why}")


def _check_independence(recipe: Recipe, data: Data) -> Iterator[Problem]:
    learning = [step.kind for step in recipe.steps if step.data_need() is DataNeed.LABELS]
    if learning and data.evaluation_dataset_id == data.dataset_id:
        yield Problem(
            point(DATA, "evaluation_dataset_id"),
            f"{learning[0]} learns from this dataset, so quality measured on it would look too good; "
            "name another one, or leave it null and a part is held out",
        )


def _check_evaluation(data: Data, dataset: DatasetFacts, evaluation: DatasetFacts) -> Iterator[Problem]:
    used = {binding.column for binding in data.inputs.values()} | ({data.label_column} if data.label_column else set())
    resized = {binding.column for binding in data.inputs.values() if binding.resize is not None}
    if dataset.classes != evaluation.classes:
        yield Problem(
            point(DATA, "evaluation_dataset_id"),
            f"the classes are {list(evaluation.classes[:10])} here and {list(dataset.classes[:10])} in the training "
            "data; both zips need the same folders, or the same number means two things",
        )
    for name in sorted(used):
        first, second = find_column(dataset, name), find_column(evaluation, name)
        if first is None:
            continue  # reported where it is named
        place = point(DATA, "evaluation_dataset_id")
        if second is None:
            yield Problem(place, f"the evaluation dataset has no column {name!r}, which the recipe uses")
        elif name in resized and first.shape[-1:] == second.shape[-1:]:
            continue
        elif (first.dtype, first.shape) != (second.dtype, second.shape):
            yield Problem(
                place,
                f"column {name!r} is {second.dtype} {list(second.shape)} here and {first.dtype} {list(first.shape)} "
                "in the training data; both must be alike",
            )

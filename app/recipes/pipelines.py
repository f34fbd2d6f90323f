"""The distillation pipeline as a request: train the teacher, teach a student, tune how; and its jobs as recipes."""

import itertools
import math
import random
import re
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from app.recipes.base import Items, Spec
from app.recipes.data import Data
from app.recipes.distillation import Distill
from app.recipes.needs import Needs
from app.recipes.recipe import Outputs, Recipe, Target
from app.recipes.students import DeriveStudent, TakeStudent
from app.recipes.training import Finetune, Train, TrainingSettings

TRIAL_RUNS = 10
"""Timed calls of a trial: it is judged by quality, and measured in full only when it is chosen."""
MAX_COMBINATIONS = 10_000
"""Of the values of a tuning: all of them are listed before some are drawn."""
VALUES = ("temperature", "soft_weight", "label_weight", "learning_rate", "width")
"""What is tuned, in the order in which it is listed."""
Values = dict[str, float]
"""Hyper-parameter -> value."""


class Tuning(Spec):
    """Search of the student's hyper-parameters: all trials train shortly, the better ones longer (successive halving,
    Jamieson and Talwalkar 2016). A list that is empty leaves the value as `training` or `student` has it."""

    num_trials: int = Field(8, ge=2, le=256)
    """Combinations tried; the first is that of `training` itself, the others are drawn from the lists."""
    reduction: int = Field(3, ge=2, le=16)
    """Of each rung one in so many goes on, with so many times the epochs."""
    temperature: Items[Annotated[float, Field(gt=0, le=100)]] = Field((1.0, 2.0, 4.0, 8.0), max_length=32)
    """Temperatures to try."""
    soft_weight: Items[Annotated[float, Field(gt=0, le=1000)]] = Field((), max_length=32)
    """Weights of the teacher's outputs to try."""
    label_weight: Items[Annotated[float, Field(ge=0, le=1000)]] = Field((0.1, 0.5), max_length=32)
    """Weights of the labels to try."""
    learning_rate: Items[Annotated[float, Field(gt=0, le=10)]] = Field((), max_length=32)
    """Learning rates to try."""
    width: Items[Annotated[float, Field(gt=0, le=1)]] = Field((), max_length=32)
    """Widths of a derived student to try."""
    size_weight: float = Field(0.0, ge=0, le=1000)
    """The objective is quality minus this times student's parameters / teacher's. With 0, the widest student wins."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        possible = math.prod(len(set(getattr(self, name))) or 1 for name in VALUES)
        if possible > MAX_COMBINATIONS:
            raise ValueError(
                f"the lists have {possible} combinations; the most is {MAX_COMBINATIONS}, list fewer values"
            )
        if self.num_trials > possible + 1:
            raise ValueError(
                f"num_trials is {self.num_trials}, and the lists have {possible} combinations; lower it or list more"
            )
        return self


class Distillation(Spec):
    """What the pipeline does: stage by stage, each a job of its own."""

    teacher_training: Annotated[Train | Finetune, Field(discriminator="kind")] | None = None
    """How to train the model before it teaches; null: it is trained already."""
    student: Annotated[DeriveStudent | TakeStudent, Field(discriminator="kind")]
    """Where the student comes from: the teacher's own layers, the catalogue, or an upload."""
    training: Distill
    """How the student is taught; `epochs` is the full budget, also of the student that learns from labels alone."""
    tuning: Tuning | None = None
    """Search better values than those of `training` first; null: no search."""
    data: Data
    """Examples for all stages."""
    target: Target = Target()
    """Where speed is measured."""
    outputs: Outputs = Outputs()
    """Which files of the student to make."""
    needs: Needs = Needs()
    """What the workers must have that run the stages; what is left out follows from each stage."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Fixes every random choice of every stage, and which combinations are tried."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.teacher_model_id is not None:
            raise ValueError("training.teacher_model_id: the teacher is the model of the request; leave it out")
        if self.training.pairs and not isinstance(self.student, DeriveStudent) and self.student.model_id is None:
            raise ValueError("training.pairs names layers of a student that does not exist yet; leave it empty")
        if self.tuning is not None and not self.training.keep_best:
            raise ValueError(
                "tuning compares students on training rows set apart, which needs training.keep_best to be true"
            )
        if self.tuning is not None and self.tuning.width and not isinstance(self.student, DeriveStudent):
            raise ValueError("tuning.width is for a student with kind derive_student")
        if self.outputs.formats is not None and "pt2" not in self.outputs.formats and self.teacher_training is not None:
            raise ValueError("the trained teacher reaches the next stage as a pt2 file; add 'pt2' to outputs.formats")
        try:
            self.teacher_recipe()
            for values in self.draw_trials() if self.tuning else ({},):
                self.student_recipe(values)
            self.alone_recipe()
        except ValidationError as error:
            problems = dict.fromkeys(_tell(each["msg"]) for each in error.errors())
            raise ValueError("; ".join(problems)) from None
        if self.needs.device == "cpu" and self.target.device == "cuda":
            raise ValueError(
                "needs.device is 'cpu', and target.device 'cuda' can be measured on a GPU only; leave out "
                "needs.device, or set the target to 'cpu'"
            )
        return self

    def teacher_recipe(self) -> Recipe | None:
        """Return the recipe of the first stage, None where the teacher is trained already."""
        if self.teacher_training is None:
            return None
        return self._recipe([self.teacher_training])

    def student_recipe(self, values: Values | None = None) -> Recipe:
        """Return the recipe of a student taught in full, with these hyper-parameters."""
        return self._recipe([self._student(values or {}), self._taught(values or {})])

    def trial_recipe(self, values: Values, epochs: int) -> Recipe:
        """Return the recipe of a trial that trains for so many epochs."""
        step = self._taught(values)
        limited = {"epochs": epochs}
        if step.max_steps is not None:
            limited["max_steps"] = max(1, round(step.max_steps * epochs / step.epochs))
        target = self.target.model_copy(update={"num_runs": TRIAL_RUNS})
        return self._recipe([self._student(values), step.model_copy(update=limited)], target, Outputs(formats=("pt2",)))

    def alone_recipe(self, values: Values | None = None) -> Recipe | None:
        """Return the recipe of the same student with the same budget and no teacher; None without labels."""
        if not self.data.has_labels:
            return None
        taught = self._taught(values or {})
        settings = {name: getattr(taught, name) for name in TrainingSettings.model_fields}
        return self._recipe([self._student(values or {}), Finetune(kind="finetune", **settings)])

    def draw_trials(self) -> tuple[Values, ...]:
        """Return the hyper-parameters of every trial: those of the request first, then others without repetition."""
        assert self.tuning is not None
        first = {name: self._own(name) for name in VALUES if getattr(self.tuning, name)}
        lists = [sorted(set(getattr(self.tuning, name))) for name in first]
        others = [values for values in itertools.product(*lists) if values != tuple(first.values())]
        drawn = random.Random(self.seed).sample(others, min(self.tuning.num_trials - 1, len(others)))
        return (first, *(dict(zip(first, values, strict=True)) for values in drawn))

    def _own(self, name: str) -> float:
        if name == "width":
            assert isinstance(self.student, DeriveStudent)
            return self.student.width
        value: float = getattr(self.training, name)
        return value

    def _student(self, values: Values) -> DeriveStudent | TakeStudent:
        if "width" in values:
            return self.student.model_copy(update={"width": values["width"]})
        return self.student

    def _taught(self, values: Values) -> Distill:
        return self.training.model_copy(update={name: value for name, value in values.items() if name != "width"})

    def _recipe(self, steps: list[Any], target: Target | None = None, outputs: Outputs | None = None) -> Recipe:
        # From plain JSON, so that the checks of a recipe run on the whole of it.
        return Recipe.model_validate(
            {
                "steps": [step.model_dump(mode="json") for step in steps],
                "data": self.data.model_dump(mode="json"),
                "target": (target or self.target).model_dump(mode="json"),
                "outputs": (outputs or self.outputs).model_dump(mode="json"),
                "seed": self.seed,
            }
        )


def _tell(message: str) -> str:
    """Return a message about the recipe of a stage in words for the request, which has neither recipe nor steps."""
    return re.sub(r"steps\[\d+\] |recipe\.", "", message.removeprefix("Value error, "))

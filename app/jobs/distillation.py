"""What a distillation does next: a pure function of its request and its parts.

teacher -> teacher_check -> trial_<rung>_<number> ... -> student and student_alone

The first two are left out where the teacher is trained already, the trials where nothing is tuned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from app.jobs.distillation_report import summarize, write_report
from app.jobs.halving import Rung, choose_survivors, plan_rungs
from app.jobs.lifecycle import State
from app.jobs.parents import HANDED_ON, Ending, NewPart, Outlook, Part, Parts
from app.jobs.trials import TrialRun, describe_values, measure_objective
from app.recipes.pipelines import Distillation, Values
from app.recipes.plan import EngineError

OVERHEAD_EPOCHS = 2.0
"""What opening, exporting and measuring a model costs beside its training, for the progress alone."""
TEACHER, TEACHER_CHECK, STUDENT, ALONE = "teacher", "teacher_check", "student", "student_alone"
RENAMED = {f"model.{each}": f"teacher.{each}" for each in ("pt2", "onnx", "safetensors", "aoti.pt2")}
"""The teacher's files among the parent's artifacts."""
_CANCELLED = EngineError(code="part_cancelled", detail="it was cancelled", fix="Retry the job.", retryable=True)
_NO_OBJECTIVE = EngineError(
    code="no_objective",
    detail="its quality is not a finite number",
    fix="Lower training.learning_rate and tuning.learning_rate.",
)


def name_trial(rung: int, number: int) -> str:
    """Return the name of a trial's part."""
    return f"trial_{rung}_{number}"


@dataclass(frozen=True)
class DistillationPlan:
    """The request, and the model it is for."""

    request: Distillation
    model_id: str | None

    @cached_property
    def drawn(self) -> tuple[Values, ...]:
        """The hyper-parameters of every trial."""
        return self.request.draw_trials()

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The rounds of trials; none where nothing is tuned."""
        tuning = self.request.tuning
        if tuning is None:
            return ()
        return plan_rungs(len(self.drawn), tuning.reduction, self.request.training.epochs)

    def look(self, parts: Parts) -> Outlook:
        """Return what comes next, where the parts stand as they do."""
        teacher_id = self.model_id
        recipe = self.request.teacher_recipe()
        if recipe is not None:
            for name, new in (
                (TEACHER, NewPart(TEACHER, recipe, self.model_id, self.request.needs)),
                (TEACHER_CHECK, NewPart(TEACHER_CHECK, checks_result_of=TEACHER)),
            ):
                part = parts.get(name)
                if part is None:
                    return self._outlook(parts, "train_teacher", "training the teacher", (new,))
                if part.is_over and part.state is not State.SUCCEEDED:
                    return self._failed(parts, "train_teacher", "the teacher could not be trained", part)
                if not part.is_over:
                    return self._outlook(parts, "train_teacher", "training the teacher")
            teacher_id = parts[TEACHER_CHECK].model_id
        values: Values = {}
        if self.rungs:
            survivors = tuple(range(len(self.drawn)))
            for index, rung in enumerate(self.rungs):
                survivors = survivors[: rung.num_trials]
                waiting = self._look_at_rung(parts, index, survivors, teacher_id)
                if waiting is not None:
                    return waiting
                objectives = self.list_objectives(parts, index, survivors)
                survivors = choose_survivors(objectives, len(survivors))
                if not survivors:
                    failed = parts[name_trial(index, min(objectives))]
                    return self._failed(parts, "tune_student", "every trial failed; the first with", failed)
            values = self.drawn[survivors[0]]
        return self._finish(parts, values, teacher_id)

    def choose_retries(self, parts: Parts) -> tuple[str, ...]:
        """Return the parts to try again: those that were cancelled, and those without which nothing goes on.

        A trial that failed while others succeeded stays a loser, so that what was decided stays as it was.
        """
        succeeded = {part.name.rpartition("_")[0] for part in parts.values() if part.state is State.SUCCEEDED}
        return tuple(
            name
            for name, part in parts.items()
            if part.state is State.CANCELLED
            or (
                part.state is State.FAILED
                and (not name.startswith("trial_") or name.rpartition("_")[0] not in succeeded)
            )
        )

    def list_trials(self, parts: Parts) -> tuple[TrialRun, ...]:
        """Return every run of a trial there is, by rung and number."""
        if not self.rungs:
            return ()
        runs = []
        for index, rung in enumerate(self.rungs):
            for number, values in enumerate(self.drawn):
                part = parts.get(name_trial(index, number))
                if part is not None:
                    objective = measure_objective(part.metrics, self._size_weight) if part.metrics else None
                    runs.append(TrialRun(number, index, rung.epochs, values, objective, part))
        return tuple(runs)

    def list_objectives(self, parts: Parts, rung: int, numbers: tuple[int, ...]) -> dict[int, float | None]:
        """Return trial -> objective on a rung; None where it failed."""
        found = {run.number: run.objective for run in self.list_trials(parts) if run.rung == rung}
        return {number: found[number] for number in numbers}

    @property
    def _size_weight(self) -> float:
        return self.request.tuning.size_weight if self.request.tuning else 0.0

    def _look_at_rung(
        self, parts: Parts, index: int, numbers: tuple[int, ...], teacher_id: str | None
    ) -> Outlook | None:
        """Return what to do while trials of a rung are missing or at work; None when all are over."""
        epochs = self.rungs[index].epochs
        names = {name_trial(index, number): number for number in numbers}
        new = tuple(
            NewPart(name, self.request.trial_recipe(self.drawn[number], epochs), teacher_id, self.request.needs)
            for name, number in names.items()
            if name not in parts
        )
        num_over = sum(name in parts and parts[name].is_over for name in names)
        if num_over == len(names):
            return None
        message = (
            f"rung {index + 1} of {len(self.rungs)}: {num_over} of {len(names)} trials of {epochs} "
            f"{'epoch' if epochs == 1 else 'epochs'} are over"
        )
        return self._outlook(parts, "tune_student", message, new)

    def _finish(self, parts: Parts, values: Values, teacher_id: str | None) -> Outlook:
        wanted = {STUDENT: self.request.student_recipe(values), ALONE: self.request.alone_recipe(values)}
        new = tuple(
            NewPart(name, recipe, teacher_id, self.request.needs)
            for name, recipe in wanted.items()
            if recipe is not None and name not in parts
        )
        chosen = f" with {describe_values(values)}" if values else ""
        message = f"teaching the student{chosen}"
        if new:
            return self._outlook(parts, "teach_student", message, new)
        student = parts[STUDENT]
        if student.is_over and student.state is not State.SUCCEEDED:
            return self._failed(parts, "teach_student", "the student could not be taught", student)
        if not all(parts[name].is_over for name in wanted if name in parts):
            return self._outlook(parts, "teach_student", message)
        metrics = summarize(self.request, parts, values, self.list_trials(parts))
        outlook = self._outlook(parts, "teach_student", "")
        ending = Ending(
            metrics=metrics,
            report=write_report(self.request, metrics, parts.get(ALONE)),
            artifacts=((STUDENT, "*", ""), *((TEACHER, name, renamed) for name, renamed in RENAMED.items())),
            isolation_of=STUDENT,
        )
        return Outlook(outlook.stage, "", 1.0, ending=ending, notes=outlook.notes)

    def _failed(self, parts: Parts, stage: str, what: str, part: Part) -> Outlook:
        error = part.error or (_NO_OBJECTIVE if part.state is State.SUCCEEDED else _CANCELLED)
        told = error.model_copy(update={"detail": f"{what} (job {part.job_id}): {error.detail}"[:8000]})
        outlook = self._outlook(parts, stage, what)
        return Outlook(stage, what, outlook.fraction, error=told, notes=outlook.notes)

    def _outlook(self, parts: Parts, stage: str, message: str, queue: tuple[NewPart, ...] = ()) -> Outlook:
        return Outlook(stage, message, self._measure_progress(parts), queue, notes=self._tell(parts))

    def _measure_progress(self, parts: Parts) -> float:
        """Return the share of the expected work that is done, counted in epochs."""
        expected: list[tuple[float, list[Part]]] = []

        def expect(epochs: float, names: list[str], count: int) -> None:
            there = [parts[name] for name in names if name in parts]
            expected.append(((epochs + OVERHEAD_EPOCHS) * count, there))

        training = self.request.teacher_training
        if training is not None:
            expect(training.epochs, [TEACHER], 1)
        for index, rung in enumerate(self.rungs):
            names = [name for name in parts if name.startswith(f"trial_{index}_")]
            expect(rung.epochs, names, rung.num_trials)
        finals = [STUDENT] if self.request.alone_recipe() is None else [STUDENT, ALONE]
        expect(self.request.training.epochs, finals, len(finals))
        counts = [rung.num_trials for rung in self.rungs]
        sizes = [*([1] if training is not None else []), *counts, len(finals)]
        done = sum(
            weight * sum(1.0 if part.is_over else part.fraction for part in there) / size
            for (weight, there), size in zip(expected, sizes, strict=True)
        )
        return min(done / sum(weight for weight, _ in expected), 1.0)

    def _tell(self, parts: Parts) -> Mapping[str, str]:
        """Return a sentence about every part that is over."""
        told = {}
        trials = {run.part.name: run for run in self.list_trials(parts)}
        for name, part in parts.items():
            if not part.is_over:
                continue
            words = "the trained teacher was checked" if name == TEACHER_CHECK else f"{name.replace('_', ' ')}"
            if name in trials:
                run = trials[name]
                words = f"trial {run.number} of rung {run.rung + 1} ({describe_values(run.values)})"
            if part.state is not State.SUCCEEDED:
                told[name] = f"{words} {part.state.value}: {part.error.code if part.error else 'no result'}"
            elif name in trials and trials[name].objective is not None:
                told[name] = f"{words}: objective {trials[name].objective:.4g}"
            elif part.metrics is not None and part.metrics.result.quality is not None:
                quality = part.metrics.result.quality
                told[name] = f"{words}: {quality.metric} {quality.value:.4g}"
            else:
                told[name] = words
        return told


assert HANDED_ON in RENAMED

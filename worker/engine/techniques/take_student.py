"""Go on with another model, of the catalogue or uploaded, as the student of a distill step that follows."""

from app.recipes.facts import Capability
from app.recipes.students import TakeStudent
from worker.engine.measure.macs import count_macs
from worker.engine.measure.size import count_parameters
from worker.engine.programs.program import Program
from worker.engine.students.replacement import build_student, take_place
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.summary import find_trainable


def inspect(program: Program) -> Capability:
    """Name the layers with weights: all are replaced. Whether a student fits, it tells itself."""
    found = find_trainable("take_student", program)
    return found.model_copy(update={"missing": None}) if found.applicable else found


def run(program: Program, step: TakeStudent, context: Context) -> Outcome:
    """Return the student in the program's place, under the names of its inputs and outputs."""
    if step.model_id is None:
        student = build_student(step.student, program, context.directory)
    else:
        assert context.open_teacher is not None
        student = take_place(context.open_teacher(step.model_id), program)
    before, after = count_parameters(program).total, count_parameters(student).total
    warnings = list(student.notes)
    if after >= before:
        warnings.append(f"The student has {after:,} parameters, the model it replaces {before:,}: it is no smaller.")
    return Outcome(
        program=student,
        facts={
            "student": step.student,
            "new_weights": step.model_id is None,
            "parameters_before": before,
            "parameters_after": after,
            "macs_before": count_macs(program).total,
            "macs_after": count_macs(student).total,
        },
        warnings=tuple(warnings),
    )

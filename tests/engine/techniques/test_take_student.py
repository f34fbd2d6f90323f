"""Taking a student: the catalogue's architectures fit the teacher's inputs and classes, and misfits are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.recipes.students import TakeStudent
from tests.engine.techniques.learning import context, facts, make_cnn, make_zoo
from worker.engine.errors import RecipeRefused
from worker.engine.programs.program import Program
from worker.engine.techniques import take_student
from worker.engine.techniques.base import Outcome

ID = "mdl_" + "a" * 26


def take(program: Program, student: str, directory: Path, other: Program | None = None, seed: int = 0) -> Outcome:
    step = TakeStudent.model_validate({"kind": "take_student", "student": student})
    torch.manual_seed(seed)
    given = replace(context(None, other), directory=directory)  # type: ignore[arg-type]
    return take_student.run(program, step, given)


def test_an_architecture_takes_the_place_with_the_teachers_sizes_and_names(tmp_path: Path) -> None:
    teacher = make_zoo("vit")
    outcome = take(teacher, "vit:patch=8,width=16,depth=1", tmp_path)
    student = outcome.program
    assert isinstance(student, Program)
    assert [t.name for t in student.signature.inputs] == [t.name for t in teacher.signature.inputs]
    assert [t.name for t in student.signature.outputs] == [t.name for t in teacher.signature.outputs]
    inputs = teacher.example_inputs(3)
    assert student.module.eval()(*inputs)[0].shape == teacher.module.eval()(*inputs)[0].shape
    assert outcome.facts["new_weights"] is True
    assert outcome.facts["parameters_after"] < outcome.facts["parameters_before"]  # type: ignore[operator]


def test_the_seed_decides_the_new_weights(tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        program = take(make_zoo("vit"), "vit:patch=8,width=16,depth=1", tmp_path, seed=seed).program
        assert isinstance(program, Program)
        return torch.cat([parameter.flatten() for parameter in program.module.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_an_uploaded_student_takes_the_place_and_one_that_is_no_smaller_is_told(tmp_path: Path) -> None:
    teacher, student = make_cnn(width=8), make_cnn(width=4)
    assert take(teacher, ID, tmp_path, student).warnings == ()
    assert "no smaller" in take(student, ID, tmp_path, teacher).warnings[0]


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("vit:width=16,depth=1", "vit:width=16,depth=1,patch=N"),
        ("vit:patch=8,width=16,depth=1,num_classes=3", "num_classes=3"),
        ("vit:patch=5,width=16,depth=1", "no multiple of patch"),
        ("gpt:context=8,width=16,depth=1", "the student's inputs are"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path, student: str, words: str) -> None:
    with pytest.raises(RecipeRefused, match=words) as caught:
        take(make_zoo("vit"), student, tmp_path)
    assert caught.value.code == "student_does_not_fit"


def test_an_uploaded_student_with_other_classes_is_refused(tmp_path: Path) -> None:
    teacher = make_cnn(width=8)
    wide = make_cnn(width=4)
    wide.signature = replace(wide.signature, outputs=(facts("output", "float32", "batch", 7),))
    with pytest.raises(RecipeRefused, match="outputs"):
        take(teacher, ID, tmp_path, wide)


def test_an_unknown_architecture_is_refused_by_the_recipe() -> None:
    with pytest.raises(ValueError, match="resnet20"):
        TakeStudent.model_validate({"kind": "take_student", "student": "resnet21"})

"""Another model as teacher, through the real engine process: found by its id, opened from its own file, obeyed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.digits import make_uploads
from tests.engine.process import digest, plan_of, run

pytestmark = pytest.mark.timeout(300)

TEACHER_ID = "mdl_" + "t" * 26


class Linear(nn.Module):
    """A softmax regression of a digit's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(image.flatten(1))
        return logits


class Hidden(nn.Module):
    """The same with a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.classifier = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.relu(self.hidden(image.flatten(1))))
        return logits


def test_a_student_that_knows_nothing_learns_from_another_model(tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    teacher = make_uploads(Hidden(), tmp_path / "teacher", epochs=15)
    student = make_uploads(Linear(), tmp_path / "student", epochs=0)
    step: dict[str, Any] = {"kind": "distill", "teacher_model_id": TEACHER_ID, "label_weight": 0.0, "epochs": 5}
    fields = student.fields([{**step, "learning_rate": 0.02}], target={"num_runs": 10}, outputs={"formats": ["pt2"]})
    fields["recipe"]["target"]["runtime"] = "torch"
    listed = {"id": TEACHER_ID, "file": "teacher0.pt2", "format": "pt2", "sha256": digest(teacher.model)}
    files = {**student.files, "teacher0.pt2": teacher.model}

    metrics = run(tmp_path / "job", plan_of("optimize", teachers=[listed], **fields), files).good.metrics

    assert metrics is not None
    facts = metrics.steps[0].facts
    assert facts["teacher"] == TEACHER_ID
    # It learned from no label, only from the teacher, which is a far better model than the student was.
    assert facts["label_loss_used"] is False
    assert facts["teacher_quality"] > 0.85  # type: ignore[operator]
    assert facts["quality_before"] < 0.4  # type: ignore[operator]
    assert metrics.result.quality is not None
    assert metrics.result.quality.value > 0.8

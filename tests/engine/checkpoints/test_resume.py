"""Every kind that trains is interrupted in the middle and goes on from its checkpoint: the same weights, bit by bit."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.plan import Plan, Progress
from tests.engine.digits import Convolutions, Uploads, make_uploads
from tests.engine.process import plan_of
from tests.engine.simulated_device import DEVICE, simulated_device
from worker.engine.checkpoints.keeper import Checkpoints
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.devices import CPU, device_of
from worker.engine.environment import make_repeatable
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.progress import Reporter, Stage
from worker.engine.steps import Made, expect_steps, run_steps
from worker.engine.training.examples import open_examples

TRAINING = {"epochs": 3, "max_steps": 14, "batch_size": 256, "learning_rate": 0.003}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "finetune": [{"kind": "finetune", **TRAINING, "augmentations": ["flip"]}],
    "train after changes of structure": [
        {"kind": "prune_structured", "ratio": 0.5, "round_to": 8},
        {"kind": "factorize_low_rank"},
        {"kind": "prune_magnitude", "sparsity": 0.3},
        {"kind": "train", **TRAINING, "optimizer": "sgd", "keep_best": False},
    ],
    "distill": [{"kind": "prune_magnitude", "sparsity": 0.5}, {"kind": "distill", **TRAINING}],
    "distill with projections": [
        {"kind": "prune_structured", "ratio": 0.5, "round_to": 8},
        {"kind": "distill", **TRAINING, "optimizer": "rmsprop", "hidden_weight": 0.5},
    ],
    "share_weights": [{"kind": "prune_magnitude", "sparsity": 0.5}, {"kind": "share_weights", "training": TRAINING}],
    "prune_magnitude in rounds": [
        {"kind": "finetune", **TRAINING, "max_steps": 2},
        {"kind": "prune_magnitude", "sparsity": 0.6, "schedule": "cubic", "num_iterations": 4,
         "training": {**TRAINING, "max_steps": 5}},
    ],
    "quantize_aware_training": [
        {"kind": "prune_magnitude", "sparsity": 0.3}, {"kind": "quantize_aware_training", **TRAINING},
    ],
    "quantize_int8": [{"kind": "quantize_int8"}],
}  # fmt: skip
ON_DEVICE = [
    "distill with projections",
    *(pytest.param(case, marks=pytest.mark.long) for case in ("share_weights", "prune_magnitude in rounds")),
]


class Interrupted(BaseException):
    """Stands for the end of the process: nobody handles it."""


@dataclass(frozen=True)
class Job:
    """A recipe on the digits, without the measuring around it."""

    plan: Plan
    uploads: Uploads

    def run(
        self,
        directory: Path,
        *,
        interrupt_at: int | None = None,
        checkpoints: list[Path] | None = None,
        device: torch.device = CPU,
    ) -> Made:
        """Run the steps; `interrupt_at` ends it with the so many-th checkpoint."""
        for name in ("in", "tmp", "out"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        names = []
        for path in checkpoints or []:
            (directory / "in" / path.name).write_bytes(path.read_bytes())
            names.append(path.name)
        plan = self.plan.model_copy(update={"checkpoints": tuple(names)})
        count = 0

        def write(line: bytes) -> None:
            nonlocal count
            with (directory / "lines").open("ab") as file:
                file.write(line)
            count += Progress.model_validate_json(line).checkpoint is not None
            if count == interrupt_at:
                raise Interrupted

        assert plan.recipe is not None
        make_repeatable(1, plan.recipe.seed)
        reporter = Reporter(write)
        reporter.expect([Stage("open_model", 1.0), *expect_steps(plan.recipe)])
        reporter.enter("open_model")
        program = open_program(self.uploads.model, directory / "tmp")
        program.device = device
        assert plan.recipe.data is not None
        files = {each.id: (self.uploads.data, each.format) for each in plan.datasets}
        examples = open_examples(plan.recipe.data, files, program.signature, plan.recipe.seed, directory / "tmp")
        original = program.copy()
        with simulated_device() if device == DEVICE else nullcontext():
            return run_steps(
                plan.recipe, program, examples, num_threads=1, directory=directory / "tmp", reporter=reporter,
                open_original=original.copy, checkpoints=Checkpoints(plan, directory, reporter, StopRequest()),
            )  # fmt: skip


def lines_of(directory: Path) -> list[Progress]:
    return [Progress.model_validate_json(line) for line in (directory / "lines").read_bytes().splitlines()]


def written_in(directory: Path) -> list[Path]:
    """Return the checkpoints that are left, newest first."""
    return sorted((directory / "out" / "checkpoints").iterdir(), reverse=True)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return make_uploads(Convolutions(), tmp_path_factory.mktemp("uploads"), epochs=1)


@pytest.fixture(scope="module")
def make_job(uploads: Uploads) -> Callable[..., Job]:
    def make(case: str, **recipe: Any) -> Job:
        fields = uploads.fields(RECIPES[case], **recipe)
        return Job(plan_of("optimize", **fields, checkpoint_seconds=0), uploads)

    return make


def assert_same(one: Made, other: Made) -> None:
    if isinstance(one.program, FileProgram):
        assert isinstance(other.program, FileProgram)
        assert one.program.path.read_bytes() == other.program.path.read_bytes()
    else:
        assert isinstance(other.program, Program)
        weights = other.program.module.state_dict()
        for name, value in one.program.module.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert {n: m.tolist() for n, m in one.program.masks.items()} == {
            n: m.tolist() for n, m in other.program.masks.items()
        }
        for name, encoding in one.program.encodings.items():
            assert torch.equal(encoding.decode(), other.program.encodings[name].decode())
    for before, after in zip(one.record.steps, other.record.steps, strict=True):
        assert before.model_copy(update={"seconds": 0.0}) == after.model_copy(update={"seconds": 0.0})
    assert one.record.warnings == other.record.warnings
    assert one.record.sensitivity == other.record.sensitivity
    assert one.record.effects == other.record.effects


@pytest.mark.parametrize("case", [case for case in RECIPES if case != "quantize_int8"])
def test_an_interrupted_job_ends_with_the_same_bits(case: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(case)
    whole = job.run(tmp_path / "whole")
    numbers = [index for index, line in enumerate(lines_of(tmp_path / "whole")) if line.checkpoint]
    # Three quarters of the way: in the middle of the last training, behind an epoch's end.
    with pytest.raises(Interrupted):
        job.run(tmp_path / "killed", interrupt_at=len(numbers) * 3 // 4)

    resumed = job.run(tmp_path / "resumed", checkpoints=written_in(tmp_path / "killed"))

    taken_up = [line for line in lines_of(tmp_path / "resumed") if line.resumed]
    assert [line.resumed for line in taken_up] == [written_in(tmp_path / "killed")[0].name]
    assert sum(line.checkpoint is not None for line in lines_of(tmp_path / "resumed")) < len(numbers) // 2
    assert_same(resumed, whole)


@pytest.mark.parametrize("case", ON_DEVICE)
def test_what_was_interrupted_on_a_device_goes_on_there_or_on_the_cpu(
    case: str, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(case)
    whole = job.run(tmp_path / "whole", device=DEVICE)
    numbers = [index for index, line in enumerate(lines_of(tmp_path / "whole")) if line.checkpoint]
    with pytest.raises(Interrupted):
        job.run(tmp_path / "killed", interrupt_at=len(numbers) * 3 // 4, device=DEVICE)

    for device in (DEVICE, CPU):
        place = tmp_path / device.type
        resumed = job.run(place, checkpoints=written_in(tmp_path / "killed"), device=device)

        assert [line.resumed for line in lines_of(place) if line.resumed]
        assert isinstance(resumed.program, Program)
        assert device_of(resumed.program.module) == CPU
        assert_same(resumed, whole)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_final_file_is_kept_for_the_measuring(runtime: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("quantize_int8", target={"runtime": runtime})
    whole = job.run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        job.run(tmp_path / "killed", interrupt_at=1)

    resumed = job.run(tmp_path / "resumed", checkpoints=written_in(tmp_path / "killed"))

    assert isinstance(resumed.program, FileProgram)
    assert resumed.program.path.suffix == {"onnxruntime": ".onnx", "torch": ".pt2"}[runtime]
    assert not list((tmp_path / "resumed" / "tmp").glob("step_*"))
    assert_same(resumed, whole)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """Flip a bit of the header, which is where an engine can see it; the others the digest guards."""
    return data[:40] + bytes([data[40] ^ 0x01]) + data[41:]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[bytes], bytes], make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job("finetune")
    with pytest.raises(Interrupted):
        job.run(tmp_path / "killed", interrupt_at=5)
    newest, before = written_in(tmp_path / "killed")
    newest.write_bytes(damage(newest.read_bytes()))

    job.run(tmp_path / "resumed", checkpoints=[newest, before])

    assert [line.resumed for line in lines_of(tmp_path / "resumed") if line.resumed] == [before.name]


@pytest.mark.parametrize("change", ["seed", "model", "data"])
def test_a_checkpoint_of_other_work_is_left_alone(change: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("finetune")
    with pytest.raises(Interrupted):
        job.run(tmp_path / "killed", interrupt_at=5)
    assert job.plan.model is not None
    other = {
        "seed": make_job("finetune", seed=1).plan,
        "model": job.plan.model_copy(update={"model": job.plan.model.model_copy(update={"sha256": "0" * 64})}),
        "data": job.plan.model_copy(
            update={"datasets": tuple(each.model_copy(update={"sha256": "0" * 64}) for each in job.plan.datasets)}
        ),
    }[change]

    Job(other, job.uploads).run(tmp_path / "resumed", checkpoints=written_in(tmp_path / "killed"))

    assert not [line for line in lines_of(tmp_path / "resumed") if line.resumed]


def test_a_job_goes_on_where_a_checkpoint_cannot_be_written(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("finetune")
    (tmp_path / "job" / "out").mkdir(parents=True)
    (tmp_path / "job" / "out" / "checkpoints").write_text("no folder")

    made = job.run(tmp_path / "job")

    assert len(made.record.steps) == 1
    assert not [line for line in lines_of(tmp_path / "job") if line.checkpoint]


def test_the_time_between_two_checkpoints_is_kept(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("finetune")
    rare = Job(job.plan.model_copy(update={"checkpoint_seconds": 3600.0}), job.uploads)

    rare.run(tmp_path / "job")

    assert not [line for line in lines_of(tmp_path / "job") if line.checkpoint]

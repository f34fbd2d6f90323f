"""All that a job has done so far, as one checkpoint file: finished steps, the program they left, a run in the middle.

A checkpoint belongs to one piece of work: the same model, data, recipe and versions. Any other does not take it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from app.recipes.metrics import LayerEffect, StepMetrics
from app.recipes.plan import Plan
from worker.engine.checkpoints.archive import NotRestorable, Written, read_archive, write_archive
from worker.engine.checkpoints.programs import decode_program, encode_program
from worker.engine.environment import versions
from worker.engine.programs.program import FileProgram, Program
from worker.engine.training.loop import Trained
from worker.engine.training.run import Position, Run, restore

_FORMAT = 3
_CONFIG = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Header(BaseModel):
    """The numbers and words of a checkpoint."""

    model_config = _CONFIG

    work: str
    """What `identify` returns for the plan."""
    step: int
    """Index of the step to go on with; the number of steps where only measuring is left."""
    seconds: float = 0.0
    """Spent in that step so far."""
    steps: tuple[StepMetrics, ...] = ()
    warnings: tuple[str, ...] = ()
    sensitivity: tuple[LayerEffect, ...] = ()
    effects: dict[str, float] = {}
    finished_runs: tuple[Trained, ...] = ()
    """Training runs of that step that are over."""
    position: Position | None = None
    """Of the run that was going on, if there was one."""
    final: tuple[Literal[".onnx", ".pt2"], int, int] | None = None
    """Where the last step left a file: its suffix, numbers stored, and those not zero."""


@dataclass
class Record:
    """What the finished steps have left, the program aside."""

    steps: list[StepMetrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sensitivity: list[LayerEffect] = field(default_factory=list)
    effects: dict[str, float] = field(default_factory=dict)
    """Sensitivities measured so far, shared by the steps; the keys are `Sensitivity`'s."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `structure` None: the program is the model as it was uploaded."""

    header: Header
    structure: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """program/..., run/..., final."""
    path: Path | None = None
    """Where it was read from."""

    def write(self, path: Path) -> Written:
        """Write it, all or nothing. Raises OSError and NotRestorable."""
        texts = {
            "format": str(_FORMAT),
            "header": self.header.model_dump_json(),
            "program": json.dumps(self.structure),
        }
        return write_archive(path, texts, self.tensors)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of one part."""
        start = f"{prefix}/"
        return {name.removeprefix(start): each for name, each in self.tensors.items() if name.startswith(start)}

    def restore_record(self) -> Record:
        """Return what the steps before had left."""
        header = self.header
        return Record(list(header.steps), list(header.warnings), list(header.sensitivity), dict(header.effects))

    def restore_program(self, original: Program) -> Program:
        """Return the program at the begin of the step; `original` is the model as it was uploaded."""
        if self.structure is None:
            return original
        return decode_program(self.structure, self.below("program"), original)

    def restore_run(self, run: Run) -> bool:
        """Put a run where this found it; False where none was going on."""
        if self.header.position is None:
            return False
        restore(run, self.header.position, self.below("run"))
        return True

    def restore_final(self, original: Program, directory: Path) -> FileProgram | None:
        """Write the file that the last step left, if it did, below `directory`."""
        if self.header.final is None:
            return None
        suffix, parameters, nonzero = self.header.final
        path = directory / f"resumed{suffix}"
        path.write_bytes(self.tensors["final"].numpy().tobytes())
        return FileProgram(path, original.signature, parameters, nonzero)


def read_checkpoint(path: Path, work: str) -> Checkpoint:
    """Read a checkpoint of this work. Raises NotRestorable where the file is damaged or of other work."""
    texts, tensors = read_archive(path)
    try:
        if texts["format"] != str(_FORMAT):
            raise NotRestorable(f"{path.name} has format {texts['format'][:20]}, not {_FORMAT}")
        header = Header.model_validate_json(texts["header"])
        structure = json.loads(texts["program"])
    except (KeyError, ValidationError, ValueError) as error:
        raise NotRestorable(f"{path.name} is no checkpoint: {type(error).__name__}") from error
    if header.work != work:
        raise NotRestorable(f"{path.name} is of another model, recipe, data or version")
    return Checkpoint(header, structure, tensors, path)


def encode_parts(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the structure and the tensors of a program as a checkpoint holds them. Raises NotRestorable."""
    structure, tensors = encode_program(program)
    return structure, {f"program/{name}": each for name, each in tensors.items()}


def encode_final(program: FileProgram) -> Tensor:
    """Return the bytes of a final program's file."""
    return torch.frombuffer(bytearray(program.path.read_bytes()), dtype=torch.uint8)


def identify(plan: Plan) -> str:
    """Return the digest of all that decides what the work's result is: files, recipe, versions."""
    assert plan.model is not None
    assert plan.recipe is not None
    parts = {
        "model": [plan.model.sha256, plan.model.format, plan.model.architecture],
        "teachers": [[each.id, each.sha256, each.format, each.architecture] for each in plan.teachers],
        "datasets": [[each.id, each.sha256, each.format] for each in plan.datasets],
        "recipe": _leave_out_plans(plan.recipe.model_dump(mode="json")),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _leave_out_plans(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what decides on how many processes a step trains, which changes no result."""
    steps = [{name: value for name, value in step.items() if name != "parallel"} for step in recipe["steps"]]
    return recipe | {"steps": steps}

"""The whole way in one call, for recipes and distillations: export, upload, submit, wait, result."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.data import bind, write_dataset
from pare.distillations import Distillations
from pare.errors import UsageError
from pare.export import export_module
from pare.progress import ProgressDisplay
from pare.recipes import RecipeLike, complete_recipe
from pare.records import Dataset, Job, Model
from pare.resources import Datasets, Jobs, Models, raise_unless_succeeded
from pare.result import Result

if TYPE_CHECKING:
    from torch import nn


DataLike = Mapping[str, Any] | str | Path
"""Columns by name, the path of a dataset file, or the id of an uploaded dataset."""


class Optimization:
    """One call of Client.optimize or Client.distill: its resources and its display."""

    def __init__(self, models: Models, datasets: Datasets, jobs: Jobs, display: ProgressDisplay) -> None:
        self._models = models
        self._datasets = datasets
        self._jobs = jobs
        self._display = display
        self._notes: list[str] = []

    def run(
        self,
        model: "nn.Module | str | Path",
        example_inputs: Any,
        *,
        recipe: RecipeLike,
        data: DataLike | None,
        evaluation_data: DataLike | None,
        task: str,
        label_column: str | None,
        inputs: Mapping[str, str | dict[str, Any]] | None,
        name: str | None,
        dynamic_batch: bool,
        dynamic_shapes: Any,
        labels: dict[str, str] | None,
        timeout_seconds: float | None,
    ) -> Result:
        """Do it all. Ctrl-C while the job runs detaches from it."""
        with self._display:
            checked_model, binding = self._prepare(
                model, example_inputs, data, evaluation_data, task, label_column, inputs, name, dynamic_batch,
                dynamic_shapes,
            )  # fmt: skip
            job = self._jobs.submit(checked_model.id, complete_recipe(recipe, data=binding), labels=labels)
            job = self._watch(job, timeout_seconds)
        if job.finished:
            raise_unless_succeeded(job)
        return Result(self._jobs, job, tuple(self._notes))

    def distill(
        self,
        distillations: Distillations,
        model: "nn.Module | str | Path",
        example_inputs: Any,
        *,
        distillation: Mapping[str, Any],
        student: "nn.Module | str | Path | None",
        data: DataLike,
        evaluation_data: DataLike | None,
        task: str,
        label_column: str | None,
        inputs: Mapping[str, str | dict[str, Any]] | None,
        labels: dict[str, str] | None,
        timeout_seconds: float | None,
    ) -> Result:
        """Upload teacher, student and data, start the distillation, and wait. Ctrl-C detaches."""
        with self._display:
            teacher, binding = self._prepare(
                model, example_inputs, data, evaluation_data, task, label_column, inputs, None, True, None
            )
            request = {**distillation, "data": {**(binding or {}), **(distillation.get("data") or {})}}
            if student is not None:
                with tempfile.TemporaryDirectory(prefix="pare-") as directory:
                    uploaded = self._send_model(student, example_inputs, None, Path(directory), True, None)
                request["student"] = {"kind": "take_student", "student": self._models.wait(uploaded.id).id}
            request.setdefault("student", {"kind": "derive_student"})
            request.setdefault("training", {"kind": "distill"})
            job = self._watch(distillations.submit(teacher.id, request, labels=labels), timeout_seconds)
        if job.finished:
            raise_unless_succeeded(job)
        return Result(self._jobs, job, tuple(self._notes))

    def _prepare(
        self,
        model: "nn.Module | str | Path",
        example_inputs: Any,
        data: DataLike | None,
        evaluation_data: DataLike | None,
        task: str,
        label_column: str | None,
        inputs: Mapping[str, str | dict[str, Any]] | None,
        name: str | None,
        dynamic_batch: bool,
        dynamic_shapes: Any,
    ) -> tuple[Model, dict[str, Any] | None]:
        """Upload model and data; return the checked model and `recipe.data`."""
        with tempfile.TemporaryDirectory(prefix="pare-") as directory:
            checked_model = self._send_model(
                model, example_inputs, name, Path(directory), dynamic_batch, dynamic_shapes
            )
            dataset = None if data is None else self._send_data(data, name, Path(directory), "data")
            held_out = None
            if evaluation_data is not None:
                held_out = self._send_data(evaluation_data, name, Path(directory), "evaluation data")
        checked_model = self._models.wait(checked_model.id)
        binding = None
        if dataset is not None:
            dataset = self._datasets.wait(dataset.id)
            binding = bind(checked_model, dataset, task=task, label_column=label_column, inputs=inputs)
        if held_out is not None:
            if binding is None:
                raise UsageError("evaluation_data without data", fix="Give both, or data alone.")
            binding["evaluation_dataset_id"] = self._datasets.wait(held_out.id).id
        return checked_model, binding

    def _watch(self, job: Job, timeout_seconds: float | None) -> Job:
        self._display.say(f"job {job.id}")
        try:
            return self._jobs.wait(job.id, timeout_seconds=timeout_seconds, on_event=self._display.event)
        except KeyboardInterrupt:
            print(f"\n{detached(job.id)}", file=sys.stderr)
            return job

    def _send_model(
        self,
        model: "nn.Module | str | Path",
        example_inputs: Any,
        name: str | None,
        directory: Path,
        dynamic_batch: bool,
        dynamic_shapes: Any,
    ) -> Model:
        if isinstance(model, str) and model.startswith("mdl_"):
            return self._models.get(model)
        if isinstance(model, str | Path):
            file = Path(model)
        else:
            if example_inputs is None:
                raise UsageError("example_inputs is missing", fix="Give what the module is called with.")
            self._display.say(f"exporting {type(model).__name__}")
            name = name or type(model).__name__
            exported = export_module(
                model,
                example_inputs,
                directory / "model.pt2",
                dynamic_batch=dynamic_batch,
                dynamic_shapes=dynamic_shapes,
            )
            file = exported.path
            for note in exported.notes:
                self._display.say(f"note: {note}")
            self._notes += exported.notes
        return self._models.upload(file, name=name, on_bytes=self._display.bytes_of("model"))

    def _send_data(self, data: DataLike, name: str | None, directory: Path, what: str) -> Dataset:
        if isinstance(data, str) and data.startswith("dst_"):
            return self._datasets.get(data)
        file = Path(data) if isinstance(data, str | Path) else write_dataset(data, directory / f"{what}.npz")
        return self._datasets.upload(file, name=name, on_bytes=self._display.bytes_of(what))


def detached(job_id: str) -> str:
    """Return what to tell a user who pressed Ctrl-C while a job runs."""
    return (
        f"Detached; the job goes on. Come back with `pare jobs wait {job_id}` or Client().result({job_id!r}); "
        f"end it with `pare jobs cancel {job_id}`."
    )

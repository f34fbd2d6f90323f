"""The whole way in one call, for recipes and distillations: export, upload, submit, wait, result."""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Given:
    """Model and data as the caller has them; what each is, `Client.optimize` says."""

    model: "nn.Module | str | Path"
    example_inputs: Any
    data: DataLike | None
    evaluation_data: DataLike | None
    task: str
    label_column: str | None
    inputs: Mapping[str, str | dict[str, Any]] | None
    name: str | None = None
    dynamic_batch: bool = True
    dynamic_shapes: Any = None


class Optimization:
    """One call of Client.optimize or Client.distill: its resources and its display."""

    def __init__(self, models: Models, datasets: Datasets, jobs: Jobs, display: ProgressDisplay) -> None:
        self._models = models
        self._datasets = datasets
        self._jobs = jobs
        self._display = display
        self._notes: list[str] = []

    def run(self, given: Given, recipe: RecipeLike, *, timeout_seconds: float | None, **options: Any) -> Result:
        """Do it all; `options` are those of Jobs.submit. Ctrl-C while the job runs detaches from it."""

        def submit(model: Model, binding: dict[str, Any] | None) -> Job:
            return self._jobs.submit(model.id, complete_recipe(recipe, data=binding), **options)

        return self._conduct(given, submit, timeout_seconds)

    def distill(
        self,
        given: Given,
        distillations: Distillations,
        distillation: Mapping[str, Any],
        student: "nn.Module | str | Path | None",
        *,
        timeout_seconds: float | None,
        **options: Any,
    ) -> Result:
        """Upload teacher, student and data, start the distillation, and wait. Ctrl-C detaches.

        `options` are those of Distillations.submit.
        """

        def submit(teacher: Model, binding: dict[str, Any] | None) -> Job:
            request = {**distillation, "data": {**(binding or {}), **(distillation.get("data") or {})}}
            if student is not None:
                with tempfile.TemporaryDirectory(prefix="pare-") as directory:
                    uploaded = self._send_model(replace(given, model=student, name=None), Path(directory))
                request["student"] = {"kind": "take_student", "student": self._models.wait(uploaded.id).id}
            request.setdefault("student", {"kind": "derive_student"})
            request.setdefault("training", {"kind": "distill"})
            return distillations.submit(teacher.id, request, **options)

        return self._conduct(given, submit, timeout_seconds)

    def _conduct(
        self, given: Given, submit: Callable[[Model, dict[str, Any] | None], Job], timeout_seconds: float | None
    ) -> Result:
        with self._display:
            job = self._watch(submit(*self._prepare(given)), timeout_seconds)
        if job.finished:
            raise_unless_succeeded(job)
        return Result(self._jobs, job, tuple(self._notes))

    def _prepare(self, given: Given) -> tuple[Model, dict[str, Any] | None]:
        """Upload model and data; return the checked model and `recipe.data`."""
        dataset = held_out = None
        with tempfile.TemporaryDirectory(prefix="pare-") as directory:
            checked_model = self._send_model(given, Path(directory))
            if given.data is not None:
                dataset = self._send_data(given.data, given.name, Path(directory), "data")
            if given.evaluation_data is not None:
                held_out = self._send_data(given.evaluation_data, given.name, Path(directory), "evaluation data")
        checked_model = self._models.wait(checked_model.id)
        binding = None
        if dataset is not None:
            dataset = self._datasets.wait(dataset.id)
            binding = bind(
                checked_model, dataset, task=given.task, label_column=given.label_column, inputs=given.inputs
            )
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

    def _send_model(self, given: Given, directory: Path) -> Model:
        model, name = given.model, given.name
        if isinstance(model, str) and model.startswith("mdl_"):
            return self._models.get(model)
        if isinstance(model, str | Path):
            file = Path(model)
        else:
            if given.example_inputs is None:
                raise UsageError("example_inputs is missing", fix="Give what the module is called with.")
            self._display.say(f"exporting {type(model).__name__}")
            name = name or type(model).__name__
            exported = export_module(
                model,
                given.example_inputs,
                directory / "model.pt2",
                dynamic_batch=given.dynamic_batch,
                dynamic_shapes=given.dynamic_shapes,
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

"""A distillation in a small world, whose parts end as the test says: through the same use cases as real workers."""

from typing import Any

from sqlalchemy import select

from app import jobs
from app.db.tables import ArtifactRow, JobRow
from app.jobs.advance import advance_parents
from app.jobs.parents import Part, read_parts
from app.jobs.submit_distillation import submit_distillation
from app.recipes.facts import Capability
from app.recipes.metrics import Metrics
from app.recipes.pipelines import Distillation
from app.recipes.plan import ArtifactFile, EngineError, EngineResult
from app.recipes.recipe import Recipe
from app.storage import Blob, Storage, owner_storage
from tests.app.jobs.world import OWNER, REFUSAL, World, model_facts

FILES = ("manifest.json", "model.onnx", "model.pt2", "report.md")
LATENCY = {
    "batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "mean_ms": 1.0,
}  # fmt: skip


def make_metrics(quality: float, choosing: float, *, teacher: float = 0.9, parameters_ratio: float = 0.25) -> Metrics:
    """Return what the engine would report of a student: quality held out, and on the rows it chose by."""

    def measure(value: float, parameters: int) -> dict[str, Any]:
        return {
            "quality": {
                "metric": "accuracy", "value": value, "higher_is_better": True, "num_examples": 400,
                "standard_error": 0.01,
            },
            "latency": LATENCY, "throughput_per_second": 1.0, "peak_memory_bytes": 1, "file_bytes": 4 * parameters,
            "parameters": parameters, "nonzero_parameters": parameters, "macs": parameters,
        }  # fmt: skip

    return Metrics.model_validate(
        {
            "baseline": measure(teacher, 1000),
            "result": measure(quality, round(1000 * parameters_ratio)),
            "comparison": {
                "latency_ratio": {"value": 0.5, "low": 0.4, "high": 0.6}, "file_ratio": parameters_ratio,
                "parameters_ratio": parameters_ratio, "macs_ratio": parameters_ratio, "peak_memory_ratio": None,
                "quality_change": quality - teacher, "equivalence": [],
            },
            "steps": [
                {"index": 0, "kind": "distill", "seconds": 1.0, "facts": {"quality_after": choosing}, "parameters": 1,
                 "nonzero_parameters": 1, "macs": 1},
            ],
            "layers": [],
            "verdict": {"outcome": "mixed", "summary": "smaller, less accurate"},
            "environment": {
                "processor": "x", "num_cores": 1, "runtime": "onnxruntime", "num_threads": 1, "versions": {},
            },
        }
    )  # fmt: skip


class PipelineWorld(World):
    """Submits distillations, advances them as the dispatcher does, and ends their parts as workers do."""

    storage: Storage

    def describe(self, **changes: Any) -> Distillation:
        data = {
            "dataset_id": self.add_dataset(), "inputs": {"x": {"column": "image", "scale": 0.5}},
            "label_column": "label", "task": "classification",
        }  # fmt: skip
        request: dict[str, Any] = {
            "teacher_training": {"kind": "finetune", "epochs": 2},
            "student": {"kind": "derive_student", "width": 0.5},
            "training": {"kind": "distill", "epochs": 9},
            "data": data,
        }
        return Distillation.model_validate(request | changes)

    def distill(self, request: Distillation | None = None, **options: Any) -> str:
        facts = model_facts(
            capabilities=[
                Capability(kind="prune_structured", applicable=True, layers=("conv",), missing=None),
                Capability(kind="derive_student", applicable=True, layers=(), missing="no residual block repeats"),
            ]
        )
        given: dict[str, Any] = {"labels": {}, "priority": 0, "deadline_seconds": None, **options}
        model_id = given.pop("model_id", None) or self.add_model(facts=facts)
        request = request or self.describe()
        with self.database.session() as session:
            return submit_distillation(
                session, self.settings, owner=OWNER, model_id=model_id, request=request, **given
            ).id

    def advance(self) -> int:
        """Let every parent go on by one look."""
        return advance_parents(self.database, self.settings, self.storage)

    def settle(self) -> None:
        """Let every parent go on until nothing changes."""
        for _ in range(50):
            if not self.advance():
                return
        raise AssertionError("the parents never come to rest")

    def parts(self, parent_id: str) -> dict[str, Part]:
        with self.database.read() as session:
            return read_parts(session, parent_id)

    def waiting(self, parent_id: str) -> list[str]:
        """Return the parts that a worker could take."""
        return sorted(part.name for part in self.parts(parent_id).values() if part.state is jobs.State.QUEUED)

    def recipe(self, parent_id: str, name: str) -> Recipe:
        return Recipe.model_validate(self.job(self.parts(parent_id)[name].job_id).recipe)

    def finish(self, parent_id: str, name: str, quality: float = 0.8, choosing: float | None = None) -> None:
        """Let a worker run a part, and succeed."""
        claim = self.start(self.parts(parent_id)[name].job_id)
        if claim.action == "check_model":
            result, blobs = EngineResult(model=model_facts()), {}
        else:
            with owner_storage(self.storage, OWNER).writer() as writer:
                writer.write(f"{parent_id} {name}".encode())
                blob = writer.commit()
            blobs = dict.fromkeys(FILES, blob)
            files = [
                ArtifactFile(name=file, media_type="a/b", size_bytes=blob.size_bytes, sha256=blob.sha256)
                for file in FILES
            ]
            metrics = make_metrics(quality, quality if choosing is None else choosing)
            result = EngineResult(metrics=metrics, artifacts=tuple(files))
        with self.database.session() as session:
            assert jobs.succeed(session, claim, result, blobs, ["bubblewrap"])

    def break_part(self, parent_id: str, name: str, error: EngineError = REFUSAL) -> None:
        """Let a worker run a part, and fail."""
        assert self.fail(self.start(self.parts(parent_id)[name].job_id), error)

    def artifacts(self, job_id: str) -> dict[str, Blob]:
        with self.database.read() as session:
            rows = session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job_id))
            return {row.name: Blob(row.sha256, row.size_bytes) for row in rows}

    def read_text(self, job_id: str, name: str) -> str:
        return b"".join(owner_storage(self.storage, OWNER).open(self.artifacts(job_id)[name].sha256)).decode()

    def count_jobs(self) -> int:
        with self.database.read() as session:
            return len(session.scalars(select(JobRow.id)).all())

"""Records of the service as tables for people."""

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pare.distillations import Distillation
from pare.records import Dataset, Job, JobProgress, Key, Model, Needs, Place, Technique, Worker
from pare.report import human_bytes, verdict_text


def grid(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """Return a table with these rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def keys_table(keys: Iterable[Key]) -> Table:
    """Return a list of keys."""
    rows = (
        (
            key.id,
            key.owner,
            ", ".join(key.scopes),
            "revoked" if key.revoked_at else f"until {key.expires_at}" if key.expires_at else "valid",
            key.last_used_at or "never",
            key.name,
        )
        for key in keys
    )
    return grid(("id", "owner", "scopes", "state", "last used", "name"), rows)


def models_table(models: Iterable[Model]) -> Table:
    """Return a list of models."""
    titles = ("id", "name", "state", "size", "parameters", "created")
    return grid(
        titles,
        (
            (
                m.id,
                m.name or "",
                m.state,
                human_bytes(m.size_bytes),
                f"{m.facts.parameters:,}" if m.facts else "",
                m.created_at,
            )
            for m in models
        ),
    )


def model_page(model: Model) -> RenderableType:
    """Return one model with what its check found."""
    parts: list[RenderableType] = [models_table([model])]
    if model.error is not None:
        parts.append(f"rejected: {model.error.code}: {model.error.detail}\nfix: {model.error.fix}")
    if model.facts is not None:
        facts = model.facts
        rows = [("input", t.name, t.dtype, str(list(t.shape))) for t in facts.inputs]
        rows += [("output", t.name, t.dtype, str(list(t.shape))) for t in facts.outputs]
        parts += ["", grid(("", "name", "dtype", "shape"), rows), ""]
        parts.append(
            grid(
                ("technique", "applies", "layers", "missing"),
                (
                    (c.kind, "yes" if c.applicable else "no", str(len(c.layers)), c.missing or "")
                    for c in facts.capabilities
                ),
            )
        )
        parts += [f"! {warning}" for warning in facts.warnings]
    return Group(*parts)


def architectures_table(items: Iterable[dict[str, Any]]) -> Table:
    """Return the architectures with their parameters."""
    rows = ((i["name"], ", ".join(p["name"] for p in i["parameters"]), i["weights"]) for i in items)
    return grid(("name", "parameters", "names of the weights"), rows)


def datasets_table(datasets: Iterable[Dataset]) -> Table:
    """Return a list of datasets."""
    return grid(
        ("id", "name", "state", "size", "rows", "created"),
        (
            (
                d.id,
                d.name or "",
                d.state,
                human_bytes(d.size_bytes),
                f"{d.facts.num_rows:,}" if d.facts else "",
                d.created_at,
            )
            for d in datasets
        ),
    )


def dataset_page(dataset: Dataset) -> RenderableType:
    """Return one dataset with its columns."""
    parts: list[RenderableType] = [datasets_table([dataset])]
    if dataset.error is not None:
        parts.append(f"rejected: {dataset.error.code}: {dataset.error.detail}\nfix: {dataset.error.fix}")
    if dataset.facts is not None:
        rows = ((c.name, c.dtype, str(list(c.shape))) for c in dataset.facts.columns)
        parts += ["", grid(("column", "dtype", "shape of a row"), rows)]
        if dataset.facts.classes:
            names = (f"{number} {name}" for number, name in enumerate(dataset.facts.classes[:20]))
            parts += ["", f"{len(dataset.facts.classes)} classes: " + ", ".join(names)]
    return Group(*parts)


def steps_of(job: Job) -> str:
    """Return the kinds of a job's steps; a job without a recipe is made of others."""
    if job.recipe is None:
        return "(distillation)"
    return " ".join(step.get("kind", "?") for step in job.recipe.get("steps", ()))


def jobs_table(jobs: Iterable[Job]) -> Table:
    """Return a list of jobs."""
    return grid(
        ("id", "status", "stage", "done", "steps", "verdict", "created"),
        (
            (
                j.id,
                "cannot run" if j.waiting is not None else j.status,
                j.stage or "",
                f"{j.progress.fraction:.0%}" if j.progress else "",
                steps_of(j),
                j.verdict.outcome if j.verdict else "",
                j.created_at,
            )
            for j in jobs
        ),
    )


def job_page(job: Job) -> RenderableType:
    """Return one job."""
    facts = [
        ("id", job.id),
        ("status", job.status),
        ("stage", job.stage or ""),
        ("done", _progress(job.progress)),
        ("worker", job.worker or ""),
        ("jobs ahead", "" if job.num_jobs_ahead is None else str(job.num_jobs_ahead)),
        ("needs", _needs(job.needs) if job.needs is not None and job.recipe is not None else ""),
        ("attempt", f"{job.attempt} of {job.max_attempts}"),
        ("checkpoint", _place(job.checkpoint)),
        ("resumed", _place(job.resumed_from)),
        ("model", job.model_id),
        ("steps", steps_of(job)),
        ("isolation", ", ".join(job.isolation)),
        ("created", job.created_at),
        ("started", job.started_at or ""),
        ("finished", job.finished_at or ""),
    ]
    # Most jobs have no checkpoint, were not resumed, and do not wait.
    parts: list[RenderableType] = [grid(("", ""), [(name, text) for name, text in facts if text])]
    if job.waiting is not None:
        parts.append(f"waiting ({job.waiting.reason}): {job.waiting.detail}\nfix: {job.waiting.fix}")
    if job.error is not None:
        parts.append(f"error {job.error.code}: {job.error.detail}\nfix: {job.error.fix}")
    if job.verdict is not None:
        parts.append(verdict_text(job.verdict))
    return Group(*parts)


def distillation_page(found: Distillation) -> RenderableType:
    """Return a distillation with its parts and trials."""
    parts = (
        (
            p.part,
            p.job_id,
            "cannot run" if p.waiting is not None else p.status,
            p.stage or "",
            _progress(p.progress),
            p.worker or "",
            p.error.code if p.error is not None else "",
        )
        for p in found.parts
    )
    trials = (
        (
            str(t.rung + 1),
            str(t.number),
            str(t.epochs),
            ", ".join(f"{name} {value:g}" for name, value in t.values.items()),
            "" if t.objective is None else f"{t.objective:.4f}",
            t.outcome,
            t.why,
        )
        for t in found.trials
    )
    shown: list[RenderableType] = [
        job_page(found.job), "", grid(("part", "job", "status", "stage", "done", "worker", "error"), parts)
    ]  # fmt: skip
    if found.trials:
        shown += ["", grid(("rung", "trial", "epochs", "values", "objective", "outcome", "why"), trials)]
    return Group(*shown)


def workers_table(workers: Iterable[Worker]) -> Table:
    """Return the workers with what each has for a job."""
    return grid(
        ("id", "accepts", "GPUs", "memory", "threads", "running", "torch", "seen"),
        (
            (
                w.id,
                _accepted(w),
                ", ".join(f"{gpu.index} {gpu.name}" for gpu in w.devices),
                human_bytes(w.memory_bytes),
                str(w.num_threads),
                f"{w.load.num_running} of {w.load.capacity}",
                w.versions.get("torch") or "",
                w.seen_at,
            )
            for w in workers
        ),
    )


def _progress(progress: JobProgress | None) -> str:
    if progress is None:
        return ""
    left = f", about {progress.eta_seconds:.0f} s left" if progress.eta_seconds else ""
    return f"{progress.fraction:.0%}{left} {progress.message or ''}".strip()


def _place(place: Place | None) -> str:
    if place is None:
        return ""
    size = "" if place.size_bytes is None else f", {human_bytes(place.size_bytes)}"
    at = "" if place.created_at is None else f", {place.created_at}"
    return f"at {place.fraction:.0%}, in {place.stage}{size}{at}"


def _needs(needs: Needs) -> str:
    parts = [f"{needs.num_devices} GPU" if needs.device == "gpu" else "CPU"]
    parts += [f"{human_bytes(needs.memory_bytes)} of memory"] if needs.memory_bytes else []
    parts += [f"{needs.num_threads} threads"] if needs.num_threads > 1 else []
    return ", ".join(parts)


def _accepted(worker: Worker) -> str:
    if worker.stopping:
        return "nothing: it is stopping"
    return ", ".join(worker.accepts) if worker.accepts_jobs else "nothing: it cannot isolate jobs"


def techniques_table(techniques: Iterable[Technique]) -> Table:
    """Return the techniques."""
    return grid(
        ("kind", "family", "needs", "leaves", "summary"),
        ((t.kind, t.family, t.needs, t.leaves, t.summary) for t in techniques),
    )


def technique_page(technique: Technique) -> RenderableType:
    """Return one technique with its parameters."""
    rows = []
    for name, field in technique.schema.get("properties", {}).items():
        if name != "kind":
            default = technique.defaults.get(name, "required")
            rows.append((name, str(default), " ".join(str(field.get("description", "")).split())))
    parts: list[RenderableType] = [
        f"{technique.kind} ({technique.family}): {technique.summary}",
        f"needs {technique.needs}; leaves {technique.leaves}",
        "",
        grid(("parameter", "default", "meaning"), rows),
    ]
    parts += [f"! {kind} must not follow: {reason}" for kind, reason in technique.undone_by.items()]
    return Group(*parts)

"""Distillations: jobs that train a teacher, try hyper-parameters and teach a student. The rest of them is in jobs."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from pare.metrics import Trial
from pare.records import Error, Job, JobProgress, Wait, read
from pare.transport import Transport


@dataclass(frozen=True)
class Part:
    """One job of a distillation."""

    part: str
    job_id: str
    status: str
    stage: str | None = None
    progress: JobProgress | None = None
    attempt: int = 0
    worker: str | None = None
    waiting: Wait | None = None
    error: Error | None = None


@dataclass(frozen=True)
class Distillation:
    """A distillation and its parts."""

    job: Job
    distillation: dict[str, Any]
    parts: tuple[Part, ...] = ()
    trials: tuple[Trial, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


class Distillations:
    """Requests to teach a student."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(
        self,
        model_id: str,
        distillation: dict[str, Any],
        *,
        labels: dict[str, str] | None = None,
        priority: int | None = None,
        deadline_seconds: int | None = None,
        webhook_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Start a distillation of this teacher. It exists once, however often a broken connection made us ask."""
        body = {
            "model_id": model_id,
            "distillation": distillation,
            "labels": labels,
            "priority": priority,
            "deadline_seconds": deadline_seconds,
            "webhook_id": webhook_id,
        }
        body = {name: value for name, value in body.items() if value is not None}
        headers = {"Idempotency-Key": f'"{idempotency_key or uuid.uuid4()}"'}
        response = self._transport.request("POST", "/v1/distillations", json=body, headers=headers, repeatable=True)
        return read(Job, response.json())

    def validate(self, model_id: str, distillation: dict[str, Any]) -> dict[str, Any]:
        """Check a distillation without starting it; returns how many jobs it would run, and which no worker could."""
        body = {"model_id": model_id, "distillation": distillation}
        answer: dict[str, Any] = self._transport.request(
            "POST", "/v1/distillations", params={"dry_run": "true"}, json=body, repeatable=True
        ).json()
        return answer

    def get(self, job_id: str) -> Distillation:
        """Return a distillation with its stages and trials as they are now."""
        return read(Distillation, self._transport.get(f"/v1/distillations/{job_id}"))

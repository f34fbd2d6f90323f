"""Distillations over HTTP: accepted as one job, shown with their parts, kept apart from ordinary jobs and models."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app import jobs
from app.db.session import Database
from app.recipes.plan import Progress
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.pipeline_world import PipelineWorld

TUNING = {"num_trials": 4, "reduction": 2, "temperature": [2.0, 8.0], "label_weight": [0.1, 0.5]}


@pytest.fixture
def world(sqlite_database: Database, settings: Settings, storage: Storage) -> PipelineWorld:
    world = PipelineWorld(sqlite_database, settings)
    world.storage = storage
    return world


def body(world: PipelineWorld, **changes: Any) -> dict[str, Any]:
    return {"model_id": world.model_id, "distillation": world.describe(**changes).model_dump(mode="json")}


def test_a_distillation_is_one_job_whose_parts_are_listed_on_demand(client: TestClient, world: PipelineWorld) -> None:
    answer = client.post("/v1/distillations", json=body(world), headers={"Idempotency-Key": "one"})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["recipe"], job["links"]["distillation"]) == (
        "running", None, f"/v1/distillations/{job['id']}",
    )  # fmt: skip
    world.settle()

    assert [each["id"] for each in client.get("/v1/jobs").json()["items"]] == [job["id"]]
    parts = client.get("/v1/jobs", params={"parent_id": job["id"]}).json()["items"]
    assert [each["parent_id"] for each in parts] == [job["id"]]
    view = client.get(f"/v1/distillations/{job['id']}").json()
    assert [(part["part"], part["job_id"], part["status"]) for part in view["parts"]] == [
        ("teacher", parts[0]["id"], "queued")
    ]
    assert client.post(f"/v1/jobs/{parts[0]['id']}/cancel").json()["code"] == "job_is_a_part"
    assert client.get(f"/v1/distillations/{parts[0]['id']}").status_code == 404


def test_stages_trials_metrics_and_artifacts_are_served(client: TestClient, world: PipelineWorld) -> None:
    parent = world.distill(world.describe(tuning=TUNING))
    world.settle()
    world.finish(parent, "teacher")
    world.settle()
    world.finish(parent, "teacher_check")
    world.settle()
    made = world.parts(parent)["teacher_check"].model_id
    assert made not in {each["id"] for each in client.get("/v1/models").json()["items"]}
    assert client.delete(f"/v1/models/{made}").json()["code"] == "model_in_use"
    for number in range(4):
        world.finish(parent, f"trial_0_{number}", choosing=0.1 * number)
    world.settle()
    trials = client.get(f"/v1/distillations/{parent}").json()["trials"]
    assert [trial["outcome"] for trial in trials] == [
        "stopped",
        "stopped",
        "advanced",
        "advanced",
        "running",
        "running",
    ]
    for name in ("trial_1_2", "trial_1_3"):
        world.finish(parent, name, choosing=0.5)
    world.settle()
    for name in ("student", "student_alone"):
        world.finish(parent, name)
    world.settle()
    assert client.get(f"/v1/jobs/{parent}").json()["status"] == "succeeded"
    metrics = client.get(f"/v1/jobs/{parent}/metrics").json()
    assert [each["name"] for each in metrics["distillation"]["candidates"]] == ["teacher", "student_alone", "student"]
    names = {each["name"] for each in client.get(f"/v1/jobs/{parent}/artifacts").json()["items"]}
    assert {"model.pt2", "teacher.pt2", "report.md"} <= names
    assert client.delete(f"/v1/jobs/{parent}").status_code == 204
    assert client.get(f"/v1/models/{made}").status_code == 404


def test_parts_show_where_they_are_and_who_runs_them(client: TestClient, world: PipelineWorld) -> None:
    parent = world.distill()
    world.settle()
    (part,) = client.get(f"/v1/distillations/{parent}").json()["parts"]
    assert part["waiting"]["reason"] == "no_worker"
    assert client.get(f"/v1/jobs/{parent}").json()["waiting"]["detail"].startswith("teacher: no worker")
    assert client.get(f"/v1/jobs/{parent}/logs").json()["fix"] == f"GET /v1/jobs?parent_id={parent} lists them."
    claim = world.start(part["job_id"], worker_id="w7")
    progress = Progress(stage="finetune", step=0, fraction=0.5, eta_seconds=7.0, message="step 3 of 9")
    with world.database.session() as session:
        assert jobs.record_progress(session, claim.job_id, claim.epoch, progress)
    (part,) = client.get(f"/v1/distillations/{parent}").json()["parts"]
    assert (part["stage"], part["worker"], part["attempt"], part["waiting"]) == ("finetune", "w7", 1, None)
    assert part["progress"] == {"fraction": 0.5, "eta_seconds": 7.0, "message": "step 3 of 9"}


def test_messages_about_stages_use_the_words_of_the_request(client: TestClient, world: PipelineWorld) -> None:
    request = body(world)
    request["distillation"]["data"] |= {"task": "none", "label_column": None}
    answer = client.post("/v1/distillations", json=request).json()
    assert answer["errors"][0]["detail"] == "finetune needs labels; set data.label_column and data.task"


def test_a_dry_run_counts_the_jobs_and_queues_none(client: TestClient, world: PipelineWorld) -> None:
    answer = client.post("/v1/distillations", json=body(world, tuning=TUNING), params={"dry_run": "true"}).json()
    assert answer["rungs"] == [{"num_trials": 4, "epochs": 2}, {"num_trials": 2, "epochs": 4}]
    assert answer["num_jobs"] == 1 + 4 + 2 + 2
    assert [stage["part"] for stage in answer["stages"]] == ["teacher", "trials", "student", "student_alone"]
    assert {stage["waiting"]["reason"] for stage in answer["stages"]} == {"no_worker"}
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"kind": "distill", "keep_best": False}, "tuning": {}}, "keep_best"),
        ({"tuning": {"num_trials": 9, "temperature": [2.0], "label_weight": []}}, "combinations"),
        ({"tuning": {"width": [0.5, 1.0]}}, "width and depth are both 1"),
        ({"student": {"kind": "take_student", "student": "resnet21"}}, "resnet20"),
        ({"training": {"kind": "distill", "teacher_model_id": "mdl_" + "a" * 26}}, "the teacher is the model"),
        ({"student": {"kind": "take_student", "student": "vit"}}, "/distillation/student/student"),
        ({"needs": {"device": "cpu"}, "target": {"device": "cuda", "runtime": "torch"}}, "leave out needs.device"),
    ],
    ids=[
        "no-rows-apart",
        "too-many-trials",
        "width-one",
        "unknown-architecture",
        "other-teacher",
        "sizes-missing",
        "no-gpu-to-measure-on",
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    client: TestClient, world: PipelineWorld, changes: dict[str, Any], words: str
) -> None:
    request = body(world)
    request["distillation"] |= changes
    answer = client.post("/v1/distillations", json=request)
    assert answer.status_code == 422
    assert words in answer.text

"""Jobs over HTTP, from submission to deletion."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.db.clock import db_now
from app.db.tables import JobRow, LogRow
from app.jobs import Place, StoredCheckpoint, record_checkpoint, record_resumed, register_worker
from app.recipes.needs import Needs
from app.recipes.pruning import PruneMagnitude
from app.storage import Storage, checkpoint_storage, owner_storage
from tests.app.jobs.world import REFUSAL, World

Both = tuple[TestClient, World]
RECIPE = {"steps": [{"kind": "prune_magnitude"}]}


def submit(both: Both, **changes: Any) -> Any:
    client, world = both
    return client.post("/v1/jobs", json={"model_id": world.model_id, "recipe": RECIPE, **changes})


def test_submitted_job_is_durable_and_shown_with_all_its_defaults(both: Both) -> None:
    client, world = both
    answer = submit(both, labels={"team": "vision"}, priority=3, deadline_seconds=60)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["attempt"], job["max_attempts"]) == ("queued", 0, 3)
    assert (job["labels"], job["priority"], job["deadline_seconds"]) == ({"team": "vision"}, 3, 60)
    assert job["recipe"]["steps"] == [PruneMagnitude(kind="prune_magnitude").model_dump(mode="json")]
    assert world.outbox() == [job["id"]]
    assert client.get(job["links"]["self"]).json() == job
    assert job["num_jobs_ahead"] == 0
    assert client.get("/v1/jobs").json()["items"] == [job | {"num_jobs_ahead": None}]


def test_dry_run_checks_everything_and_queues_nothing(both: Both) -> None:
    client, world = both
    world.submit()
    body = {"model_id": world.model_id, "recipe": RECIPE}
    answer = client.post("/v1/jobs?dry_run=true", json=body)
    assert answer.status_code == 200
    assert answer.json() == {
        "valid": True,
        "formats": ["onnx", "pt2", "safetensors", "packed"],
        "form": "module",
        "deadline_seconds": 21600,
        "num_jobs_ahead": 1,
        "needs": {"device": "cpu", "num_devices": 0, "memory_bytes": 0, "num_threads": 1},
        "waiting": answer.json()["waiting"],
    }
    assert answer.json()["waiting"]["reason"] == "no_worker"
    assert len(world.outbox()) == 1
    wrong = client.post("/v1/jobs?dry_run=true", json=body | {"model_id": "mdl_" + "a" * 26})
    assert wrong.status_code == 422


def test_every_mistake_is_named_with_its_place(both: Both) -> None:
    recipe = {
        "steps": [{"kind": "prune_magnitude", "sparsity": 5}, {"kind": "melt"}, {"kind": "finetune", "epochs": "3"}],
        "surprise": 1,
    }
    answer = submit(both, recipe=recipe, priority=11, labels={"a b": "x"}, webhook="http://x")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    details = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert "no such field" in details["/recipe/surprise"]
    assert details["/recipe/steps/1"].startswith("there is no 'melt'; known are 'train', 'take_student', 'derive")
    assert set(details) == {
        "/recipe/steps/0/sparsity",
        "/recipe/steps/1",
        "/recipe/steps/2/epochs",
        "/recipe/surprise",
        "/priority",
        "/labels/a b",
        "/webhook",
    }


def test_places_are_in_the_body_and_words_are_those_of_json(both: Both) -> None:
    steps = [
        {"kind": "finetune", "batch_size": 1, "parallel": {"data": 2}},
        {"kind": "finetune", "parallel": "ddp", "augmentations": "flip"},
    ]
    details = {each["pointer"]: each["detail"] for each in submit(both, recipe={"steps": steps}).json()["errors"]}
    assert details == {
        "/recipe/steps/0": "batch_size 1 is less than data 2: every part needs an example",
        "/recipe/steps/1/parallel": "this must be an object: {...}",
        "/recipe/steps/1/augmentations": "this must be a list: [...]",
    }


def test_mistakes_against_the_model_are_named_too(both: Both) -> None:
    recipe = {"steps": [{"kind": "prune_magnitude", "skip_layers": ["convv"]}]}
    (error,) = submit(both, recipe=recipe).json()["errors"]
    assert error["pointer"] == "/recipe/steps/0/skip_layers/0"
    assert "did you mean 'conv'" in error["detail"]


def test_models_that_are_not_ready_are_conflicts(both: Both) -> None:
    world = both[1]
    checking, rejected = world.add_model("checking"), world.add_model("rejected")
    answer = submit(both, model_id=checking)
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (409, "model_not_ready", True)
    answer = submit(both, model_id=rejected)
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (409, "model_rejected", False)


GPU_WORKER = {"accepts": ["gpu"], "devices": [{"index": 3, "name": "G", "memory_bytes": 5, "uuid": None}],
              "memory_bytes": 2**34, "num_threads": 4, "versions": {"torch": "2.13.0"}, "slot": 1}  # fmt: skip


def register(world: World, facts: dict[str, Any]) -> None:
    with world.database.session() as session:
        register_worker(session, "w1", host="h", queue="pare.gpu", facts=facts)


@pytest.mark.parametrize(
    ("needs", "shown"),
    [
        ({}, ("cpu", 0, 0, 1)),
        ({"device": "gpu"}, ("gpu", 1, 0, 1)),
        ({"num_devices": 2, "memory_bytes": 7}, ("gpu", 2, 7, 1)),
        ({"num_devices": 0, "num_threads": 3}, ("cpu", 0, 0, 3)),
    ],
)
def test_needs_are_completed_and_shown(client: TestClient, world: World, needs: Any, shown: tuple[Any, ...]) -> None:
    body = {"model_id": world.model_id, "recipe": RECIPE, "needs": needs}
    job = client.post("/v1/jobs", json=body).json()
    assert tuple(job["needs"].values()) == shown
    assert client.post("/v1/jobs?dry_run=true", json=body).json()["needs"] == job["needs"]


@pytest.mark.parametrize(
    ("needs", "detail"),
    [
        ({"device": "cpu", "num_devices": 1}, "num_devices counts GPUs"),
        ({"device": "gpu", "num_devices": 0}, "needs one at least"),
        ({"device": "tpu"}, "'cpu' or 'gpu'"),
        ({"memory_bytes": -1}, "greater than or equal"),
        ({"disk_bytes": 1}, "disk_bytes"),
    ],
)
def test_needs_that_make_no_sense_are_refused(client: TestClient, world: World, needs: Any, detail: str) -> None:
    answer = client.post("/v1/jobs", json={"model_id": world.model_id, "recipe": RECIPE, "needs": needs})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("/needs")
    assert detail in str(answer.json()["errors"])


def test_a_target_on_cuda_needs_a_gpu(client: TestClient, world: World) -> None:
    recipe = {"steps": [{"kind": "prune_magnitude"}], "target": {"device": "cuda", "runtime": "torch"}}
    body = {"model_id": world.model_id, "recipe": recipe}
    assert tuple(client.post("/v1/jobs", json=body).json()["needs"].values()) == ("gpu", 1, 0, 1)
    refused = client.post("/v1/jobs", json={**body, "needs": {"device": "cpu"}})
    assert refused.status_code == 422
    assert "can be measured on a GPU only" in str(refused.json()["errors"])


def test_a_job_that_no_worker_can_run_says_so_at_once(both: Both) -> None:
    client, world = both
    register(world, GPU_WORKER)
    body = {"model_id": world.model_id, "recipe": RECIPE}
    wait = client.post("/v1/jobs", json=body).json()["waiting"]
    assert wait["reason"] == "no_worker_can_run"
    assert wait["detail"] == "the job needs a CPU worker; the only worker, w1, takes gpu jobs only"
    assert client.post("/v1/jobs?dry_run=true", json=body).json()["waiting"] == wait
    fits = client.post("/v1/jobs", json=body | {"needs": {"device": "gpu"}}).json()
    assert fits["waiting"] is None
    assert [job["waiting"] for job in client.get("/v1/jobs").json()["items"]] == [None, wait]
    assert fits["worker"] is None
    world.start(fits["id"])
    running = client.get(f"/v1/jobs/{fits['id']}").json()
    assert (running["waiting"], running["num_jobs_ahead"], running["worker"]) == (None, None, "w1")
    told = client.get(f"/v1/jobs/{fits['id']}/events").json()["items"]
    assert told[-1]["data"] == {"state": "running", "attempt": 1, "worker": "w1"}


def test_the_place_in_the_queue_is_shown(both: Both) -> None:
    client, world = both
    job_ids = [world.submit(), world.submit(), world.submit(priority=1)]
    ahead = [client.get(f"/v1/jobs/{job_id}").json()["num_jobs_ahead"] for job_id in job_ids]
    assert ahead == [1, 2, 0]


def test_workers_show_what_they_have_and_how_busy_they_are(both: Both) -> None:
    client, world = both
    register(world, GPU_WORKER)
    world.start(world.submit(needs=Needs(device="gpu")), worker_id="w1")
    (worker,) = client.get("/v1/workers").json()["items"]
    assert (worker["queues"], worker["accepts"], worker["accepts_jobs"]) == (["pare.gpu"], ["gpu"], True)
    assert worker["devices"] == GPU_WORKER["devices"]
    assert (worker["memory_bytes"], worker["num_threads"]) == (2**34, 4)
    assert worker["load"] == {"num_running": 1, "capacity": 1}
    assert (worker["versions"], worker["facts"]) == ({"torch": "2.13.0"}, {"slot": 1})


def test_cancel_is_at_once_for_a_waiting_job_and_final(both: Both) -> None:
    client, world = both
    job_id = world.submit()
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "job_finished")


def test_cancel_of_a_running_job_can_be_repeated(both: Both) -> None:
    client, world = both
    job_id = world.start().job_id
    for _ in range(2):
        answer = client.post(f"/v1/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")


def test_checkpoints_are_shown_and_a_fresh_retry_forgets_them(both: Both, storage: Storage) -> None:
    client, world = both
    claim = world.start()
    url = f"/v1/jobs/{claim.job_id}"
    place: dict[str, Any] = {"stage": "finetune", "step": 0, "fraction": 0.5}
    with checkpoint_storage(storage, claim.job_id).writer() as writer:
        writer.write(b"weights")
        blob = writer.commit()
    with world.database.session() as session:
        record_checkpoint(session, claim.job_id, claim.epoch, StoredCheckpoint(Place(**place), blob))
        record_resumed(session, claim.job_id, claim.epoch, Place(**place))
    shown = client.get(url).json()
    assert shown["checkpoint"].pop("created_at") is not None
    assert (shown["checkpoint"], shown["resumed_from"]) == ({**place, "size_bytes": 7}, place)
    assert client.get("/v1/jobs").json()["items"][0]["checkpoint"]["size_bytes"] == 7
    kinds = {event["kind"]: event["data"] for event in client.get(f"{url}/events").json()["items"]}
    assert (kinds["checkpoint"], kinds["resumed"]) == ({**place, "size_bytes": 7}, place)
    world.fail(claim, REFUSAL)

    again = client.post(f"{url}/retry?fresh=true").json()

    assert (again["status"], again["checkpoint"], again["resumed_from"]) == ("queued", None, None)
    assert not checkpoint_storage(storage, claim.job_id).exists(blob.sha256)


def test_retry_and_delete_follow_the_lifecycle(both: Both) -> None:
    client, world = both
    claim = world.start()
    url = f"/v1/jobs/{claim.job_id}"
    assert client.post(f"{url}/retry").json()["code"] == "job_not_retryable"
    assert client.delete(url).json()["code"] == "job_unfinished"
    world.fail(claim, REFUSAL)
    shown = client.get(url).json()
    assert shown["status"] == "failed"
    assert shown["error"] == {"code": "step_failed", "detail": "no", "fix": "change it", "retryable": False}
    answer = client.post(f"{url}/retry")
    assert (answer.status_code, answer.json()["status"], answer.json()["error"]) == (202, "queued", None)
    world.cancel(claim.job_id)
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


def test_list_can_be_narrowed_to_a_state(both: Both) -> None:
    client, world = both
    waiting, running = world.submit(), world.start().job_id
    assert [job["id"] for job in client.get("/v1/jobs?status=queued").json()["items"]] == [waiting]
    assert [job["id"] for job in client.get("/v1/jobs?status=running").json()["items"]] == [running]
    assert client.get("/v1/jobs?status=dead").status_code == 422


def test_metrics_come_with_success(client: TestClient, world: World) -> None:
    job_id = world.submit()
    answer = client.get(f"/v1/jobs/{job_id}/metrics")
    assert (answer.status_code, answer.json()["code"]) == (409, "metrics_not_ready")
    with world.database.session() as session:
        session.get_one(JobRow, job_id).metrics = {"baseline": {"parameters": 1}}
    assert client.get(f"/v1/jobs/{job_id}/metrics").json() == {"baseline": {"parameters": 1}}


def test_logs_of_each_attempt(client: TestClient, world: World, storage: Storage) -> None:
    job_id = world.submit()
    url = f"/v1/jobs/{job_id}/logs"
    assert client.get(url).json()["code"] == "log_not_found"
    for attempt in (1, 2):
        with owner_storage(storage, "local").writer() as writer:
            writer.write(f"attempt {attempt}\n".encode())
            blob = writer.commit()
        with world.database.session() as session:
            session.add(LogRow(job_id=job_id, attempt=attempt, size_bytes=10, sha256=blob.sha256, created_at=db_now()))
    assert client.get(url).text == "attempt 2\n"
    assert client.get(f"{url}?attempt=1").text == "attempt 1\n"
    assert client.get(url).headers["content-type"] == "text/plain; charset=utf-8"
    assert client.get(f"{url}?attempt=3").status_code == 404
    assert client.head(url).headers["content-length"] == "10"


@pytest.mark.parametrize("path", ["", "/cancel", "/retry", "/events", "/metrics", "/logs", "/artifacts"])
def test_jobs_of_others_are_not_there(client: TestClient, world: World, path: str) -> None:
    theirs = world.submit(owner="somebody else", model_id=world.add_model(owner="somebody else"))
    method = "POST" if path in ("/cancel", "/retry") else "GET"
    assert client.request(method, f"/v1/jobs/{theirs}{path}").status_code == 404
    assert client.delete(f"/v1/jobs/{theirs}").status_code == 404
    assert client.get("/v1/jobs").json()["items"] == []
    mine = {"model_id": world.job(theirs).model_id, "recipe": RECIPE}
    assert client.post("/v1/jobs", json=mine).json()["errors"][0]["pointer"] == "/model_id"

"""The client's nouns against the real app."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pare.client import Client
from pare.errors import Conflict, InvalidRequest, NotFound, PareError, UploadRejected, WaitTimeout

RECIPE = {"steps": [{"kind": "prune_magnitude", "sparsity": 0.7}]}


def test_importing_the_client_imports_nothing_heavy() -> None:
    code = (
        "import sys, pare, pare.client, pare.optimize, pare.result; pare.Client; "
        "print([m for m in ('app', 'worker', 'torch', 'numpy', 'pydantic', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_is_uploaded_checked_listed_and_deleted(client: Client, hands: Any, tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK" + bytes(2_500_000))
    model = client.models.upload(file)

    assert (model.name, model.format, model.state, model.size_bytes) == ("net", "pt2", "checking", 2_500_002)
    assert model.facts is None
    with pytest.raises(WaitTimeout):
        client.models.wait(model.id, timeout_seconds=0)
    hands.check_model(model.id)
    ready = client.models.wait(model.id)
    assert ready.facts is not None
    assert [(t.name, t.dtype, t.shape) for t in ready.facts.inputs] == [("x", "float32", ("batch", 3))]
    assert [item.id for item in client.models.list()] == [model.id]
    client.models.delete(model.id)
    with pytest.raises(NotFound):
        client.models.get(model.id)


def test_a_rejected_upload_says_why(client: Client, hands: Any, tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK no program")
    model = client.models.upload(file)
    hands.reject(model.id)

    with pytest.raises(UploadRejected) as caught:
        client.models.wait(model.id)
    assert (caught.value.code, caught.value.fix) == ("not_a_program", "Export it again.")
    assert model.id in caught.value.detail


def test_lists_are_fetched_page_by_page(client: Client, model_id: str) -> None:
    jobs = [client.jobs.submit(model_id, RECIPE).id for _ in range(5)]

    assert [job.id for job in client.jobs.list(limit=3)] == jobs[::-1][:3]
    first = client.transport.get("/v1/jobs", limit=2)
    second = client.transport.get("/v1/jobs", limit=200, cursor=first["next_cursor"])
    assert [item["id"] for page in (first, second) for item in page["items"]] == jobs[::-1]
    assert len(client.jobs.list(limit=1000)) == 5


def test_a_submission_repeated_with_its_key_is_one_job(client: Client, model_id: str) -> None:
    first = client.jobs.submit(model_id, RECIPE, idempotency_key="night-run")
    again = client.jobs.submit(model_id, RECIPE, idempotency_key="night-run")

    assert first.id == again.id
    assert len(client.jobs.list()) == 1
    with pytest.raises(InvalidRequest):
        client.jobs.submit(
            model_id, {"steps": [{"kind": "prune_magnitude", "sparsity": 0.1}]}, idempotency_key="night-run"
        )


def test_a_submission_whose_answer_is_lost_is_repeated_as_the_same_job(wire: Any, model_id: str) -> None:
    wire.cut_after = [20]
    with Client(wire.url) as client:
        job = client.jobs.submit(model_id, RECIPE)

        assert [item.id for item in client.jobs.list()] == [job.id]
    assert sum(sent.startswith(b"POST /v1/jobs") for sent in wire.requests) == 2


def test_every_problem_of_a_recipe_is_listed_with_its_place(client: Client, model_id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.jobs.submit(model_id, {"steps": [{"kind": "prune_magnitude", "sparsity": 3}], "sed": 1})

    places = " ".join(problem.pointer for problem in caught.value.problems)
    assert "sparsity" in places
    assert "sed" in places


def test_validation_submits_nothing(client: Client, model_id: str) -> None:
    assert client.jobs.validate(model_id, RECIPE)["valid"] is True
    assert client.jobs.list() == ()


def test_a_job_is_cancelled_retried_and_deleted(client: Client, model_id: str) -> None:
    job = client.jobs.submit(model_id, RECIPE, labels={"team": "vision"}, priority=3, deadline_seconds=60)
    assert (job.labels, job.priority, job.deadline_seconds) == ({"team": "vision"}, 3, 60)

    assert client.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(Conflict):
        client.jobs.cancel(job.id)
    assert client.jobs.retry(job.id).status == "queued"
    with pytest.raises(Conflict):
        client.jobs.delete(job.id)
    client.jobs.cancel(job.id)
    client.jobs.delete(job.id)
    with pytest.raises(NotFound):
        client.jobs.get(job.id)


def test_techniques_have_schemas_and_defaults(client: Client) -> None:
    techniques = {technique.kind: technique for technique in client.techniques.list()}

    assert techniques["prune_structured"].defaults["round_to"] == 8
    assert "ratio" in techniques["prune_structured"].schema["properties"]
    assert "prune_structured" in techniques["prune_magnitude"].undone_by


def test_health_is_told_even_when_it_is_bad(client: Client) -> None:
    # No worker and no broker are running here.
    health = client.health()
    assert health["status"] in ("degraded", "unavailable")
    assert "database" in health["checks"]


def test_result_has_numbers_table_and_verified_files(client: Client, hands: Any, model_id: str, tmp_path: Path) -> None:
    job = client.jobs.submit(model_id, RECIPE)
    hands.run(job.id, {"model.onnx": b"onnx", "notes.txt": b"notes"})
    result = client.result(job.id)

    assert result.job.status == "succeeded"
    assert result.metrics.comparison.latency_ratio.low == 0.45
    assert result.metrics.result.parameters == 400
    assert result.verdict.outcome == "better"
    table = result.table()
    for words in ("x0.50 (95 % CI 0.45..0.56)", "3.9 KiB", "1000 B", "x0.25", "cosine 0.9990", "SNR 30.5 dB", "1,000"):
        assert words in table
    files = result.download(tmp_path / "out")
    assert {name: path.read_bytes() for name, path in files.items()} == {"model.onnx": b"onnx", "notes.txt": b"notes"}
    assert client.jobs.logs(job.id) == "epoch 1\n"


def test_result_loads_through_the_load_py_that_came_with_it(
    client: Client, hands: Any, model_id: str, tmp_path: Path
) -> None:
    loader = (
        b"def load(path):\n    content = path.read_bytes()\n    return lambda arrays: {**arrays, path.name: content}\n"
    )
    job = client.jobs.submit(model_id, RECIPE)
    hands.run(job.id, {"load.py": loader, "model.onnx": b"onnx", "model.pt2": b"pt2"})
    result = client.result(job.id)

    assert result.load()({"x": 1}) == {"x": 1, "model.onnx": b"onnx"}
    assert result.load("model.pt2", directory=tmp_path / "kept")({}) == {"model.pt2": b"pt2"}
    assert (tmp_path / "kept" / "load.py").read_bytes() == loader
    with pytest.raises(PareError, match=r"no artifact model\.tflite"):
        result.load("model.tflite")


def test_optimize_goes_all_the_way(client: Client, hands: Any) -> None:
    """The engine's part is done by hand in a thread; everything else is the user's call."""
    import threading

    def work() -> None:
        model = _eventually(lambda: client.models.list())
        hands.check_model(model.id)
        dataset = _eventually(lambda: client.datasets.list())
        hands.check_dataset(dataset.id)
        hands.run(_eventually(lambda: client.jobs.list()).id, {"model.onnx": b"onnx"})

    thread = threading.Thread(target=work)
    thread.start()
    net = nn.Linear(3, 2).train()
    data = {"x": numpy.zeros((10, 3), numpy.float32), "y": numpy.zeros(10, numpy.int64)}
    with Client(client.url) as other:
        result = other.optimize(
            net,
            torch.ones(1, 3),
            data=data,
            task="classification",
            recipe=["prune_magnitude", {"kind": "finetune", "epochs": 1}],
            priority=3,
            deadline_seconds=600,
            needs={"num_threads": 2},
            progress=False,
        )
    thread.join()

    assert result.job.status == "succeeded"
    assert net.training
    assert result.notes == ()
    asked = result.job.raw
    assert (asked["priority"], asked["deadline_seconds"], asked["needs"]["num_threads"]) == (3, 600, 2)
    assert result.job.recipe is not None
    assert [step["kind"] for step in result.job.recipe["steps"]] == ["prune_magnitude", "finetune"]
    bound = result.job.recipe["data"]
    assert bound["inputs"]["x"]["column"] == "x"
    assert (bound["label_column"], bound["task"]) == ("y", "classification")


def _eventually(find: Any) -> Any:
    import time

    for _ in range(500):
        if found := find():
            return found[0]
        time.sleep(0.02)
    raise AssertionError("nothing came within 10 s")

"""The command line: results on stdout, everything else on stderr, exit codes, JSON, no tracebacks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.jobs import register_worker
from pare.cli import run
from pare.client import Client

RECIPE = {"steps": [{"kind": "prune_magnitude"}]}


@pytest.fixture(autouse=True)
def address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")


def _json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_upload_prints_the_model_on_stdout(capsys: pytest.CaptureFixture[str], hands: Any, tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK" + bytes(100))

    assert run(["models", "upload", str(file), "--no-wait", "--name", "my net", "-o", "json"]) == 0
    model = _json(capsys)
    assert (model["name"], model["state"]) == ("my net", "checking")
    assert run(["models", "list"]) == 0
    assert "my net" in capsys.readouterr().out
    hands.check_model(model["id"])
    assert run(["models", "delete", model["id"]]) == 0
    assert run(["-o", "json", "models", "list"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1]) == {"items": []}


def test_a_job_that_no_worker_can_run_is_shown_with_the_reason(
    capsys: pytest.CaptureFixture[str], hands: Any, model_id: str
) -> None:
    with hands.database.session() as session:
        facts = {"accepts": ["cpu"], "memory_bytes": 2**33, "num_threads": 2, "versions": {"torch": "2.13.0"}}
        register_worker(session, "node-7", host="node", queue="pare.cpu", facts=facts)
    submit = [
        "jobs",
        "submit",
        "--model",
        model_id,
        "--step",
        "prune_magnitude",
        "--device",
        "gpu",
        "--num-devices",
        "2",
    ]
    assert run([*submit, "--dry-run", "-o", "json"]) == 0
    assert _json(capsys)["waiting"]["reason"] == "no_worker_can_run"
    assert run([*submit, "-o", "json"]) == 0
    job = _json(capsys)
    assert job["needs"] == {"device": "gpu", "num_devices": 2, "memory_bytes": 0, "num_threads": 1}
    assert run(["jobs", "get", job["id"]]) == 0
    page = capsys.readouterr().out
    assert "waiting (no_worker_can_run): the job needs 2 GPUs; the only worker, node-7, takes cpu jobs only" in page
    assert "jobs ahead" in page
    assert run(["jobs", "list"]) == 0
    assert "cannot run" in capsys.readouterr().out
    assert run(["workers"]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("node-7", "cpu", "0 of 1", "2.13.0"))
    assert run(["workers", "-o", "json"]) == 0
    assert _json(capsys)["items"][0]["id"] == "node-7"


def test_a_job_from_submit_to_download(
    capsys: pytest.CaptureFixture[str], hands: Any, model_id: str, dataset_id: str, tmp_path: Path
) -> None:
    submit = ["jobs", "submit", "--model", model_id, "--dataset", dataset_id, "--task", "classification"]
    steps = ["--step", "prune_structured:ratio=0.3,criterion=taylor", "--step", "finetune"]
    assert run([*submit, *steps, "--label", "team=vision", "-o", "json"]) == 0
    job = _json(capsys)
    assert job["labels"] == {"team": "vision"}
    assert [step["kind"] for step in job["recipe"]["steps"]] == ["prune_structured", "finetune"]
    assert job["recipe"]["steps"][0]["ratio"] == 0.3
    assert job["recipe"]["data"]["label_column"] == "y"

    hands.run(job["id"], {"model.onnx": b"onnx"})
    assert run(["jobs", "wait", job["id"]]) == 0
    waited = capsys.readouterr()
    assert "succeeded" in waited.out
    assert "finetune" in waited.err
    assert run(["jobs", "metrics", job["id"]]) == 0
    assert "95 % CI 0.45..0.56" in capsys.readouterr().out
    assert run(["jobs", "metrics", job["id"], "-o", "json"]) == 0
    assert _json(capsys)["comparison"]["file_ratio"] == 0.25
    assert run(["jobs", "logs", job["id"]]) == 0
    assert capsys.readouterr().out == "epoch 1\n"
    assert run(["jobs", "download", job["id"], str(tmp_path / "out"), "-o", "json"]) == 0
    (item,) = _json(capsys)["items"]
    assert Path(item["path"]).read_bytes() == b"onnx"
    assert run(["jobs", "events", job["id"], "-o", "json"]) == 0
    assert [event["kind"] for event in _json(capsys)["items"]][-1] == "state"
    assert run(["jobs", "events", job["id"], "--follow"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["data"]["state"] == "succeeded"


def test_a_recipe_comes_from_a_file(capsys: pytest.CaptureFixture[str], model_id: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**RECIPE, "seed": 7}))
    assert run(["jobs", "submit", "--model", model_id, "--recipe", str(file), "-o", "json"]) == 0
    assert _json(capsys)["recipe"]["seed"] == 7
    file.write_text(json.dumps(RECIPE["steps"]))
    assert run(["jobs", "submit", "--model", model_id, "--recipe", str(file), "--dry-run"]) == 0
    assert _json(capsys)["valid"] is True


def test_options_of_steps_and_inputs_may_be_lists_and_plans(
    capsys: pytest.CaptureFixture[str], model_id: str, dataset_id: str
) -> None:
    step = 'finetune:augmentations=[],parallel={"data":2,"shard":true},epochs=4'
    binding = "x=x,scale=0.5,mean=0.1/0.2/0.3,std=2"
    submit = ["jobs", "submit", "--model", model_id, "--dataset", dataset_id, "--task", "classification"]
    assert run([*submit, "--step", step, "--input", binding, "-o", "json"]) == 0
    recipe = _json(capsys)["recipe"]
    assert (recipe["steps"][0]["parallel"]["shard"], recipe["steps"][0]["epochs"]) == (True, 4)
    bound = recipe["data"]["inputs"]["x"]
    assert (bound["column"], bound["scale"], bound["mean"], bound["std"]) == ("x", 0.5, [0.1, 0.2, 0.3], [2.0])


def test_a_failed_job_is_exit_code_1(capsys: pytest.CaptureFixture[str], hands: Any, model_id: str) -> None:
    from app.recipes.plan import EngineError

    assert run(["jobs", "submit", "--model", model_id, "--step", "prune_magnitude", "-o", "json"]) == 0
    id = _json(capsys)["id"]
    hands.run(id, error=EngineError(code="out_of_memory", detail="9 GiB", fix="Use a smaller batch."))

    assert run(["jobs", "wait", id]) == 1
    out = capsys.readouterr().out
    assert "out_of_memory: 9 GiB" in out
    assert "Use a smaller batch." in out


def test_a_cancelled_job_is_exit_code_1(capsys: pytest.CaptureFixture[str], model_id: str) -> None:
    run(["jobs", "submit", "--model", model_id, "--step", "prune_magnitude", "-o", "json"])
    id = _json(capsys)["id"]
    assert run(["jobs", "cancel", id]) == 0
    assert run(["jobs", "wait", id]) == 1
    assert run(["jobs", "retry", id]) == 0
    assert run(["jobs", "cancel", id]) == 0
    assert run(["jobs", "delete", id]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "submit"],
        ["jobs", "fly"],
        ["jobs", "list", "--limit", "0"],
        ["jobs", "submit", "--model", "m"],
        ["jobs", "submit", "--model", "m", "--recipe", "/nowhere.json"],
        ["jobs", "submit", "--model", "m", "--step", "finetune:epochs"],
        ["jobs", "submit", "--model", "m", "--step", "finetune", "--task", "classification"],
        ["models", "upload", "/nowhere.pt2"],
        ["techniques", "shrink_magically"],
        ["--url", "nonsense", "models", "list"],
    ],
)
def test_a_senseless_command_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err
    assert "Traceback" not in captured.err


def test_nobody_there_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--url", "http://127.0.0.1:1", "jobs", "list"]) == 3
    error = capsys.readouterr().err
    assert "error not_reachable: no answer from http://127.0.0.1:1" in error
    assert "fix: Start the service with `pare serve`" in error


def test_a_refusal_is_exit_code_4_and_shows_code_detail_and_fix(
    capsys: pytest.CaptureFixture[str], model_id: str
) -> None:
    assert run(["jobs", "submit", "--model", model_id, "--step", "prune_magnitude:sparsity=7"]) == 4
    error = capsys.readouterr().err
    assert "sparsity" in error
    assert "fix: " in error
    assert run(["jobs", "get", "job_" + "a" * 26, "-o", "json"]) == 4
    problem = json.loads(capsys.readouterr().err)["error"]
    assert problem["status"] == 404
    assert problem["code"]


def test_a_rejected_upload_is_exit_code_4(capsys: pytest.CaptureFixture[str], hands: Any, tmp_path: Path) -> None:
    import threading

    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK")

    def reject() -> None:
        with Client() as client:
            while not client.models.list():
                time.sleep(0.02)
            hands.reject(client.models.list()[0].id)

    thread = threading.Thread(target=reject)
    thread.start()
    assert run(["models", "upload", str(file)]) == 4
    thread.join()
    assert "not_a_program" in capsys.readouterr().err


def test_techniques_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["techniques"]) == 0
    listed = capsys.readouterr().out
    for kind in ("prune_structured", "prune_magnitude", "finetune", "quantize_int8"):
        assert kind in listed
    assert run(["techniques", "prune_structured"]) == 0
    explained = capsys.readouterr().out
    assert "round_to" in explained
    assert "Keep channel counts a multiple of this" in explained


@pytest.mark.parametrize(("arguments", "place"), [([], "from-environment"), (["--data-dir", "given"], "given")])
def test_serve_keeps_its_data_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: str
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("worker.serve.serve", lambda **options: told.update(options))
    monkeypatch.setenv("PARE_DATA_DIR", "from-environment")

    assert run(["serve", *arguments]) == 0

    assert told["data_dir"] == Path(place)


def test_ctrl_c_detaches_and_the_job_goes_on(client: Client, url: str, model_id: str) -> None:
    job = client.jobs.submit(model_id, RECIPE)
    command = [sys.executable, "-m", "pare", "--url", url, "jobs", "wait", job.id]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    # Its first words come just before it begins to wait.
    first = process.stderr.readline()
    assert job.id in first
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert out == ""
    assert f"pare jobs wait {job.id}" in err
    assert "Traceback" not in err
    assert client.jobs.get(job.id).status == "queued"


def test_output_that_nobody_reads_any_more_is_no_error(url: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pare", "--url", url, "techniques", "-o", "json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0

"""Distillations from the client and the command line, against a real service whose parts are run by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.jobs.advance import advance_parents
from app.settings import Settings
from pare.cli import run
from pare.client import Client
from tests.pare.conftest import make_metrics


def test_the_command_line_starts_one_and_shows_it(
    capsys: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch, model_id: str, dataset_id: str,
    tmp_path: Path, hands: Any,
) -> None:  # fmt: skip
    monkeypatch.setenv("PARE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"training": {"kind": "distill", "temperature": 2.0}}))
    command = ["distill", "--model", model_id, "--dataset", dataset_id, "--task", "classification", "--plan", str(plan)]
    options = ["--width", "0.25", "--epochs", "4", "--teacher-epochs", "2", "--trials", "3"]

    assert run([*command, *options, "--dry-run", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_jobs"] == 1 + 3 + 2
    options += ["--label", "team=vision", "--priority", "2", "--deadline-seconds", "900"]
    assert run([*command, *options, "-o", "json"]) == 0
    job = json.loads(capsys.readouterr().out)
    assert (job["labels"], job["priority"], job["deadline_seconds"]) == ({"team": "vision"}, 2, 900)

    with Client(url) as client:
        found = client.distillations.get(job["id"])
    assert found.job.status == "running"
    assert found.distillation["student"]["width"] == 0.25
    assert (found.distillation["training"]["epochs"], found.distillation["training"]["temperature"]) == (4, 2.0)
    assert found.distillation["teacher_training"]["epochs"] == 2
    assert found.distillation["tuning"]["num_trials"] == 3
    assert run(["jobs", "list"]) == 0
    assert "(distillation)" in capsys.readouterr().out
    advance_parents(hands.database, Settings(), hands.storage)
    assert run(["jobs", "get", job["id"]]) == 0
    page = capsys.readouterr().out
    assert "teacher" in page
    assert "cannot run" in page, "there is no worker"
    assert run(["jobs", "cancel", job["id"]]) == 0
    assert run([*command, "--student", "resnet21"]) == 4
    assert "resnet20" in capsys.readouterr().err


def test_metrics_of_a_distillation_are_read_and_printed() -> None:
    from pare.metrics import Metrics
    from pare.records import read
    from pare.report import report, to_text

    measured = make_metrics().model_dump(mode="json")
    candidate = {
        "name": "student", "job_id": "job", "quality": measured["result"]["quality"], "file_bytes": 2048,
        "parameters": 400, "macs": None, "p50_ms": 1.0, "latency_ratio": {"value": 0.5, "low": 0.4, "high": 0.6},
    }  # fmt: skip
    measured["distillation"] = {
        "candidates": [candidate | {"name": "teacher", "latency_ratio": None}, candidate],
        "gain": {"metric": "accuracy", "value": 0.01, "standard_error": 0.01, "helped": False},
        "values": {"temperature": 4.0}, "trials": [],
    }  # fmt: skip

    text = to_text(report(read(Metrics, measured)))

    assert "x0.50" in text
    assert "temperature 4" in text
    assert "teacher" in text

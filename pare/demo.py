"""The demonstration behind `make demo`: the whole way on real data, and nothing left running afterwards."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from pare.client import Client
from pare.demo_model import Digits, load_digits_split, train_cnn
from pare.demo_service import DemoService, Interrupted, Interrupts
from pare.errors import PareError
from pare.report import human_bytes
from pare.result import Result

RECIPE: dict[str, Any] = {
    "steps": [
        {"kind": "prune_structured", "ratio": 0.5, "round_to": 8},
        # keep_best would choose the epoch on the very images that the report is about.
        {"kind": "finetune", "epochs": 3, "learning_rate": 0.003, "keep_best": False},
        {"kind": "quantize_int8", "mode": "static"},
    ],
    "target": {"runtime": "onnxruntime", "num_threads": 1, "batch_size": 16, "num_runs": 200},
}


def run_demo(data_dir: Path | None) -> None:
    """Run the demonstration; every process it starts is gone when this returns, however it returns."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        directory = _make_directory(stack, data_dir)
        try:
            _run(directory, interrupts, keep=data_dir is not None)
        except Interrupted as stopped:
            print(f"\nstopped; no process is left (log: {directory / 'serve.log'})", file=sys.stderr)
            raise typer.Exit(128 + stopped.signal_number) from None
    print(f"\nDone in {time.monotonic() - started:.0f} s; every process that was started is gone.")


def _run(directory: Path, interrupts: Interrupts, *, keep: bool) -> None:
    with DemoService(directory, interrupts) as service, Client(service.url) as client:
        _say(
            1,
            f"The service runs at {service.url}: API, worker, dispatcher and broker (ready in {service.seconds:.1f} s)",
        )
        digits = load_digits_split()
        _say(
            2,
            f"Training a small CNN on scikit-learn's digits: {len(digits.training_labels)} images, "
            f"{len(digits.held_out_labels)} more held out",
        )
        model = train_cnn(digits, on_epoch=lambda epoch, of, loss: print(f"  epoch {epoch}/{of}  loss {loss:.4f}"))
        _say(3, "Optimizing it through the service: prune channels, fine-tune, quantize to int8")
        result = client.optimize(
            model,
            digits.training_images[:2],
            data={"images": digits.training_images, "labels": digits.training_labels},
            evaluation_data={"images": digits.held_out_images, "labels": digits.held_out_labels},
            task="classification",
            recipe=RECIPE,
            name="digits-cnn",
        )
        print(result.table())
        artifacts = directory / "artifacts"
        _say(4, "Downloading the artifacts" + (f" to {artifacts}" if keep else ""))
        for path in sorted(result.download(artifacts).values()):
            print(f"  {path.name:<20} {human_bytes(path.stat().st_size):>10}")
        _say(5, "Running the downloaded model in a fresh Python, where Pare cannot be imported")
        _predict(artifacts, digits, directory)
        _describe_isolation(result)
        memory = service.api_memory()
        print(f"The API process used at most {human_bytes(memory)} of memory.")


def _predict(artifacts: Path, digits: Digits, directory: Path) -> None:
    """Show that load.py and the model file are enough."""
    samples = digits.save_held_out(directory / "held_out.npz")
    script = Path(__file__).with_name("demo_predict.py")
    command = [sys.executable, "-I", str(script), str(artifacts), str(samples)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise PareError(
            f"the downloaded load.py failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}",
            code="demo_failed",
        )
    print(done.stdout, end="")


def _describe_isolation(result: Result) -> None:
    layers = ", ".join(result.job.isolation) or "none"
    print(f"The engine ran isolated by: {layers}.")


def _make_directory(stack: contextlib.ExitStack, data_dir: Path | None) -> Path:
    if data_dir is not None:
        data_dir.mkdir(parents=True, exist_ok=True)
        return data_dir.absolute()
    directory = Path(tempfile.mkdtemp(prefix="pare-demo-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _say(step: int, sentence: str) -> None:
    print(f"\n[{step}/5] {sentence}", flush=True)

"""The distillation pipeline through the real service over HTTP, on CIFAR-10 images.

    python -m benchmarks.distillation_pipeline --data DIR [--student derived|uploaded] [--url URL] [--report FILE]

DIR holds cifar10_train.npz, cifar10_test.npz (x: uint8 NHWC, y) and resnet20_cifar10.pt2. Without --url, a `pare serve`
is started on a free port and ended again. The teacher is that ResNet-20, fine-tuned on the training images first; the
student is derived from it, or an uploaded ResNet-8 of half the width with random weights. Prints the job's report:
teacher, student without teacher, student with teacher, trials.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.distillation import ResNet8
from pare.client import Client
from pare.records import Model

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def main() -> None:
    """Run one distillation and print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--url", help="a service that runs already")
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--teacher-epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6, help="of each student")
    parser.add_argument("--student", choices=["derived", "uploaded"], default="derived")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--depth", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=4, help="0: no tuning")
    parser.add_argument("--report", type=Path, help="where to write the report too")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set PARE_BENCH_DATA")
    with serve(options.url) as url, tempfile.TemporaryDirectory() as directory:
        text = run(Client(url), options, Path(directory))
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


@contextmanager
def serve(url: str | None) -> Iterator[str]:
    """Yield the URL of a service: the given one, or one that ends with this."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="pare-benchmark-") as directory:
        program = (
            "import sys; from pathlib import Path; from worker.serve import serve; "
            "serve('127.0.0.1', 0, Path(sys.argv[1]))"
        )
        process = subprocess.Popen([sys.executable, "-c", program, directory], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"ready at (http://\S+)", process.stdout.readline())
            assert found is not None, "the service did not start"
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


def run(client: Client, options: argparse.Namespace, directory: Path) -> str:
    """Run the distillation; return its report with how long it took."""
    files = {}
    for name, count in (("train", options.images), ("test", options.test_images)):
        with np.load(options.data / f"cifar10_{name}.npz") as table:
            files[name] = directory / f"{name}.npz"
            np.savez(files[name], x=table["x"][:count], y=table["y"][:count])
    model = options.data / "resnet20_cifar10.pt2"
    binding = {"column": "x", "layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": MEAN, "std": STD}
    tuning = {
        "num_trials": options.trials, "reduction": 4, "temperature": [2.0, 4.0], "label_weight": [0.1, 0.5],
        "learning_rate": [0.003, 0.01],
    }  # fmt: skip
    request: dict[str, object] = {
        "teacher_training": {"kind": "finetune", "epochs": options.teacher_epochs},
        "training": {"kind": "distill", "epochs": options.epochs, "learning_rate": 0.01},
        "tuning": tuning if options.trials else None,
        "target": {"num_runs": 50},
    }
    uploaded = client.models.wait(client.models.upload(model).id)
    assert uploaded.facts is not None
    (tensor,) = uploaded.facts.inputs
    request["student"] = (
        {"kind": "derive_student", "width": options.width, "depth": options.depth}
        if options.student == "derived"
        else {"kind": "take_student", "student": upload_student(client, directory).id}
    )
    started_at = time.monotonic()
    result = client.distill(
        uploaded.id,
        data=files["train"],
        evaluation_data=files["test"],
        task="classification",
        inputs={tensor.name: binding},
        distillation=request,
    )
    seconds = time.monotonic() - started_at
    result.download(directory / "student")
    environment = result.metrics.environment
    lines = [
        (directory / "student" / "report.md").read_text(encoding="utf-8"),
        f"{options.images} training and {options.test_images} test images, {seconds:.0f} s in all, on "
        f"{environment.processor} ({environment.num_cores} cores); torch {environment.versions.get('torch')}.",
        "",
    ]
    return "\n".join(lines)


def upload_student(client: Client, directory: Path) -> Model:
    """Upload the small network of benchmarks/distillation.py, as its seed made it."""
    torch.manual_seed(0)
    module, example = ResNet8().eval(), torch.zeros(2, 3, 32, 32)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, directory / "student.pt2")
    return client.models.wait(client.models.upload(directory / "student.pt2").id)


if __name__ == "__main__":
    main()

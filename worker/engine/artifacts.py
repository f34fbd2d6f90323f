"""The files of a job beside the models: manifest.json, load.py, sample input and output, report.md."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.recipes.metrics import Metrics
from app.recipes.plan import ArtifactFile, Plan
from app.recipes.recipe import FILES
from worker.engine import load
from worker.engine.arrays import write_npz
from worker.engine.environment import describe_machine, versions
from worker.engine.programs.program import Signature
from worker.engine.report import write_report

LOADER = Path(load.__file__)
"""load.py is copied as it is: it imports nothing of ours."""
MANIFEST = "manifest.json"
SAMPLE_INPUT = "sample_input.npz"
SAMPLE_OUTPUT = "sample_output.npz"
RELATIVE_TOLERANCE = 1e-3
"""Of the largest absolute sample output: what other kernels may add up differently in 32-bit floats."""
HALF_TOLERANCE = 2e-2
"""The same for 16-bit floats."""
INTEGER_TOLERANCE = 5e-2
"""The same for a model with 8-bit arithmetic: another processor may round or saturate an activation differently."""
ROUNDING_TOLERANCE = 2.0
"""How far compiled 8-bit arithmetic may be from the same not compiled, relative to what 8 bits change in floats: sums
in another order send activations that lie between two integers to the other one, which layers behind carry on."""

MEDIA_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown",
    ".py": "text/x-python",
}

Arrays = Mapping[str, NDArray[np.generic]]


def write_artifacts(
    plan: Plan,
    metrics: Metrics,
    signature: Signature,
    samples: tuple[Arrays, Arrays],
    directory: Path,
    *,
    integer: bool,
    floats: Arrays | None = None,
) -> tuple[ArtifactFile, ...]:
    """Write everything beside the model files that already lie in `directory`, and list all of it.

    `floats`: the sample outputs of a model in 8-bit arithmetic as they were before, where it was also compiled.
    """
    sample_input, sample_output = samples
    write_npz(directory / SAMPLE_INPUT, sample_input)
    write_npz(directory / SAMPLE_OUTPUT, sample_output)
    shutil.copyfile(LOADER, directory / "load.py")
    (directory / "report.md").write_text(write_report(metrics), encoding="utf-8")
    files = {path.name: _describe(path) for path in sorted(directory.iterdir())}
    manifest = {
        "files": {
            name: {"sha256": file.sha256, "size_bytes": file.size_bytes, "media_type": file.media_type}
            for name, file in files.items()
        },
        "signature": {
            "inputs": [each.model_dump(mode="json") for each in signature.inputs],
            "outputs": [each.model_dump(mode="json") for each in signature.outputs],
        },
        "tolerances": {name: choose_tolerance(array, integer=integer) for name, array in sample_output.items()},
        **_tell_compiled(plan, files, sample_output, floats),
        **_tell_origin(plan),
        "metrics": metrics.model_dump(mode="json"),
    }
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return (*files.values(), _describe(path))


def choose_tolerance(output: NDArray[np.generic], *, integer: bool) -> float:
    """Return the largest difference to a sample output that another load of the same model may show."""
    if output.dtype.kind != "f":
        return 0.0
    magnitude = float(np.abs(output[np.isfinite(output)]).max(initial=0.0))
    share = INTEGER_TOLERANCE if integer else HALF_TOLERANCE if output.dtype.itemsize < 4 else RELATIVE_TOLERANCE
    return share * max(magnitude, 1e-3)


def choose_compiled_tolerance(output: NDArray[np.generic], floats: NDArray[np.generic] | None) -> float:
    """Return the same for a compiled model; `floats`: the output before its model computed in 8 bits, if it does."""
    tolerance = choose_tolerance(output, integer=floats is not None)
    if floats is None or output.dtype.kind != "f":
        return tolerance
    return max(tolerance, ROUNDING_TOLERANCE * load.largest_difference(floats, output))


def digest_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tell_compiled(
    plan: Plan, files: Mapping[str, ArtifactFile], output: Arrays, floats: Arrays | None
) -> dict[str, Any]:
    assert plan.recipe is not None
    file = FILES["aoti"]
    if file not in files:
        return {}
    tolerances = {
        name: choose_compiled_tolerance(array, None if floats is None else floats[name])
        for name, array in output.items()
    }
    return {"compiled": {file: {**describe_machine(plan.recipe.target), "tolerances": tolerances}}}


def _tell_origin(plan: Plan) -> dict[str, Any]:
    assert plan.recipe is not None
    assert plan.model is not None
    return {
        "made_from": {
            "model": {
                "sha256": plan.model.sha256,
                "format": plan.model.format,
                "architecture": plan.model.architecture,
            },
            "datasets": {each.id: {"sha256": each.sha256, "format": each.format} for each in plan.datasets},
        },
        "recipe": plan.recipe.model_dump(mode="json"),
        "seed": plan.recipe.seed,
        "versions": versions(),
    }


def _describe(path: Path) -> ArtifactFile:
    return ArtifactFile(
        name=path.name,
        media_type=MEDIA_TYPES.get(path.suffix, "application/octet-stream"),
        size_bytes=path.stat().st_size,
        sha256=digest_file(path),
    )

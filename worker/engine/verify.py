"""The action `verify`: reload every artifact in this fresh process, by load.py's own code, and compare outputs."""

import importlib.util
import json
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from app.recipes.plan import EngineResult, Plan
from worker.engine.artifacts import LOADER, MANIFEST
from worker.engine.errors import VerificationFailed
from worker.engine.progress import Reporter, Stage

REQUIRED = (MANIFEST, "load.py", "sample_input.npz", "sample_output.npz")


def verify(plan: Plan, directory: Path, reporter: Reporter) -> EngineResult:
    """Raise VerificationFailed unless every artifact is what the manifest says and reproduces the sample output."""
    reporter.expect([Stage("verify", 1.0)])
    reporter.enter("verify")
    source = directory / "in"
    missing = [name for name in REQUIRED if name not in plan.artifacts]
    if missing:
        raise VerificationFailed(f"the artifacts lack {missing}")
    files = _read_files(source / MANIFEST)
    named = set(plan.artifacts) - {MANIFEST}
    if named != set(files):
        raise VerificationFailed(f"the artifacts are {sorted(named)}, the manifest names {sorted(files)}")
    loader = _import_loader(source / "load.py")
    for index, name in enumerate(plan.artifacts):
        reporter.report(index / len(plan.artifacts), name)
        if name != MANIFEST:
            _verify_file(loader, source / name)
    if {"model.pt2", "model.safetensors"} <= named:
        _compare_weights(loader, source)
    return EngineResult()


def _read_files(path: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = json.loads(path.read_bytes())["files"]
    except (ValueError, KeyError, TypeError) as failure:
        raise VerificationFailed(f"{path.name} cannot be read: {failure}") from failure
    return files


def _import_loader(path: Path) -> ModuleType:
    if path.read_bytes() != LOADER.read_bytes():
        raise VerificationFailed("load.py is not the file that Pare puts beside its artifacts")
    spec = importlib.util.spec_from_file_location("artifact_load", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare_weights(loader: ModuleType, source: Path) -> None:
    weights = loader.load_weights(source / "model.safetensors")
    program = torch.export.load(source / "model.pt2")
    for name, tensor in program.state_dict.items():
        if name not in weights:
            raise VerificationFailed(f"model.safetensors lacks {name!r}, which model.pt2 has")
        if not torch.equal(torch.from_numpy(weights[name]), tensor.detach()):
            raise VerificationFailed(f"{name!r} in model.safetensors is not equal to the one in model.pt2")


def _verify_file(loader: ModuleType, path: Path) -> None:
    try:
        loader.verify_digest(path)
        if path.suffix in (".packed", ".safetensors"):
            loader.load_weights(path)
        if path.suffix not in (".onnx", ".packed", ".pt2"):
            return
        differences = loader.compare_with_sample(path)
    except MemoryError:
        raise
    except Exception as failure:  # whatever a runtime raises here means the same: this file does not load
        traceback.print_exc()
        raise VerificationFailed(f"{path.name}: {type(failure).__name__}: {str(failure)[:1000]}") from failure
    for output, (difference, tolerance) in differences.items():
        if not difference <= tolerance:
            raise VerificationFailed(
                f"{path.name}: output {output!r} differs from the sample output by {difference:.6g}, "
                f"the tolerance is {tolerance:.6g}"
            )

"""Load and check a model made by Pare, without Pare. Keep this file beside manifest.json and the model files.

    python load.py [--file model.onnx] [--check]

runs the sample input and prints the largest difference to the sample output; with --check it exits with 1 when the
difference is above the tolerance in manifest.json. From Python:

    predict = load("model.onnx")                  # or "model.pt2"
    outputs = predict({"input": array})           # dictionaries of numpy arrays by name
    weights = load_weights("model.safetensors")   # a dictionary of numpy arrays by name

Needs numpy, and onnxruntime for .onnx, torch for .pt2, safetensors for .safetensors. Digests are verified first.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
Predict = Callable[[Arrays], Arrays]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return what manifest.json says about the files beside it."""
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def verify_digest(path: Path) -> None:
    """Raise ValueError when the file is not, byte for byte, the one in the manifest."""
    expected = read_manifest(path.parent)["files"][path.name]["sha256"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name} has sha256 {digest.hexdigest()}, the manifest says {expected}")


def load(path: str | Path) -> Predict:
    """Return a function from named input arrays to named output arrays."""
    path = Path(path).resolve()
    verify_digest(path)
    signature = read_manifest(path.parent)["signature"]
    inputs = [each["name"] for each in signature["inputs"]]
    outputs = [each["name"] for each in signature["outputs"]]
    if path.suffix == ".onnx":
        return _load_onnx(path, inputs, outputs)
    if path.suffix == ".pt2":
        return _load_pt2(path, inputs, outputs)
    raise ValueError(f"{path.name} is not a model; load takes .onnx and .pt2, load_weights takes .safetensors")


def _load_onnx(path: Path, inputs: list[str], outputs: list[str]) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    used = {each.name for each in session.get_inputs()}

    def predict(arrays: Arrays) -> Arrays:
        _check_names(arrays, inputs)
        feed = {name: array for name, array in arrays.items() if name in used}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return predict


def _load_pt2(path: Path, inputs: list[str], outputs: list[str]) -> Predict:
    import torch

    module = torch.export.load(str(path)).module()

    def predict(arrays: Arrays) -> Arrays:
        _check_names(arrays, inputs)
        with torch.inference_mode():
            result = module(*(torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in inputs))
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return predict


def load_weights(path: str | Path) -> Arrays:
    """Return the weights in a .safetensors file."""
    from safetensors.numpy import load_file

    path = Path(path).resolve()
    verify_digest(path)
    return load_file(path)


def load_samples(directory: Path) -> tuple[Arrays, Arrays]:
    """Return the sample inputs and the outputs that the model gave for them when it was made."""
    samples = []
    for name in ("sample_input.npz", "sample_output.npz"):
        verify_digest(directory / name)
        with np.load(directory / name, allow_pickle=False) as file:
            samples.append({key: file[key] for key in file.files})
    return samples[0], samples[1]


def largest_difference(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference; infinite where only one of the two is a finite number."""
    if expected.shape != actual.shape:
        return float("inf")
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - other))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def compare_with_sample(path: str | Path) -> dict[str, tuple[float, float]]:
    """Run the sample input and return, for each output, the largest difference and its tolerance."""
    path = Path(path).resolve()
    predict = load(path)
    inputs, expected = load_samples(path.parent)
    tolerances = read_manifest(path.parent)["tolerances"]
    actual = predict(inputs)
    return {name: (largest_difference(expected[name], actual[name]), float(tolerances[name])) for name in expected}


def _check_names(arrays: Arrays, inputs: list[str]) -> None:
    if set(arrays) != set(inputs):
        raise ValueError(f"the model takes the inputs {inputs}, not {sorted(arrays)}")


def main() -> int:
    """Run the sample input through one file, or through every model file there is."""
    directory = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Run the sample input through a model made by Pare.")
    parser.add_argument("--file", help="model.onnx or model.pt2; default: every model file that is here")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a difference is above its tolerance")
    arguments = parser.parse_args()
    names = sorted(name for name in read_manifest(directory)["files"] if name.endswith((".onnx", ".pt2")))
    here = [directory / name for name in names if (directory / name).exists()]
    paths = [directory / arguments.file] if arguments.file else here
    wrong = False
    if not paths:
        weights = load_weights(directory / "model.safetensors")
        print(f"model.safetensors: {len(weights)} arrays, digest as in the manifest; there is no model file to run")
    for path in paths:
        for output, (difference, tolerance) in compare_with_sample(path).items():
            wrong = wrong or difference > tolerance
            print(f"{path.name}: output {output!r}: largest difference {difference:.3g} (tolerance {tolerance:.3g})")
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())

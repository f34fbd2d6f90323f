"""Run by the demonstration in a fresh Python: the downloaded load.py and model alone, no Pare.

python -I demo_predict.py ARTIFACTS HELD_OUT.npz
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

SHADES = " .:-=+*#%@"
NUM_SHOWN = 8


def main(artifacts: Path, held_out: Path) -> None:
    """Predict all held-out digits, show some, and count the right ones."""
    # From here on, importing any part of Pare fails.
    for package in ("pare", "app", "worker"):
        sys.modules[package] = None  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("load", artifacts / "load.py")
    assert spec is not None
    assert spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    predict = loader.load(artifacts / "model.onnx")

    with np.load(held_out, allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    scores = predict({"image": images})
    answers = next(iter(scores.values())).argmax(axis=1)

    shown = images[:NUM_SHOWN, 0]
    for row in range(shown.shape[1]):
        pixels = ("".join(SHADES[round(float(value) * 9)] for value in image[row]) for image in shown)
        print(("  " + "    ".join(pixels)).rstrip())
    for name, values in (("is", labels), ("predicted", answers)):
        print("  " + "".join(f"{name} {value}".ljust(12) for value in values[:NUM_SHOWN]).rstrip())
    right = int((answers == labels).sum())
    print(f"  {right} of {len(labels)} held-out digits right ({right / len(labels):.4f}), counted without Pare")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

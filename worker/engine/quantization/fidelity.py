"""How far a quantized file's outputs are from the float file's, on the same inputs; padded positions do not count."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from worker.engine.measure.padding import clear_padding, find_mask
from worker.engine.measure.runtimes import open_model, runtime_of
from worker.engine.programs.program import Signature


@dataclass(frozen=True)
class Fidelity:
    """The worst over the float outputs."""

    cosine: float
    """Mean over the examples of the cosine between the two models' outputs."""
    error: float
    """Squared error, relative to the squared size of the output."""


def compare_files(
    signature: Signature, before: Path, after: Path, batches: Iterable[tuple[Tensor, ...]], num_threads: int
) -> Fidelity:
    """Run both files, each in its format's runtime, over the batches (each the inputs of one call)."""
    names = [tensor.name for tensor in signature.inputs]
    predict, predict_after = (open_model(path, runtime_of(path), signature, num_threads) for path in (before, after))
    errors, sizes = np.zeros(len(signature.outputs)), np.zeros(len(signature.outputs))
    cosines: dict[int, list[float]] = {}
    for tensors in batches:
        arrays = tuple(tensor.numpy() for tensor in tensors)
        mask = find_mask(names, arrays)
        for index, pair in enumerate(zip(predict(arrays), predict_after(arrays), strict=True)):
            if pair[0].dtype.kind != "f" or pair[0].ndim == 0:
                continue
            left, right = (np.asarray(clear_padding(each, mask), np.float64).reshape(len(each), -1) for each in pair)
            errors[index] += ((left - right) ** 2).sum()
            sizes[index] += (left**2).sum()
            norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            cosines.setdefault(index, []).extend((left * right).sum(1) / np.maximum(norms, 1e-12))
    return Fidelity(
        cosine=min((float(np.mean(each)) for each in cosines.values()), default=1.0),
        error=float((errors / np.maximum(sizes, 1e-30)).max(initial=0.0)),
    )

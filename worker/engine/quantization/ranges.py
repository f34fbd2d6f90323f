"""Ranges of activations that make the squared rounding error small: outliers are cut off where that pays."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

NUM_BINS = 2048
NUM_SHARES = 40
SMALLEST_SHARE = 0.2
Feed = Mapping[str, NDArray[np.generic]]


def search_range(counts: NDArray[np.float64], low: float, high: float, levels: int = 255) -> tuple[float, float]:
    """Return the range within [low, high] with the smallest squared error for a histogram of equal bins over it.

    The range always holds zero. Tried are 40 shares of each end, the other fixed, then the other.
    """
    width = (high - low) / len(counts)
    centres = low + width * (np.arange(len(counts)) + 0.5)
    low, high = min(low, 0.0), max(high, 0.0)

    def error(low: float, high: float) -> float:
        if high <= low:
            return float((counts * centres**2).sum())
        scale = (high - low) / levels
        zero = np.clip(np.rint(-low / scale), 0, levels)
        rounded = (np.clip(np.rint(centres / scale) + zero, 0, levels) - zero) * scale
        return float((counts * (rounded - centres) ** 2).sum())

    best = (low, high)
    for _ in range(2):
        for end in (0, 1):
            candidates = [best] + [
                (best[0] * share, best[1]) if end == 0 else (best[0], best[1] * share)
                for share in np.linspace(1.0, SMALLEST_SHARE, NUM_SHARES)
            ]
            best = min(candidates, key=lambda pair: error(*pair))
    return best


def find_activations(model: ModelProto, kinds: Iterable[str]) -> list[str]:
    """Return the floating point tensors that nodes of these kinds read or write, initializers aside."""
    constants = {each.name for each in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        each.name
        for each in (*inferred.value_info, *inferred.input, *inferred.output)
        if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    wanted = set(kinds)
    names = (name for node in model.graph.node if node.op_type in wanted for name in (*node.input, *node.output))
    return [name for name in dict.fromkeys(names) if name in floats and name not in constants]


def measure_ranges(
    model: ModelProto, names: list[str], open_feeds: Callable[[], Iterable[Feed]], directory: Path
) -> dict[str, tuple[float, float]]:
    """Run the model twice over the feeds, for the extremes and for histograms, and choose a range for each tensor."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {each.name for each in model.graph.output}
    inputs = {each.name for each in model.graph.input}
    for name in names:
        if name not in there and name not in inputs:
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = directory / "watched.onnx"
    onnx.save(watched, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fetched = [name for name in names if name not in inputs]

    def values(feed: Feed) -> dict[str, NDArray[np.float32]]:
        known = {each.name for each in session.get_inputs()}
        found = dict(zip(fetched, session.run(fetched, {k: v for k, v in feed.items() if k in known}), strict=True))
        return {**found, **{name: np.asarray(feed[name], np.float32) for name in names if name in inputs}}

    ends: dict[str, tuple[float, float]] = {}
    for feed in open_feeds():
        for name, array in values(feed).items():
            if array.size:
                low, high = ends.get(name, (np.inf, -np.inf))
                ends[name] = (min(low, float(array.min())), max(high, float(array.max())))
    histograms = {name: np.zeros(NUM_BINS) for name in ends}
    for feed in open_feeds():
        for name, array in values(feed).items():
            if name in ends and ends[name][1] > ends[name][0]:
                histograms[name] += np.histogram(array, NUM_BINS, ends[name])[0]
    path.unlink()
    return {
        name: search_range(histograms[name], *ends[name]) if high > low else (min(low, 0.0), max(high, 0.0))
        for name, (low, high) in ends.items()
    }

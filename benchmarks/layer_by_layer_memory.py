"""Does quantizing layer by layer stay within the model and one layer's working set?

    python benchmarks/layer_by_layer_memory.py [--layers 12] [--width 768] [--examples 16] [--tokens 64] [--threads 2]

Builds a GPT of random weights and runs each method in a fresh process. Growth is the peak of the resident memory during
the method above what it was when the model and the calibration examples were loaded (VmHWM, reset before).
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.recipes.facts import TensorFacts
from app.recipes.quantization import QuantizeInt4
from worker.engine.measure.activations import FeatureNorms
from worker.engine.measure.walk import Walk
from worker.engine.packing.encodings import Grouped
from worker.engine.programs.program import Program, Signature
from worker.engine.quantization.group_weights import Coder
from worker.engine.quantization.weights import find_weights

METHODS = ("rtn", "wanda", "awq", "gptq")
MIB = 2**20
VOCABULARY = 512


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return (batch, tokens, width)."""
        normed = self.norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (-1, 64)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.feed_norm(x))))


class Gpt(nn.Module):
    """Embedding, blocks, output layer."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """Return logits."""
        return (self.head(self.norm(self.blocks(self.tokens(tokens)))),)


def run_method(method: str, width: int, num_layers: int, num_examples: int, num_tokens: int) -> None:
    """Print one row of the table."""
    torch.manual_seed(0)
    module = fx.symbolic_trace(Gpt(width, num_layers)).eval()
    facts = TensorFacts(name="tokens", dtype="int64", shape=("batch", num_tokens))
    program = Program(module, Signature((facts,), (facts,), None), "eval")
    batches = [tuple(torch.randint(0, VOCABULARY, (1, 4, num_tokens))) for _ in range(num_examples // 4)]
    with torch.no_grad():
        program.module(*(each[:1] for each in batches[0]))
    model_bytes = sum(each.numel() * 4 for each in module.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    started_at = time.perf_counter()
    if method == "wanda":
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]

        def visit(found: dict[str, FeatureNorms]) -> None:
            for name, norms in found.items():
                weight = module.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                with torch.no_grad():
                    scores = weight.abs() * norms.squares[0].sqrt().float()
                    weight.mul_(scores > scores.median(1, keepdim=True).values)

        Walk(program, batches, layers, FeatureNorms).run(visit)
    else:
        step = QuantizeInt4.model_validate({"kind": "quantize_int4", "method": method, "group_size": 64})
        coder = Coder(program, step)
        weights = find_weights(program, embeddings=False).chosen
        if method == "rtn":
            for weight in weights:
                coder.code_plain(weight)
        else:
            coder.code_with_data(weights, batches, lambda *_: None)
    seconds = time.perf_counter() - started_at
    growth = read_status("VmHWM") - before
    kept = sum(each.codes.numel() + 4 * each.scales.numel() + each.scales.numel() for each in _codes(program))
    print(
        f"| {method} | {model_bytes / MIB:.0f} | {growth / MIB:.0f} | {kept / MIB:.0f} | {(growth - kept) / MIB:.0f} "
        f"| {(growth - kept) / model_bytes:.2f} | {seconds:.0f} |",
        flush=True,
    )


def _codes(program: Program) -> list[Grouped]:
    return [each for each in program.encodings.values() if isinstance(each, Grouped)]


def read_status(name: str) -> int:
    """Return bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def describe(width: int, num_layers: int, num_examples: int, num_tokens: int) -> str:
    """Say what the working set of the largest layer is made of, and what holding everything would take."""
    features, rows = 4 * width, num_examples * num_tokens
    weight, gram = 4 * width * features, 4 * features**2
    every_gram = num_layers * 4 * (3 * width**2 + features**2)
    every_input = num_layers * 4 * rows * (3 * width + features)
    return (
        f"{num_layers} blocks of width {width}, {num_examples} x {num_tokens} calibration tokens. Largest layer: "
        f"{features} x {width}; its weight takes {weight / MIB:.0f} MiB, its X^T X {gram / MIB:.0f} MiB, the hidden "
        f"values of all tokens {4 * rows * features / MIB:.0f} MiB.\nAll layers' X^T X at once would take "
        f"{every_gram / MIB:.0f} MiB, all layers' inputs {every_input / MIB:.0f} MiB."
    )


def main() -> None:
    """Run every method in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("examples", 16), ("tokens", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=METHODS, help="only this one, in this process")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.method:
        run_method(given.method, given.width, given.layers, given.examples, given.tokens)
        return
    print(describe(given.width, given.layers, given.examples, given.tokens))
    print(
        "\n| method | model, MiB | peak growth, MiB | codes kept, MiB | growth without codes | of the model | seconds |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for method in METHODS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--method", method], check=True)


if __name__ == "__main__":
    main()

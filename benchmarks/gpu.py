"""What a GPU gives: training throughput, and latency of a model as it is, in half precision and in integers.

    python benchmarks/gpu.py [--device cuda|cpu] [--models cnn transformer] [--width 1024] [--seconds 3]
                             [--compile | --aoti]

Integers and coded weights are those of artifacts for torch (`quantize_int8`, `quantize_int4`, `quantize_float`), and
torchao's. Without `--device` it measures the GPU, if there is one; `--device cpu` is a smoke test of the same code.
`--compile` compiles every model with torch.compile, `--aoti` adds the packages that Pare compiles ahead of time. Prints
tables with the device, driver, versions and the command. What a device or torchao cannot do is printed with the reason
instead of a number.
"""

import argparse
import copy
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from app.recipes.quantization import QuantizeInt8
from app.recipes.recipe import KINDS, Target
from worker.engine.devices import choose_device, describe_device, mixed_precision, prepare_device
from worker.engine.errors import EngineFailure
from worker.engine.measure.latency import estimate_ratio, summarize, time_interleaved, time_on_cpu, time_on_cuda
from worker.engine.programs.export import export
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.int8_torch import TorchBuilder
from worker.engine.techniques.base import Context
from worker.engine.techniques.registry import TECHNIQUES

NUM_RUNS = 50
Predict = Callable[[Tensor], Tensor]
WARM_UP_STEPS = 3


def make_cnn(width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a plain CNN for 32x32 images, and the shape of one."""
    channels = max(8, width // 8)
    layers: list[nn.Module] = []
    for before, after in ((3, channels), (channels, 2 * channels), (2 * channels, 4 * channels)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels * 16, 128), nn.ReLU(), nn.Linear(128, 16)), (
        3,
        32,
        32,
    )


def make_transformer(width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return two encoder blocks and a head on vectors, and the shape of 64 of these."""
    block = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(64 * width, 16)), (64, width)


MODELS = {"cnn": make_cnn, "transformer": make_transformer}


def measure_training(model: nn.Module, x: Tensor, seconds: float, *, bf16: bool) -> float:
    """Return examples per second of whole training steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    steps, started_at = -WARM_UP_STEPS, 0.0
    while steps <= 0 or time.perf_counter() - started_at < seconds:
        with mixed_precision(x.device, bf16=bf16):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
        if steps <= 0:
            _wait(x.device)
            started_at = time.perf_counter()
    _wait(x.device)
    return steps * len(x) / (time.perf_counter() - started_at)


def torchao_variants() -> dict[str, Callable[[], Any]]:
    """Return the configurations that are tried, by name; each is made late, because making one may already fail."""
    # Its compiled parts for other machines do not load, which it says at length.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization as q

    return {
        "int8 weight-only": q.Int8WeightOnlyConfig,
        "int8 dynamic": q.Int8DynamicActivationInt8WeightConfig,
        "int4 weight-only": lambda: q.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"),
        "fp8 weight-only": q.Float8WeightOnlyConfig,
        "fp8 dynamic": q.Float8DynamicActivationFloat8WeightConfig,
    }


PARE: dict[str, dict[str, Any]] = {
    "int8 dynamic": {"kind": "quantize_int8", "mode": "dynamic"},
    "int8 weight-only": {"kind": "quantize_int8", "mode": "weight_only"},
    "int4 weight-only": {"kind": "quantize_int4", "group_size": 32},
    "fp8 weight-only": {"kind": "quantize_float", "format": "fp8_e4m3"},
    "bf16 weight-only": {"kind": "quantize_float", "format": "bf16"},
}


def make_by_pare(model: nn.Module, x: Tensor, spec: dict[str, Any] | None, *, aoti: bool = False) -> Predict:
    """Return the artifact that a step (None: no step) makes of a model for torch on the device of x, or its package."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        exported = torch.export.export(copy.deepcopy(model).cpu().eval(), (x[:2].cpu(),), dynamic_shapes=shapes)
        torch.export.save(exported, directory / "model.pt2")
        program = open_program(directory / "model.pt2", directory)
        made: Program | FileProgram = program
        target = Target(
            device="cuda" if x.device.type == "cuda" else "cpu",
            runtime="aotinductor" if aoti else "torch",
            num_threads=torch.get_num_threads(),
        )
        step = spec and KINDS[spec["kind"]].model_validate(spec)
        if isinstance(step, QuantizeInt8):
            builder = TorchBuilder(program, step, 8, directory, for_cuda=x.device.type == "cuda")
            built = builder.build(program, "plain", {})
            made = FileProgram(built.path, program.signature, built.parameters, built.nonzero)
        elif spec and step:
            context = Context(0, 1, directory, None, lambda *_, **__: None, target=target)
            made = TECHNIQUES[spec["kind"]].run(program.copy(), step, context).program
        path = directory / ("made.aoti.pt2" if aoti else "made.pt2")
        export(made, program, "aoti" if aoti else "pt2", path, target)
        if aoti:
            package = torch._inductor.aoti_load_package(str(path))
            return lambda given: package(given)[0]
        loaded = torch.export.load(path)
    module = move_to_device_pass(loaded, x.device).module()
    return lambda given: module(given)[0]


def quantize(model: nn.Module, config: Callable[[], Any], dtype: torch.dtype) -> nn.Module:
    """Return a copy with its linear layers quantized by torchao."""
    from torchao.quantization import quantize_

    changed = copy.deepcopy(model).to(dtype)
    quantize_(changed, config())
    return changed


def list_variants(
    model: nn.Module, x: Tensor, *, aoti: bool
) -> Iterator[tuple[str, torch.dtype, Callable[[], Predict]]]:
    """Yield each variant's name, what it takes, and how it is made."""
    yield "bf16", torch.bfloat16, lambda: copy.deepcopy(model).to(torch.bfloat16)
    for name, spec in PARE.items():
        yield f"Pare {name}", torch.float32, partial(make_by_pare, model, x, spec)
    for name, compiled in {"fp32": None, **PARE}.items() if aoti else ():
        yield f"Pare {name}, aoti", torch.float32, partial(make_by_pare, model, x, compiled, aoti=True)
    for name, config in torchao_variants().items():
        dtype = torch.bfloat16 if name.startswith(("int4", "fp8 dynamic")) else torch.float32
        yield f"torchao {name}", dtype, partial(quantize, model, config, dtype)


def compare(original: Predict, result: Predict, x: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Return median latencies, their ratio with its interval, and the cosine of the outputs; `result` takes `dtype`."""
    same = x.to(dtype)
    with torch.inference_mode():
        one, other = original(x).float().flatten(), result(same).float().flatten()
        clock = time_on_cuda if x.device.type == "cuda" else time_on_cpu
        timings = time_interleaved(lambda: original(x), lambda: result(same), NUM_RUNS, clock=clock)
    ratio = estimate_ratio(timings, 0)
    threads = torch.get_num_threads()
    medians = [
        summarize(each, batch_size=len(x), num_threads=threads).p50_ms for each in (timings.original, timings.result)
    ]
    cosine = float(nn.functional.cosine_similarity(one, other, 0))
    return (
        f"{medians[0]:.3f} | {medians[1]:.3f} | {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) | {cosine:.5f}"
    )


def print_head(device: torch.device) -> None:
    """Say where the numbers come from."""
    facts = describe_device(device)
    name = platform.processor() or platform.machine() if facts is None else facts.model_dump_json()
    print(f"device: {device} {name}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true", help="every model, by torch.compile")
    parser.add_argument("--aoti", action="store_true", help="also packages that Pare compiles ahead of time")
    parser.add_argument("--threads", type=int, default=1, help="of the host")
    arguments = parser.parse_args()
    if arguments.device is None and not torch.cuda.is_available():
        print("There is no GPU here; --device cpu runs the same on the CPU.")
        return
    device = torch.device("cpu") if arguments.device == "cpu" else choose_device("cuda")
    prepare_device(device)
    torch.set_num_threads(arguments.threads)
    print_head(device)
    torch.manual_seed(0)
    made = {name: MODELS[name](arguments.width) for name in arguments.models}
    subjects = {
        name: (model.eval().to(device), torch.randn(arguments.batch_size, *shape, device=device))
        for name, (model, shape) in made.items()
    }
    print("| model | training fp32, examples/s | training bf16, examples/s |\n|---|---:|---:|")
    for name, (model, x) in subjects.items():
        rates = [measure_training(model, x, arguments.seconds, bf16=bf16) for bf16 in (False, True)]
        print(f"| {name} | {rates[0]:.4g} | {rates[1]:.4g} |", flush=True)
    print("\n| model | variant | fp32, ms | variant, ms | ratio | cosine of outputs |\n|---|---|---:|---:|---:|---:|")
    finish: Callable[[Predict], Predict] = torch.compile if arguments.compile else lambda predict: predict
    for name, (model, x) in subjects.items():
        original = finish(model)
        for variant, dtype, make in list_variants(model, x, aoti=arguments.aoti):
            try:
                result = make()
                line = compare(original, result if variant.endswith("aoti") else finish(result), x, dtype)
            except (AssertionError, EngineFailure, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                line = f"- | - | - | {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            print(f"| {name} | {variant} | {line} |", flush=True)


if __name__ == "__main__":
    main()

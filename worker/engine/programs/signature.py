"""Names and sizes of a program's inputs and outputs, with words for the sizes that may vary."""

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from app.recipes.facts import TensorFacts
from worker.engine.programs.program import Signature
from worker.engine.programs.rejections import reject

BATCH = "batch"


def build_signature(exported: ExportedProgram, output_names: tuple[str, ...]) -> Signature:
    """Return the signature of a loaded program. Axis 0 of the inputs is the batch; other variable sizes are named
    after the input and the axis where they first appear."""
    given = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    names = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if not names:
        reject("no_input", "The program takes no tensor.")
    words: dict[Any, str] = {}
    hints: dict[str, int] = {}
    for name in names:
        for axis, size in enumerate(given[name].shape):
            for symbol in sorted(_symbols(size), key=str):
                words.setdefault(symbol, BATCH if axis == 0 and size.node.expr == symbol else f"{name}_{axis}")
    for symbol, word in words.items():
        hints[word] = _hint(given.values(), symbol)
    values = [argument.meta["val"] for argument in _outputs(exported)]
    inputs = tuple(_facts(name, given[name], words) for name in names)
    first = next((facts.shape for facts in inputs if facts.shape), ())
    return Signature(
        inputs=inputs,
        outputs=tuple(_facts(name, value, words) for name, value in zip(output_names, values, strict=True)),
        batch_size=None if BATCH in words.values() else (int(first[0]) if first and isinstance(first[0], int) else 1),
        dynamic_ranges=_ranges(exported, words),
        example_sizes=hints,
    )


def _outputs(exported: ExportedProgram) -> list[Any]:
    results = exported.graph.output_node().args[0]
    specs = exported.graph_signature.output_specs
    return [node for spec, node in zip(specs, results, strict=True) if spec.kind is OutputKind.USER_OUTPUT]


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _hint(tensors: Any, symbol: Any) -> int:
    for tensor in tensors:
        for size in tensor.shape if isinstance(tensor, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr == symbol and size.node.has_hint():
                return int(size.node.hint)
            if isinstance(size, torch.SymInt) and symbol in _symbols(size):
                value = size.node.shape_env.backed_var_to_val.get(symbol)
                if value is not None:
                    return int(value)
    return 2


def _facts(name: str, value: Tensor, words: dict[Any, str]) -> TensorFacts:
    replacement = {symbol: sympy.Symbol(word, integer=True, positive=True) for symbol, word in words.items()}
    shape = tuple(
        str(size.node.expr.xreplace(replacement)) if isinstance(size, torch.SymInt) else int(size)
        for size in value.shape
    )
    return TensorFacts(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)


def _ranges(exported: ExportedProgram, words: dict[Any, str]) -> dict[str, tuple[int, int | None]]:
    ranges: dict[str, tuple[int, int | None]] = {}
    limits = {str(symbol): value for symbol, value in exported.range_constraints.items()}
    for symbol, word in words.items():
        low, high = 1, None
        if (limit := limits.get(str(symbol))) is not None:
            # Infinite bounds are no integers.
            low = max(1, int(limit.lower)) if limit.lower.is_Integer else 1
            high = int(limit.upper) if limit.upper.is_Integer else None
        known_low, known_high = ranges.get(word, (1, None))
        highs = [bound for bound in (high, known_high) if bound is not None]
        ranges[word] = (max(low, known_low), min(highs) if highs else None)
    return ranges

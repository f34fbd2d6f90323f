"""Random inputs that a program accepts: indices stay inside their tables, sizes inside their ranges."""

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from worker.engine.programs.program import Program

_PASSED_ON = {
    "to",
    "clone",
    "contiguous",
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "slice",
    "expand",
    "alias",
    "clamp",
}
_MAX_INDEX = 30_000


def make_inputs(program: "Program", batch_size: int, seed: int) -> tuple[Tensor, ...]:
    """Return inputs of the program's signature: normal floats, indices, alternating ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    signature = program.signature
    sizes = {**signature.example_sizes, "batch": batch_size}
    placeholders = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    inputs = []
    for facts, node in zip(signature.inputs, placeholders, strict=True):
        shape = [size if isinstance(size, int) else evaluate_size(size, sizes) for size in facts.shape]
        dtype: torch.dtype = getattr(torch, facts.dtype)
        if dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator).to(dtype))
            continue
        bound = _table_size(program.module, node)
        if bound is None or dtype is torch.bool:
            # Masks: never all zero in a row.
            values = (torch.arange(torch.Size(shape).numel()).reshape(shape) + 1) % 2
        else:
            values = torch.randint(0, min(bound, _MAX_INDEX, torch.iinfo(dtype).max), shape, generator=generator)
        inputs.append(values.to(dtype))
    return tuple(inputs)


def evaluate_size(size: str, values: Mapping[str, Any]) -> Any:
    """Return the value of a size such as "batch" or "4*x_2 + 1"; `values` may be integers or torch.export.Dim."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return value(left) // value(right)
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if 0 <= power <= 8:
                return value(left) ** power
        raise ValueError(f"cannot evaluate the size {size!r}")

    return value(ast.parse(size, mode="eval").body)


def _table_size(module: fx.GraphModule, node: fx.Node) -> int | None:
    """Return the smallest table that an integer input indexes, or None."""
    found: list[int] = []
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "call_module" and isinstance(target := module.get_submodule(str(user.target)), nn.Embedding):
                found.append(target.num_embeddings)
            elif user.target is torch.ops.aten.embedding.default:
                found.append(_rows(module, user.args[0]))
            elif (
                isinstance(user.target, torch._ops.OpOverload)
                and user.target._schema.name.removeprefix("aten::") in _PASSED_ON
            ):
                waiting.append(user)
    return min(found) if found else None


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.removeprefix("aten::")


def _rows(module: fx.GraphModule, table: object) -> int:
    assert isinstance(table, fx.Node)
    path, _, name = str(table.target).rpartition(".")
    weight = getattr(module.get_submodule(path), name)
    return int(weight.shape[0])

"""A first run of an imported program on shapes alone: a graph that contradicts itself ends here, not in a job."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from worker.engine.programs.capture import evaluating, tracing_batch_size
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject

_MAX_BYTES = 2**38
_MAX_PIECES = 10_000


class ShapeRun(fx.Interpreter):
    """Passes shapes, not values, through a program. Nothing is computed, changed or allocated."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._program = program
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run_shapes(self, batch_size: int) -> tuple[Tensor, ...]:
        """Run at a batch size and return outputs without values."""
        inputs = self._program.example_inputs(batch_size)
        with evaluating(self._program), torch.no_grad(), self._mode:
            outputs: tuple[Tensor, ...] = self.run(*(self._mode.from_tensor(value) for value in inputs))
        return outputs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a stand-in for a tensor of the module: the graph may change it in place."""
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value


def try_shapes(program: Program) -> None:
    """Raise what the program's first call would raise."""
    outputs = _Trial(program).run_shapes(tracing_batch_size(program))
    for facts, value in zip(program.signature.outputs, outputs, strict=True):
        found = tuple(value.shape)
        if len(found) != len(facts.shape) or any(
            isinstance(size, int) and size != other for size, other in zip(facts.shape, found, strict=True)
        ):
            reject(
                "graph_not_runnable",
                f"The output {facts.name} is described with shape {facts.shape}, but the graph computes {found}.",
            )


class _Trial(ShapeRun):
    def run_node(self, n: fx.Node) -> Any:
        """Run one node and refuse a result that no machine holds."""
        if n.op == "call_function" and (name := _name(n.target)) in _PIECES:
            args, keywords = self.fetch_args_kwargs_from_env(n)
            if (count := _PIECES[name](*args, **keywords)) > _MAX_PIECES:
                reject("tensor_too_large", f"The operator {n.target} makes {count} tensors; at most {_MAX_PIECES}.")
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.numel() * result.element_size() > _MAX_BYTES:
            reject("tensor_too_large", f"The operator {n.target} makes a tensor of shape {tuple(result.shape)}.")
        # Python's integers grow without end: forty squarings of 3 need more memory than there is.
        if isinstance(result, int) and abs(result) >= 2**63:
            reject("tensor_too_large", f"The operator {n.target} makes a size above {2**63}.")
        return result


def _name(target: Any) -> str:
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""


def _count_splits(self: Tensor, split_size: Any, dim: int = 0) -> int:
    # A list of sizes is as long as the file makes it.
    return -(-self.shape[dim] // max(1, split_size)) if isinstance(split_size, int) else len(split_size)


def _count_sections(self: Tensor, sections: Any = 1, dim: int = 0, **_: Any) -> int:
    del self, dim
    return sections if isinstance(sections, int) else 1


def _count_chunks(self: Tensor, chunks: int, dim: int = 0) -> int:
    return min(chunks, self.shape[dim])


_PIECES: dict[str, Callable[..., int]] = {
    "unbind": lambda self, dim=0: self.shape[dim],
    "split": _count_splits,
    "unsafe_split": _count_splits,
    "split_copy": _count_splits,
    "chunk": _count_chunks,
    "unsafe_chunk": _count_chunks,
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), _count_sections),
}
"""Operators that make a list of tensors -> how long it is."""

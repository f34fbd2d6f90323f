"""A program with 8-bit weights as a .pt2 file, which torch computes in integers: on a GPU, or on the CPU.

The layers are written in torch's own operators, so that the file needs nothing but torch to load. Products of integers
are aten._int_mm, which is what torchao calls for the same; docs/decisions tells why torchao does not write the file.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.quantization import QuantizeInt8
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.program import Program
from worker.engine.quantization.int8_built import Built
from worker.engine.quantization.int8_grid import SMALLEST_STEP, Floats, round_to_int8
from worker.engine.quantization.weights import LAYERS

LARGEST_CODE = 127
CUDA_COLUMNS, CUDA_ROWS = 8, 32
"""cuBLAS multiplies integers where rows and columns of the weight are multiples of 8 and there are more than 16 rows
of activations (aten/src/ATen/native/cuda/Blas.cpp, torch 2.13); zeros fill them up."""


class Int8Linear(nn.Module):
    """x W^T + b with W in 8 bits; x (..., inputs) in floating point, as the result."""

    codes: Tensor
    """int8 (outputs, inputs), each filled up with zeros to a multiple of 8 where CUDA wants it."""
    scales: Tensor
    """float32 (outputs,), or (1,)."""

    def __init__(self, layer: nn.Linear, codes: Tensor, scales: Tensor, *, dynamic: bool, for_cuda: bool) -> None:
        """`dynamic`: round every row of x to 8 bits and multiply integers; otherwise W is decoded at every call."""
        super().__init__()
        self.dynamic = dynamic
        self.outputs, self.inputs = codes.shape
        self.rows = CUDA_ROWS if for_cuda else 1
        multiple = CUDA_COLUMNS if for_cuda else 1
        self.missing = -self.inputs % multiple, -self.outputs % multiple
        if self.inputs == 1 and not for_cuda:
            # The CPU's kernel gives wrong sums for a single input (torch 2.13).
            self.missing = 1, 0
        if dynamic and any(self.missing):
            codes = functional.pad(codes, (0, self.missing[0], 0, self.missing[1]))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        y = self._multiply_integers(x) if self.dynamic else functional.linear(x, self.codes.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias

    def _multiply_integers(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        steps = (rows.abs().amax(1, keepdim=True) / LARGEST_CODE).clamp(min=SMALLEST_STEP)
        # Contiguous: CUDA has no product of a transposed left side.
        codes = (rows / steps).round().to(torch.int8).contiguous()
        if self.rows > 1 or self.missing[0]:
            codes = functional.pad(codes, (0, self.missing[0], 0, -rows.shape[0] % self.rows))
        sums = torch._int_mm(codes, self.codes.t())
        if self.rows > 1:
            sums = sums[: rows.shape[0], : self.outputs]
        return (sums.to(x.dtype) * steps * self.scales).reshape(*x.shape[:-1], self.outputs)


class Int8Embedding(nn.Module):
    """A table in 8 bits with one scale per row: rows are decoded as they are looked up."""

    codes: Tensor
    """int8 (rows, width)."""
    scales: Tensor
    """float32 (rows, 1)."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows, float32."""
        return functional.embedding(indices, self.codes).float() * functional.embedding(indices, self.scales)


class TorchBuilder:
    """Writes .pt2 files below a directory; `bits` of a weight, 8 or 7."""

    def __init__(self, program: Program, step: QuantizeInt8, bits: int, directory: Path, *, for_cuda: bool) -> None:
        assert step.mode != "static", "refused at submission"
        self._step, self._bits, self._directory, self._for_cuda = step, bits, directory, for_cuda
        self.float_file = directory / "float.pt2"
        export_pt2(program, self.float_file)
        self.float_bytes = sum(each.nbytes for each in _tensors(program))

    def build(self, program: Program, word: str, scales: Mapping[str, Floats], plain: Program | None = None) -> Built:
        """Write `<word>_int8.pt2`."""
        changed = replace(program.copy(), masks={}, encodings={}, tied=())
        done = self._replace_layers(changed, scales)
        weighted = {name for name, each in program.module.named_modules() if isinstance(each, (*LAYERS, nn.Embedding))}
        path = self._directory / f"{word}_int8.pt2"
        export_pt2(changed, path)
        tensors = _tensors(changed)
        return Built(
            program,
            plain or program,
            scales,
            path,
            frozenset(done),
            tuple(name for name, _ in program.module.named_modules() if name in weighted and name not in done),
            parameters=sum(each.numel() for each in tensors),
            nonzero=sum(int(torch.count_nonzero(each)) for each in tensors),
            weight_bytes=sum(each.nbytes for each in tensors),
        )

    def _replace_layers(self, program: Program, scales: Mapping[str, Floats]) -> set[str]:
        read = {str(node.target) for node in program.module.graph.nodes if node.op == "get_attr"}
        coded: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        multiplied = find_multiplied(program.module)
        done = set()
        for name, layer in list(program.module.named_modules(remove_duplicate=False)):
            is_table = isinstance(layer, nn.Embedding) and self._step.quantize_embeddings and layer.max_norm is None
            if not (is_table or isinstance(layer, nn.Linear)) or name in self._step.skip_layers:
                continue
            assert isinstance(layer, (nn.Linear, nn.Embedding))
            if layer.weight.dtype != torch.float32 or f"{name}.weight" in read:
                continue
            per_row = is_table or self._step.per_channel
            # Layers that share a weight share its codes.
            key = (id(layer.weight), per_row)
            if key not in coded:
                # What is only looked up is never summed: it needs no room for sums.
                bits = self._bits if id(layer.weight) in multiplied else 8
                coded[key] = _round(layer.weight, bits, scales.get(name), per_row=per_row)
            codes, grid = coded[key]
            if isinstance(layer, nn.Embedding):
                new: nn.Module = Int8Embedding(codes, grid)
            else:
                dynamic = self._step.mode == "dynamic"
                new = Int8Linear(layer, codes, grid.flatten(), dynamic=dynamic, for_cuda=self._for_cuda)
            program.module.set_submodule(name, new)
            done.add(name)
        return done


def find_multiplied(module: nn.Module) -> frozenset[int]:
    """Return the ids of weights that integer products are made with, shared with a table or not."""
    return frozenset(id(each.weight) for each in module.modules() if isinstance(each, nn.Linear))


def _round(weight: Tensor, bits: int, scales: Floats | None, *, per_row: bool) -> tuple[Tensor, Tensor]:
    codes, grid = round_to_int8(weight.detach().numpy(), 0 if per_row else None, bits, scales)
    return torch.from_numpy(codes), torch.from_numpy(np.atleast_2d(np.asarray(grid, np.float32)))


def _tensors(program: Program) -> list[Tensor]:
    """Return the parameters and buffers that the program's file stores, each once."""
    return [each.detach() for each in (*program.module.parameters(), *program.module.buffers())]

"""Attention as one operator: found in what the exporter writes, and equal to what it replaces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.intake import open_program
from worker.engine.quantization.onnx_attention import join_attention

WIDTH, HEADS = 16, 4
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Encoder(nn.Module):
    """Self-attention with a projection each, `attend` in the middle."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        joined = self.attend(q, k, v, attention_mask)
        return self.o(joined.transpose(1, 2).reshape(batch, length, WIDTH)) + attention_mask[:, :, None]


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: list[Encoder]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    return functional.scaled_dot_product_attention(q, k, v)


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    seen = mask.bool()[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return functional.scaled_dot_product_attention(q, k, v, seen)


def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    return functional.scaled_dot_product_attention(q, k, v, scale=0.05)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    return torch.softmax(q @ k.transpose(2, 3), 2) @ v


def exported(model: nn.Module, directory: Path) -> ModelProto:
    inputs = {"x": torch.randn(2, 6, WIDTH), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    dims = {0: Dim("batch", max=8), 1: Dim("length", max=12)}
    program = torch.export.export(model.eval(), (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    torch.export.save(program, directory / "model.pt2")
    export_onnx(open_program(directory / "model.pt2", directory), directory / "model.onnx")
    return onnx.load(directory / "model.onnx")


def outputs_of(model: ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    mask = np.ones((3, 5), np.int64)
    mask[1, 3:] = 0
    (found,) = session.run(None, {"x": generator.normal(size=(3, 5, WIDTH)).astype(np.float32), "attention_mask": mask})
    return np.asarray(found)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    """One of each kind; the last is no attention: its softmax runs over the queries."""
    torch.manual_seed(0)
    kinds = (plain, padded, scaled, written_out, over_queries)
    return exported(Stack([Encoder(attend) for attend in kinds]), tmp_path_factory.mktemp("several"))


def test_attention_becomes_one_operator_with_the_same_outputs(several: ModelProto) -> None:
    model = ModelProto.FromString(several.SerializeToString())
    expected = outputs_of(model)

    assert join_attention(model) == 4

    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MultiHeadAttention") == 4
    assert kinds.count("Softmax") == 1
    assert len(kinds) < len(several.graph.node) - 4 * 12
    np.testing.assert_allclose(outputs_of(model), expected, atol=1e-5)
    assert join_attention(model) == 0


def test_an_attention_whose_weights_are_an_output_is_kept(several: ModelProto) -> None:
    model = ModelProto.FromString(several.SerializeToString())
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.output[0], onnx.TensorProto.FLOAT, None))
    assert join_attention(model) == 3

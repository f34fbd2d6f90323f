"""A model of one layer and two inputs, written as .pt2 and .onnx by hand: for tests below the exporters."""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from app.recipes.facts import TensorFacts
from worker.engine.programs.program import Signature

SIGNATURE = Signature(
    inputs=(
        TensorFacts(name="x", dtype="float32", shape=("batch", 3)),
        TensorFacts(name="file", dtype="float32", shape=("batch", 3)),
    ),
    outputs=(TensorFacts(name="sum", dtype="float32", shape=("batch", 2)),),
    batch_size=None,
)


class TwoInputs(torch.nn.Module):
    """A layer of the sum of its inputs, one of which has the name of a parameter of numpy.savez."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, file: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x + file)
        return result


def write_onnx(module: TwoInputs, path: Path) -> None:
    """Write it as ONNX, node by node."""
    floats, batch = TensorProto.FLOAT, "batch"
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "file"], ["added"]),
            helper.make_node("Gemm", ["added", "weight", "bias"], ["sum"], transB=1),
        ],
        "sum",
        [helper.make_tensor_value_info(name, floats, [batch, 3]) for name in ("x", "file")],
        [helper.make_tensor_value_info("sum", floats, [batch, 2])],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in module.layer.named_parameters()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


def write_pt2(module: TwoInputs, path: Path) -> None:
    """Write it as a torch.export program with a dynamic batch."""
    batch = torch.export.Dim("batch")
    inputs = (torch.zeros(4, 3), torch.zeros(4, 3))
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch})), path)

"""ONNX files of torch's exporters and of Pare become the programs that they were made of."""

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch.utils import _pytree as pytree

from tests.engine.programs.onnx_files import export_by_torchscript, layers_of, make_onnx_file, open_checked, run_onnx
from tests.engine.zoo import ZOO, Block, export_model, make_model
from worker.engine.programs.describe import describe
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.intake import open_program

torch.set_num_threads(1)


def test_what_pare_writes_it_reads(tmp_path: Path) -> None:
    """Several inputs and outputs keep their names and order, and the weights theirs."""
    model = export_model("two_tower", tmp_path / "model.pt2")
    source = open_program(tmp_path / "model.pt2", tmp_path)
    export_onnx(source, tmp_path / "model.onnx")
    program = open_checked(tmp_path / "model.onnx", batch_size=7)
    torch.manual_seed(1)
    inputs, keywords = ZOO["two_tower"].inputs(7), ZOO["two_tower"].keywords(7)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs, **keywords))
        found = program.module(*pytree.tree_leaves((inputs, keywords)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert program.signature.inputs == source.signature.inputs
    assert program.signature.outputs == source.signature.outputs
    assert program.signature.dynamic_ranges["batch"][0] == 1
    assert program.module.state_dict().keys() == source.module.state_dict().keys()


def test_a_transformer_of_the_newer_exporter_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), Block(16, 4, causal=True), torch.nn.Linear(16, 3)).eval()
    x, axes = torch.randn(2, 6, 5), ({0: torch.export.Dim("n", min=1, max=64)},)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=axes, opset_version=18, verbose=False)
    assert exported is not None
    (tmp_path / "model.onnx").write_bytes(exported.model_proto.SerializeToString())
    program = open_checked(tmp_path / "model.onnx", batch_size=7)
    assert layers_of(program) == {
        "0": "Linear", "1.norm1": "LayerNorm", "1.attention.qkv": "Linear", "1.attention.proj": "Linear",
        "1.norm2": "LayerNorm", "1.mlp.0": "Linear", "1.mlp.3": "Linear", "2": "Linear",
    }  # fmt: skip
    # The causal mask is none of its parameters.
    assert {name for name, _ in program.module.named_parameters()} == model.state_dict().keys()
    given = torch.randn(1, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(program.module(given)[0], model(given), rtol=1e-4, atol=1e-5)
    program.module.train()(given)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in program.module.parameters())


def torchscript(name: str, directory: Path, *, dynamic: bool) -> Path:
    axes = {"given": {0: "n"}} if dynamic else None
    return export_by_torchscript(make_model(name), ZOO[name].inputs(4), directory / f"{name}.onnx", dynamic=axes)


@pytest.mark.parametrize(
    ("name", "dynamic", "expected"),
    [
        ("mlp", False, {"body.0": "Linear", "body.2": "LayerNorm", "body.3": "Linear", "head": "Linear"}),
        ("mobilenet", True, {"stem.0": "Conv2d", "blocks.0.conv.3": "Conv2d", "classifier.1": "Linear"}),
        ("resnet20", False, {"conv1": "Conv2d", "blocks.3.shortcut.0": "Conv2d", "fc": "Linear"}),
        ("unet", True, {"down1.1": "GroupNorm", "up2": "ConvTranspose2d", "out": "Conv2d"}),
        ("lstm", False, {"embedding": "Embedding", "rnn": "LSTM", "head": "Linear"}),
        ("gru_deep", True, {"embedding": "Embedding", "rnn": "GRU", "rnn_2": "GRU", "head": "Linear"}),
        ("vit", True, {"patch": "Conv2d", "blocks.1.attention.qkv": "Linear", "blocks.1.norm2": "LayerNorm"}),
        ("gpt", False, {"tokens": "Embedding", "blocks.0.mlp.0": "Linear", "head": "Linear"}),
    ],
)
def test_layers_have_their_names_again(name: str, dynamic: bool, expected: dict[str, str], tmp_path: Path) -> None:
    program = open_checked(torchscript(name, tmp_path, dynamic=dynamic), 6 if dynamic else None)
    assert expected.items() <= layers_of(program).items()
    assert program.signature.batch_size == (None if dynamic else 4)
    assert not dynamic or program.signature.inputs[0].name == "given"


def test_a_matrix_that_is_written_twice_is_tied_again(tmp_path: Path) -> None:
    program = open_checked(torchscript("gpt", tmp_path, dynamic=False))
    assert program.tied == (("tokens.weight", "head.weight"),)
    model = make_model("gpt")
    # The file holds the positions as they were picked: 9 of the 32.
    picked = 23 * 32
    assert (
        sum(each.numel() for each in program.module.parameters())
        == sum(each.numel() for each in model.parameters()) - picked
    )


def test_lengths_vary_within_the_positions(tmp_path: Path) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = torch.nn.Embedding(30, 16), torch.nn.Embedding(20, 16)
            self.register_buffer("ids", torch.arange(20).reshape(1, 20))
            self.norm, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            ids: Any = self.ids
            x = self.norm(self.tokens(input_ids) + self.positions(ids[:, : input_ids.shape[1]]))
            mask = (1.0 - attention_mask[:, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
            weights = torch.softmax(x @ x.transpose(1, 2) / x.shape[-1] ** 0.5 + mask, -1)
            return self.head((weights @ x).reshape(x.shape[0], -1, 2, 8).flatten(2)).mean(1)

    tokens, mask = torch.randint(0, 30, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    axes = {"input_ids": {0: "n", 1: "length"}, "attention_mask": {0: "n", 1: "length"}}
    # Version 14 has no layer norm: the exporter takes it apart.
    path = export_by_torchscript(Encoder().eval(), (tokens, mask), tmp_path / "encoder.onnx", opset=14, dynamic=axes)
    assert "LayerNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    program = open_checked(path)
    assert layers_of(program) == {
        "tokens": "Embedding", "positions": "Embedding", "norm": "LayerNorm", "head": "Linear",
    }  # fmt: skip
    assert [facts.shape for facts in program.signature.inputs] == [("batch", "input_ids_1")] * 2
    assert program.signature.dynamic_ranges == {"batch": (1, 4096), "input_ids_1": (2, 20)}
    for size in ((1, 20), (5, 3)):
        inputs = (torch.randint(0, 30, size), torch.ones(size, dtype=torch.long))
        with torch.no_grad():
            found = program.module(*inputs)[0].numpy()
        np.testing.assert_allclose(found, run_onnx(path, inputs)[0], rtol=1e-4, atol=1e-5)


def test_the_model_says_what_the_file_does_not(tmp_path: Path) -> None:
    program = open_checked(torchscript("mlp", tmp_path, dynamic=False))
    told = describe(program).warnings
    assert any("does not say which of its numbers are trained" in sentence for sentence in told)
    assert any("fixed at 4" in sentence for sentence in told)


def test_gelu_is_one_operator_again(tmp_path: Path) -> None:
    path = torchscript("mlp", tmp_path, dynamic=False)
    assert "Erf" in {node.op_type for node in onnx.load(path).graph.node}
    called = {node.target for node in open_checked(path).module.graph.nodes}
    assert torch.ops.aten.gelu.default in called
    assert torch.ops.aten.erf.default not in called


def test_sizes_that_the_graph_fixes_are_fixed_and_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]
    tensors = {"s": np.array([1, 12]), "w": np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)}
    program = open_checked(make_onnx_file(tmp_path / "m.onnx", nodes, {"x": ("n", 3, 4)}, tensors))
    assert program.signature.batch_size == 1
    assert any("'batch' of the input x may vary; its graph works for 1 only" in note for note in program.notes)


def test_names_that_torch_does_not_take_are_changed(tmp_path: Path) -> None:
    names = {"forward.weight": (4, 4), "a.weight": (4, 4), "a.b.weight": (4, 4), "a/weight:0": (4, 2)}
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    values = ["class", "h", "i", "j", "out:0"]
    nodes = [helper.make_node("Gemm", [values[index], name], [values[index + 1]]) for index, name in enumerate(tensors)]
    path = make_onnx_file(tmp_path / "m.onnx", nodes, {"class": ("n", 4)}, tensors, ("out:0",))
    program = open_checked(path)
    assert list(layers_of(program)) == ["forward_", "a", "a_b", "a_2"]
    assert program.signature.inputs[0].name == "input_class"
    assert program.signature.outputs[0].name == "out_0"

"""What import keeps and changes: names, gradients, buffers, unusual layers, variable sizes, sizes after pruning."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from tests.engine.zoo import export_model, make_model
from worker.engine.errors import ModelRejected
from worker.engine.measure.macs import count_macs
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.export_safetensors import export_safetensors
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program

BATCH = Dim("n", min=1, max=64)


def opened(
    model: nn.Module, inputs: tuple[Any, ...], path: Path, *, shapes: Any = None, decompose: bool = False
) -> Program:
    """Export, open, and check that the outputs are the same."""
    program = torch.export.export(model, inputs, dynamic_shapes=({0: BATCH},) if shapes is None else shapes)
    if decompose:
        with warnings.catch_warnings():
            # torch's own use of a deprecated class.
            warnings.filterwarnings("ignore", category=FutureWarning)
            program = program.run_decompositions()
    torch.export.save(program, path / "model.pt2")
    imported = open_program(path / "model.pt2", path)
    imported.module.eval()
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = imported.module(*inputs)
    for one, other in zip(found, (value for value in expected if isinstance(value, Tensor)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    return imported


def layer_types(program: Program) -> dict[str, str]:
    return {
        path: type(module).__name__ for path, module in program.module.named_modules() if type(module) is not nn.Module
    }


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(8, 16, 1, groups=2), nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.prelu, self.norm, self.drop = nn.PReLU(16), nn.InstanceNorm2d(16, affine=True), nn.Dropout2d(0.2)
        self.fc, self.rms, self.up = nn.Linear(16, 3), nn.RMSNorm(3), nn.ConvTranspose1d(3, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prelu(self.conv(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = self.fc(torch.flatten(functional.adaptive_avg_pool2d(self.drop(self.norm(self.depthwise(x))), 1), 1))
        return self.rms(x), self.up(x[:, :, None])


def test_unusual_layers_come_back_under_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = opened(Unusual().eval(), (torch.randn(3, 8, 6, 6),), tmp_path)
    types = layer_types(program)
    del types[""]
    assert types == {
        "conv": "Conv2d", "depthwise": "Conv2d", "prelu": "PReLU", "norm": "InstanceNorm2d", "drop": "Dropout2d",
        "fc": "Linear", "rms": "RMSNorm", "up": "ConvTranspose1d",
    }  # fmt: skip


def test_a_decomposed_program_runs_and_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = opened(make_model("cnn"), (torch.randn(4, 1, 8, 8),), tmp_path, decompose=True)
    sum(output.square().mean() for output in program.module.train()(*program.example_inputs(4))).backward()
    assert all(parameter.grad is not None for parameter in program.module.parameters())


class WithoutGradient(nn.Module):
    calls: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.full((2,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.frozen(x).relu()
        self.calls.add_(1)
        return self.head(features) * torch.tensor([1.0, 2.0]) * self.scale


def test_no_grad_regions_buffers_and_constants_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = opened(WithoutGradient(), (torch.randn(3, 4),), tmp_path)
    count_macs(program)
    program.module(*program.example_inputs(2))[0].sum().backward()
    assert program.module.get_parameter("frozen.weight").grad is None
    assert program.module.get_parameter("head.weight").grad is not None
    assert program.module.get_buffer("calls") == 2
    assert set(program.module.state_dict()) == {"frozen.weight", "frozen.bias", "head.weight", "head.bias", "calls"}
    export_pt2(program, tmp_path / "result.pt2")
    (tmp_path / "again").mkdir()
    again = open_program(tmp_path / "result.pt2", tmp_path / "again")
    assert again.module.get_buffer("calls") == 2


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_computed_weight_leaves_the_layer_alone(tmp_path: Path) -> None:
    program = opened(WeightNorm().eval(), (torch.randn(2, 4, 9),), tmp_path)
    assert set(layer_types(program)) == {""}
    assert set(program.module.state_dict()) == set(WeightNorm().state_dict())


class InputMajor(nn.Module):
    """Weights stored as (in, out), as GPT-2 stores them; only those of `affine` are used as a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.affine, self.scaled, self.twice = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.affine.bias, x, self.affine.weight)
        x = torch.addmm(self.scaled.bias, x, self.scaled.weight, beta=2)
        return torch.addmm(self.twice.bias, x, self.twice.weight) * self.twice.weight.sum()


def test_a_linear_layer_with_its_weight_transposed_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = InputMajor()
    program = opened(model, (torch.randn(3, 4),), tmp_path)
    types = layer_types(program)
    assert [path for path, kind in types.items() if kind == "Linear"] == ["affine"]
    state = program.module.state_dict()
    assert torch.equal(state["affine.weight"], model.affine.weight.t())
    assert torch.equal(state["twice.weight"], model.twice.weight)


class Adapted(nn.Linear):
    """A layer with a weight beside its own, which comes first."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.side_weight = nn.Parameter(torch.randn(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.side_weight) + super().forward(x)


class Held(nn.Module):
    """Weights that their owner holds itself, as nn.MultiheadAttention does; of these only `in_proj` is a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.seen_weight, self.cut_weight = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 4))
        self.one_weight = nn.Parameter(torch.randn(4, 4))
        self.two_weight = self.one_weight
        self._weight, self.adapted = nn.Parameter(torch.randn(4, 4)), Adapted(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        x = functional.linear(x, self.seen_weight) + self.seen_weight.sum()
        x = functional.linear(x, self.cut_weight.chunk(2)[0])
        x = functional.linear(functional.linear(x, self.one_weight), self.two_weight)
        return self.adapted(functional.linear(x, self._weight))


def test_a_projection_that_its_owner_holds_is_a_layer_and_keeps_its_names_in_files(tmp_path: Path) -> None:
    program = opened(Held(), (torch.randn(4, 4),), tmp_path)
    assert layer_types(program) == {"": "Program", "in_proj": "Linear", "adapted": "Linear"}
    assert program.renamed == {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
    names = set(Held().state_dict())
    for export, file in ((export_pt2, tmp_path / "again.pt2"), (export_safetensors, tmp_path / "again.safetensors")):
        export(program, file)
    assert set(torch.export.load(tmp_path / "again.pt2").state_dict) == names
    assert set(load_file(tmp_path / "again.safetensors")) == names


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 4, 4).transpose(1, 2).split(2, dim=1)
        return (
            functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(batch, length, 16)
        )


def test_grouped_query_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opened(GroupedQueries().eval(), (torch.randn(2, 5, 16),), tmp_path)


def test_variable_sizes_are_named_and_survive_export(tmp_path: Path) -> None:
    shapes = ({0: BATCH, 2: 4 * Dim("h", min=2, max=32), 3: 4 * Dim("w", min=2, max=32)},)
    program = opened(make_model("unet"), (torch.randn(2, 1, 16, 24),), tmp_path, shapes=shapes)
    signature = program.signature
    assert signature.inputs[0].shape == ("batch", 1, "4*x_2", "4*x_3")
    assert signature.outputs[0].shape == ("batch", 2, "4*x_2", "4*x_3")
    assert signature.dynamic_ranges == {"batch": (1, 64), "x_2": (2, 32), "x_3": (2, 32)}
    assert signature.example_sizes == {"batch": 2, "x_2": 4, "x_3": 6}
    export_pt2(program, tmp_path / "result.pt2")
    (tmp_path / "again").mkdir()
    assert open_program(tmp_path / "result.pt2", tmp_path / "again").signature == signature
    assert program.module(torch.randn(1, 1, 32, 8))[0].shape == (1, 2, 32, 8)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = make_model("mlp")
    model.get_parameter("head.weight").requires_grad_(False)
    program = opened(model, (torch.randn(2, 16),), tmp_path)
    assert [name for name, value in program.module.named_parameters() if not value.requires_grad] == ["head.weight"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_reshapes_follow_pruned_channels(tmp_path: Path, dynamic: bool) -> None:
    """Halve the channels before a flatten, and two of four heads of a joint projection, by hand."""
    export_model("cnn", tmp_path / "cnn.pt2", dynamic=dynamic)
    cnn = open_program(tmp_path / "cnn.pt2", tmp_path).module
    last, norm, head = cnn.get_submodule("features.4"), cnn.get_submodule("features.5"), cnn.get_submodule("fc1")
    last.weight, last.bias = nn.Parameter(last.weight[:16]), nn.Parameter(last.bias[:16])  # type: ignore[index]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name)
        setattr(norm, name, nn.Parameter(value[:16]) if isinstance(value, nn.Parameter) else value[:16])
    head.weight = nn.Parameter(head.weight[:, :64])  # type: ignore[index]
    assert cnn(torch.randn(4, 1, 8, 8))[0].shape == (4, 10)

    export_model("vit", tmp_path / "vit.pt2", dynamic=dynamic)
    vit = open_program(tmp_path / "vit.pt2", tmp_path).module
    for index in range(2):
        qkv, proj = (vit.get_submodule(f"blocks.{index}.attention.{name}") for name in ("qkv", "proj"))
        rows = torch.cat([torch.arange(16) + 32 * part for part in range(3)])
        qkv.weight, qkv.bias = nn.Parameter(qkv.weight[rows]), nn.Parameter(qkv.bias[rows])  # type: ignore[index]
        proj.weight = nn.Parameter(proj.weight[:, :16])  # type: ignore[index]
    assert vit(torch.randn(4, 3, 16, 16))[0].shape == (4, 10)


@pytest.mark.parametrize("inside", [False, True])
def test_bfloat16_is_refused_at_the_door(inside: bool, tmp_path: Path) -> None:
    """numpy has no such type: the first step that looked at weights would fail."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(torch.bfloat16)).float()

    model = Cast() if inside else nn.Softmax(1)
    program = torch.export.export(model, (torch.randn(2, 4, dtype=torch.float32 if inside else torch.bfloat16),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(ModelRejected, match="bfloat16") as caught:
        open_program(tmp_path / "model.pt2", tmp_path)
    assert caught.value.code == "unsupported_dtype"


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


def test_what_cannot_be_imported_is_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Item(), (torch.randn(5),)), tmp_path / "model.pt2")
    with pytest.raises(ModelRejected) as caught:
        open_program(tmp_path / "model.pt2", tmp_path)
    assert caught.value.code in ("unsupported_operator", "data_dependent_size")


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def test_an_operator_on_unusual_numbers_is_named_rather_than_its_numbers(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Spectrum(), (torch.randn(5),)), tmp_path / "model.pt2")
    with pytest.raises(ModelRejected, match="fft_rfft") as caught:
        open_program(tmp_path / "model.pt2", tmp_path)
    assert caught.value.code == "unsupported_operator"

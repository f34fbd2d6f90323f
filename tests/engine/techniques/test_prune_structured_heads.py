"""Whole attention heads, joint projections, grouped queries, streams and padding shortcuts: exact on what is left."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.engine.techniques.pruning_models import load, load_module, prune, pruned, size
from worker.engine.pruning.groups import find_channels
from worker.engine.pruning.removal import remove_channels


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_heads_of_a_joint_projection_go_whole(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=name == "vit")
    channels = find_channels(program)
    gone = {"blocks.0.attention.qkv": np.array([1, 2]), "blocks.1.attention.qkv": np.array([3])}
    small = remove_channels(program, channels, gone).program
    qkv = small.module.get_submodule("blocks.0.attention.qkv")
    assert isinstance(qkv, nn.Linear)
    assert (qkv.in_features, qkv.out_features) == (32, 3 * 16)
    with torch.no_grad():
        for layer, heads in gone.items():
            weight = program.module.get_parameter(layer.replace("qkv", "proj.weight"))
            weight.unflatten(1, (4, 8))[:, heads] = 0
    inputs = program.example_inputs(4, seed=7)
    torch.testing.assert_close(small.module.eval()(*inputs), program.module.eval()(*inputs), atol=1e-5, rtol=1e-4)


class Grouped(nn.Module):
    """Attention in which `num_queries` query heads share `num_keys` key and value heads, in three ways of writing."""

    def __init__(self, num_queries: int, num_keys: int, style: str) -> None:
        super().__init__()
        self.sizes, self.style = (num_queries, num_keys), style
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 3)
        width = 4
        if style == "joint":
            self.qkv = nn.Linear(24, (num_queries + 2 * num_keys) * width)
        else:
            self.q, self.k, self.v = (nn.Linear(24, n * width) for n in (num_queries, num_keys, num_keys))
        self.o = nn.Linear(num_queries * width, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        num_queries, num_keys = self.sizes
        if self.style == "joint":
            parts = self.qkv(x).split([num_queries * 4, num_keys * 4, num_keys * 4], dim=-1)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(batch, length, -1, 4).transpose(1, 2) for part in parts)
        times = num_queries // num_keys
        if self.style == "enable_gqa":
            y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.style == "expand":
                k, v = (
                    part[:, :, None].expand(batch, num_keys, times, length, 4).reshape(batch, num_queries, length, 4)
                    for part in (k, v)
                )
            else:
                k, v = (part.repeat_interleave(times, 1) for part in (k, v))
            y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return self.head(x + self.o(y.transpose(1, 2).reshape(batch, length, -1)))


@pytest.mark.parametrize("style", ["enable_gqa", "expand", "joint"])
def test_a_key_head_goes_with_its_group_of_query_heads(style: str, tmp_path: Path) -> None:
    program = load_module(Grouped(6, 3, style), (torch.randn(2, 5, 6),), tmp_path, dynamic=style != "joint")
    channels = find_channels(program)
    group = next(each for each in channels.groups if each.structure == "heads")
    assert (group.num_units, group.unit_size) == (3, 8 if style == "joint" else 4)
    small = remove_channels(program, channels, {group.name: np.array([1])}).program
    o = small.module.get_submodule("o")
    assert isinstance(o, nn.Linear)
    assert o.in_features == 16
    with torch.no_grad():
        program.module.get_parameter("o.weight").unflatten(1, (3, 2, 4))[:, 1] = 0
    inputs = program.example_inputs(2, seed=3)
    torch.testing.assert_close(small.module.eval()(*inputs), program.module.eval()(*inputs), atol=1e-5, rtol=1e-4)


def test_structures_choose_what_goes(tmp_path: Path) -> None:
    widths = {}
    for structure in ("hidden_units", "heads", "width"):
        outcome = prune(load("vit", tmp_path), structures=[structure])
        module = pruned(outcome).module
        layers = [module.get_submodule(f"blocks.0.{name}") for name in ("mlp.0", "attention.qkv", "norm1")]
        widths[structure] = [len(layer.get_parameter("weight")) for layer in layers]
        assert any("not among the structures" in warning for warning in outcome.warnings)
        assert size(pruned(outcome)) < size(load("vit", tmp_path))
    assert widths == {"hidden_units": [64, 96, 32], "heads": [128, 48, 32], "width": [128, 96, 16]}
    default = pruned(prune(load("vit", tmp_path)))
    assert default.module.get_parameter("position").shape[-1] == 32


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_the_width_of_a_stream_goes_through_norms_embeddings_and_free_parameters(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=name == "vit")
    small = pruned(prune(program, structures=["width"], ratio=0.25))
    state = {key: tuple(value.shape) for key, value in small.module.state_dict().items()}
    assert state["norm.weight"] == (24,)
    assert state["blocks.1.mlp.0.weight"] == (128, 24)
    if name == "vit":
        assert (state["position"], state["token"]) == ((1, 17, 24), (1, 1, 24))
    else:
        assert state["tokens.weight"] == state["head.weight"] == (64, 24)
    inputs = program.example_inputs(4, seed=1)
    assert small.module.eval()(*inputs)[0].shape == program.module.eval()(*inputs)[0].shape


class Padded(nn.Module):
    """A residual network whose shortcut subsamples and pads channels with zeros (He et al. 2016, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wider, self.after = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.same(x))
        x = torch.relu(self.wider(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = torch.relu(x + self.after(x))
        return self.head(x.mean((2, 3)))


def test_channels_of_a_padded_shortcut_go_in_every_stage(tmp_path: Path) -> None:
    program = load_module(Padded(), (torch.randn(2, 3, 8, 8),), tmp_path)
    channels = find_channels(program)
    assert [(group.name, group.num_units) for group in channels.groups] == [("stem", 8), ("wider", 8)]
    gone = {"stem": np.array([0, 5]), "wider": np.array([1, 6, 7])}
    removal = remove_channels(program, channels, gone)
    assert removal.removed == {"stem": 2, "wider": 3}
    pads = [node.args[1] for node in removal.program.module.graph.nodes if "pad" in node.name]
    assert pads == [[0, 0, 0, 0, 3, 2]]
    with torch.no_grad():
        first, second = [0, 5], [0 + 4, 5 + 4, 1, 6 - 4 + 12, 7 - 4 + 12]
        for name, columns in (("same", first), ("wider", first), ("after", second), ("head", second)):
            program.module.get_parameter(f"{name}.weight")[:, columns] = 0
    inputs = program.example_inputs(3, seed=3)
    expected = program.module.eval()(*inputs)
    torch.testing.assert_close(removal.program.module.eval()(*inputs), expected, atol=1e-5, rtol=1e-4)

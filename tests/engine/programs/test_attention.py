"""torch's own attention in all its forms: imported as layers and heads, which can be removed, with names kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from app.recipes.low_rank import FactorizeLowRank
from app.recipes.pruning import PruneStructured
from tests.engine.programs.test_import import BATCH, layer_types, opened
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.export_safetensors import export_safetensors
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import factorize_low_rank, prune_structured
from worker.engine.techniques.base import Context

LENGTH = 5


class Attention(nn.Module):
    """nn.MultiheadAttention; `how` gives it what it attends to."""

    def __init__(self, how: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.attn, self.how = nn.MultiheadAttention(16, 4, **options), how

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.how(self.attn, x, y)


class Block(nn.Module):
    """One of torch's blocks around it; `how` calls it."""

    def __init__(self, block: Callable[..., nn.Module], how: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.block, self.how = block(16, 4, 32, **({"batch_first": True} | options)), how

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.how(self.block, x, y)


def causal(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1])


def padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x[:, 1:, 0] > 9, (1, 0))


FIRST = {"batch_first": True}
ENCODER, DECODER = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
MODELS: dict[str, Callable[[], nn.Module]] = {
    "self": lambda: Attention(lambda f, x, _: f(x, x, x, need_weights=False)[0], **FIRST),
    "weights that nobody reads": lambda: Attention(lambda f, x, _: f(x, x, x)[0], **FIRST),
    "without bias": lambda: Attention(lambda f, x, _: f(x, x, x)[0], bias=False, **FIRST),
    "length first": lambda: Attention(lambda f, x, _: f(x, x, x)[0]),
    "causal": lambda: Attention(lambda f, x, _: f(x, x, x, attn_mask=causal(x))[0], **FIRST),
    "padded": lambda: Attention(lambda f, x, _: f(x, x, x, key_padding_mask=padded(x))[0], **FIRST),
    "cross": lambda: Attention(lambda f, x, y: f(x, y, y)[0], **FIRST),
    "cross without weights": lambda: Attention(lambda f, x, y: f(x, y, y, need_weights=False)[0], **FIRST),
    "three origins": lambda: Attention(lambda f, x, y: f(x, y, y * 2)[0], **FIRST),
    "encoder": lambda: Block(ENCODER, lambda f, x, _: f(x)),
    "encoder, causal": lambda: Block(ENCODER, lambda f, x, _: f(x, src_mask=causal(x), is_causal=True)),
    "encoder, padded": lambda: Block(ENCODER, lambda f, x, _: f(x, src_key_padding_mask=padded(x)), norm_first=True),
    "encoder, length first": lambda: Block(ENCODER, lambda f, x, _: f(x), batch_first=False),
    "decoder": lambda: Block(DECODER, lambda f, x, y: f(x, y, causal(x), memory_key_padding_mask=padded(y))),
}


def open_attention(case: str, directory: Path, shapes: Any = ({0: BATCH}, {0: BATCH})) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = MODELS[case]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # its biases are zeros
    inputs = (torch.randn(3, LENGTH, 16), torch.randn(3, LENGTH, 16))
    return model, opened(model, inputs, directory, shapes=shapes)


@pytest.mark.parametrize("case", MODELS)
def test_projections_are_layers_with_names_of_the_model_and_half_of_the_heads_can_go(case: str, tmp_path: Path) -> None:
    model, program = open_attention(case, tmp_path)
    assert not [node for node in program.module.graph.nodes if "bmm" in str(node.target)]
    layers = {path for path, kind in layer_types(program).items() if kind == "Linear" and "in_proj" in path}
    stored = {name.rpartition(".")[0] for name, _ in program.module.named_parameters() if "in_proj" in name}
    assert layers == stored != set()

    export_pt2(program, tmp_path / "again.pt2")
    export_safetensors(program, tmp_path / "again.safetensors")
    exported = torch.export.load(tmp_path / "again.pt2")
    for state in (exported.state_dict, load_file(tmp_path / "again.safetensors")):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    inputs = program.example_inputs(4)
    torch.testing.assert_close(exported.module()(*inputs)[0], program.module(*inputs)[0], rtol=0, atol=1e-6)

    step = PruneStructured(kind="prune_structured", ratio=0.5, round_to=1, criterion="magnitude")
    small = prune_structured.run(program.copy(), step, context(tmp_path)).program
    assert isinstance(small, Program)
    for layer in layers:
        whole, half = program.module.get_submodule(layer), small.module.get_submodule(layer)
        assert half.out_features == whole.out_features // 2  # type: ignore[operator]
    assert small.module(*inputs)[0].shape == program.module(*inputs)[0].shape


def context(directory: Path) -> Context:
    return Context(0, 1, directory, None, lambda *_, **__: None)


def test_the_length_may_vary(tmp_path: Path) -> None:
    length = Dim("length", min=2, max=50)
    model, program = open_attention("cross", tmp_path, ({0: BATCH, 1: length}, {0: BATCH, 1: length}))
    inputs = (torch.randn(2, 9, 16), torch.randn(2, 9, 16))
    torch.testing.assert_close(program.module(*inputs)[0], model(*inputs), rtol=0, atol=1e-6)
    assert "scaled_dot_product_attention" in program.module.code


def test_pieces_that_a_step_replaced_keep_their_own_names(tmp_path: Path) -> None:
    _, program = open_attention("cross", tmp_path)
    step = FactorizeLowRank(kind="factorize_low_rank", skip_layers=("attn.in_proj_q",))
    small = factorize_low_rank.run(program, step, context(tmp_path)).program
    assert isinstance(small, Program)
    export_safetensors(small, tmp_path / "small.safetensors")
    names = load_file(tmp_path / "small.safetensors").keys()
    assert "attn.in_proj_q.weight" in names
    assert "attn.in_proj_weight" not in names


def test_weights_that_are_read_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention(lambda f, x, y: f(x, y, y), batch_first=True)
    program = opened(
        model, (torch.randn(3, LENGTH, 16), torch.randn(3, LENGTH, 16)), tmp_path, shapes=({0: BATCH}, {0: BATCH})
    )
    assert "bmm" in program.module.code
    assert {"attn.in_proj_q", "attn.in_proj_kv"} <= layer_types(program).keys()


def test_attention_in_training_keeps_its_dropout(tmp_path: Path) -> None:
    model = Attention(lambda f, x, y: f(x, y, y)[0], batch_first=True, dropout=0.5).train()
    inputs = (torch.randn(3, LENGTH, 16), torch.randn(3, LENGTH, 16))
    torch.export.save(torch.export.export(model, inputs), tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    assert "Dropout" in layer_types(program).values()
    torch.testing.assert_close(program.module.eval()(*inputs)[0], model.eval()(*inputs), rtol=0, atol=1e-6)

"""Statistics of layer inputs: they are the rows that a layer multiplies by its flattened weight, whatever the layer."""

import pytest
import torch
from torch import Tensor, fx, nn

from app.recipes.facts import TensorFacts
from worker.engine.measure.activations import FeatureNorms, Gram, can_collect, collect, iterate_rows, row_shape
from worker.engine.programs.program import Program, Signature

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 4, bias=False), (2, 3, 5)),
    (nn.Conv1d(4, 8, 3, dilation=2, padding="same", groups=4, bias=False), (5, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False), (5, 4, 9, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (3, 4, 6, 6)),
    (nn.Conv3d(2, 4, (1, 2, 3), bias=False), (2, 2, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_rows_times_the_flattened_weight_are_the_outputs(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.measure.activations.MAX_ROW_NUMBERS", 300)
    inputs = torch.randn(shape)
    pieces = list(iterate_rows(layer, inputs))
    assert len(pieces) > 1 or isinstance(layer, nn.Linear)
    rows = torch.cat(pieces, 1)
    groups, features = row_shape(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = torch.einsum("grf,gof->rgo", rows, weight.reshape(groups, -1, features)).flatten(1)
    outputs = layer(inputs)
    expected = outputs.flatten(0, -2) if isinstance(layer, nn.Linear) else outputs.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One layer called twice, and one that holds its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.other.weight = self.one.weight
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.head(self.other(self.one(self.one(self.dropout(x))))),)


def make() -> Program:
    torch.manual_seed(0)
    facts = TensorFacts(name="x", dtype="float32", shape=("batch", 4))
    return Program(fx.symbolic_trace(Twice()).train(), Signature((facts,), (facts,), None), "train")


def test_every_call_and_every_name_of_a_weight_is_seen() -> None:
    program, batches = make(), [(torch.randn(3, 4),), (torch.randn(5, 4),)]
    found = collect(program, ["one", "other", "head"], batches, FeatureNorms)
    one, other, dropout = (program.module.get_submodule(name) for name in ("one", "other", "dropout"))
    seen: dict[str, list[Tensor]] = {"one": [], "head": []}
    for (x,) in batches:
        first = one(x)
        second = one(first)
        seen["one"] += [x, first, second]
        seen["head"].append(other(second))
    assert found["one"] is found["other"]
    for name, values in seen.items():
        rows = torch.cat(values).detach()
        assert found[name].num_rows == len(rows)
        torch.testing.assert_close(found[name].squares[0], rows.double().square().sum(0), rtol=1e-5, atol=1e-6)
    assert dropout.training, "the mode is put back"


def test_a_gram_is_the_sum_of_outer_products() -> None:
    layer, inputs = nn.Linear(6, 2), torch.randn(40, 6)
    gram = Gram(layer)
    for rows in iterate_rows(layer, inputs):
        gram.add(rows)
    torch.testing.assert_close(gram.matrix[0], inputs.T @ inputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.magnitudes[0], inputs.double().abs().sum(0), rtol=1e-6, atol=1e-6)
    assert gram.num_rows == 40


def test_layers_without_rows_are_told_apart() -> None:
    assert can_collect(nn.Conv2d(1, 1, 1))
    assert not can_collect(nn.ConvTranspose2d(1, 1, 1))
    assert not can_collect(nn.LSTM(1, 1))
    assert not can_collect(nn.Embedding(2, 2))

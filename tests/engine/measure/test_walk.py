"""Walking layer by layer: what a layer sees comes from the changed layers before it, and little is held meanwhile."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from app.recipes.facts import TensorFacts
from worker.engine.measure.activations import Gram, collect
from worker.engine.measure.walk import Walk
from worker.engine.programs.program import Program, Signature

LAYERS = ["query", "key", "value", "out", "up", "down", "conv", "head"]


class Mixed(nn.Module):
    """Parallel layers, a residual that is changed in place, a convolution, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.out(functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))
        y = torch.ops.aten.add_.Tensor(y, x)
        y = torch.ops.aten.add_.Tensor(y, self.down(self.relu(self.up(y))))
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return (self.head(self.head(y)),)


def make() -> tuple[Program, list[tuple[Tensor]]]:
    torch.manual_seed(0)
    facts = TensorFacts(name="x", dtype="float32", shape=("batch", 5, 8))
    program = Program(fx.symbolic_trace(Mixed()).eval(), Signature((facts,), (facts,), None), "eval")
    return program, [(torch.randn(size, 5, 8),) for size in (4, 4, 2)]


@pytest.mark.parametrize("hold_bytes", [0, 700, 10**9])
def test_each_layer_sees_what_the_changed_ones_before_it_make(hold_bytes: int) -> None:
    program, batches = make()
    kept = [inputs[0].clone() for inputs in batches]
    seen: dict[str, Tensor] = {}
    waves: list[set[str]] = []

    def visit(found: dict[str, Gram]) -> None:
        waves.append(set(found))
        for name, gram in found.items():
            if name != "head":
                expected = collect(program, [name], [(each.clone(),) for (each,) in batches], Gram)[name].matrix
                torch.testing.assert_close(gram.matrix, expected, rtol=1e-4, atol=1e-4)
            seen[name] = gram.matrix
        with torch.no_grad():
            for name in found:
                program.module.get_parameter(f"{name}.weight").mul_(1.5)

    Walk(program, batches, LAYERS, Gram, hold_bytes).run(visit)
    assert waves == [{"query", "key", "value"}, {"out"}, {"up"}, {"down"}, {"conv"}, {"head"}]
    assert seen["query"] is seen["key"], "what reads the same value shares its statistics"
    for inputs, before in zip(batches, kept, strict=True):
        assert torch.equal(inputs[0], before), "inputs are not changed in place"


def test_what_is_held_stays_small() -> None:
    program, batches = make()
    walk = Walk(program, batches, LAYERS, Gram, hold_bytes=1600)
    walk.run(lambda _: None)
    # 10 examples of 5 x 8 floats are 1600 bytes; the hidden layer's 6400 are passed without holding them.
    assert 0 < walk.max_held_bytes <= 1600


def test_layers_that_are_never_called_get_no_visit() -> None:
    program, batches = make()
    program.module.add_submodule("idle", nn.Linear(2, 2))
    visited: list[str] = []
    Walk(program, batches, ["idle", "up"], Gram).run(visited.extend)
    assert visited == ["up"]

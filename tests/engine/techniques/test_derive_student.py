"""Deriving a student: blocks and channels really go, what stays keeps its weights, and plain chains are refused."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from app.recipes.students import DeriveStudent
from tests.engine.folders import make_folder
from tests.engine.techniques.learning import context, make_cnn, make_zoo
from tests.engine.techniques.opening import open_module
from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program
from worker.engine.students.blocks import Block, Stage, find_stages
from worker.engine.techniques import derive_student
from worker.engine.techniques.base import Outcome


class Residual(nn.Module):
    """A convolution around which a shortcut leads, through a convolution where the shape changes."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out)
        self.shortcut = nn.Identity() if num_in == num_out else nn.Conv2d(num_in, num_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += self.shortcut(x)
        return out.relu_()


class SmallResNet(nn.Module):
    """Five residual blocks, of which the third changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        sizes = [8, 8, 8, 16, 16, 16]
        self.blocks = nn.Sequential(*(Residual(a, b) for a, b in itertools.pairwise(sizes)))
        self.fc = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(image)).mean((2, 3)))
        return logits


@cache
def _make_resnet() -> Program:
    torch.manual_seed(0)
    return open_module(SmallResNet(), (torch.zeros(2, 1, 8, 8),), make_folder())


def make(name: str) -> Program:
    """Return a program of its own for the test."""
    return _make_resnet().copy() if name == "resnet" else make_zoo(name)


def derive(program: Program, **spec: float) -> Outcome:
    step = DeriveStudent.model_validate({"kind": "derive_student", **spec})
    return derive_student.run(program.copy(), step, context(None))  # type: ignore[arg-type]


def count(program: Program) -> int:
    return sum(parameter.numel() for parameter in program.module.parameters())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet", {"blocks": (5, 4)}),
        ("vit", {"blocks": (2, 2)}),
    ],
)
def test_residual_blocks_are_found_and_those_that_change_the_shape_stay(
    name: str, stages: dict[str, tuple[int, int]]
) -> None:
    found = {stage.name: (stage.num_blocks, len(stage.droppable)) for stage in find_stages(make(name))}
    assert found == stages


def test_dropped_blocks_are_gone_and_the_others_keep_their_weights() -> None:
    teacher = make("resnet")
    outcome = derive(teacher, width=1, depth=0.6)
    student = outcome.program
    assert isinstance(student, Program)
    assert outcome.facts["blocks_dropped"] == 2
    assert outcome.facts["parameters_after"] == count(student) < 0.8 * count(teacher)
    assert outcome.facts["macs_after"] < 0.8 * outcome.facts["macs_before"]  # type: ignore[operator]
    theirs = dict(teacher.module.named_parameters())
    mine = dict(student.module.named_parameters())
    assert set(mine) < set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_dropped_block_is_the_identity() -> None:
    """What is left computes what the teacher computes where the branches of the block give zero."""
    teacher = make_zoo("vit")
    outcome = derive(teacher, width=1, depth=0.5)
    assert isinstance(outcome.program, Program)
    silenced = teacher.copy()
    with torch.no_grad():
        for layer in ("attention.proj", "mlp.3"):
            for parameter in silenced.module.get_submodule(f"{outcome.facts['dropped']}.{layer}").parameters():
                parameter.zero_()
    inputs = teacher.example_inputs(3)
    assert torch.allclose(outcome.program.module.eval()(*inputs)[0], silenced.module.eval()(*inputs)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_width_and_depth_shrink_together(name: str) -> None:
    teacher = make(name)
    outcome = derive(teacher, width=0.5, depth=0.6)
    assert isinstance(outcome.program, Program)
    assert count(outcome.program) < 0.5 * count(teacher)
    inputs = teacher.example_inputs(3)
    for got, want in zip(outcome.program.module.eval()(*inputs), teacher.module.eval()(*inputs), strict=True):
        assert got.shape == want.shape


def test_a_plain_chain_has_no_block_to_drop_and_says_so() -> None:
    plain = make_cnn(width=8)
    with pytest.raises(StepFailed, match="no residual block repeats") as caught:
        derive(plain, width=1, depth=0.5)
    assert caught.value.code == "no_repeated_blocks"
    assert "depth must be 1" in (derive_student.inspect(plain).missing or "")
    assert derive_student.inspect(make("resnet")).missing is None


def test_a_width_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(StepFailed, match="removes no channel") as caught:
        derive(make_cnn(width=8), width=0.9, round_to=64)
    assert caught.value.code == "nothing_to_narrow"


@pytest.mark.parametrize(
    ("num_blocks", "droppable", "depth", "dropped"),
    [(12, 12, 0.5, [1, 3, 5, 7, 9, 11]), (3, 2, 0.5, [1]), (3, 2, 0.1, [0, 1]), (1, 1, 0.1, []), (4, 4, 0.9, [])],
)
def test_blocks_are_dropped_evenly_and_never_all(
    num_blocks: int, droppable: int, depth: float, dropped: list[int]
) -> None:
    blocks = tuple(Block(f"layers.{number}", "layers") for number in range(droppable))
    chosen = Stage("layers", num_blocks, blocks).choose(depth)
    assert [blocks.index(block) for block in chosen] == dropped

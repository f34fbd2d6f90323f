"""Residual blocks that can be dropped: where y = x + f(x), the block f can go and x takes its place.

Found in the graph: an addition one of whose terms is an ancestor of the other, with layers in between. Its shape is
kept by definition, so nothing else has to change. Branches whose layers stand under one number of the module's names
(`layers.3.attention` and `layers.3.mlp`) are one block; the numbers beside it are its stage.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program
from worker.engine.pruning.shapes import allowed_batch, record_shapes

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, operator.add, operator.iadd)
_BATCHES = (2, 5)


@dataclass(frozen=True)
class Branch:
    """One addition x + f(x)."""

    addition: fx.Node
    kept: fx.Node
    """x."""
    inner: frozenset[fx.Node]
    """f."""
    layers: tuple[str, ...]
    """Of f."""


@dataclass
class Block:
    """Branches that are dropped together."""

    name: str
    stage: str
    branches: list[Branch] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind after each other; some of them may change the shape, and must stay."""

    name: str
    num_blocks: int
    droppable: tuple[Block, ...]

    def choose(self, depth: float) -> tuple[Block, ...]:
        """Return the blocks to drop so that about `depth` of the stage stays, and at least one block."""
        fixed = self.num_blocks - len(self.droppable)
        kept = max(int(self.num_blocks * depth + 0.5), fixed, 1)
        num_dropped = self.num_blocks - kept
        # Evenly: of n blocks, those in the middle of k equal parts; neither end is preferred.
        size = len(self.droppable)
        places = {int((index + 0.5) * size / num_dropped) for index in range(num_dropped)}
        return tuple(block for index, block in enumerate(self.droppable) if index in places)


def find_stages(program: Program) -> list[Stage]:
    """Return the stages that have blocks to drop, in the order of the graph."""
    shapes = record_shapes(program, allowed_batch(program, _BATCHES[0]))
    branches = [
        branch for node in program.module.graph.nodes if (branch := _read_branch(program, node, shapes)) is not None
    ]
    additions = {branch.addition for branch in branches}
    blocks: dict[str, Block] = {}
    for branch in branches:
        if additions & branch.inner:
            continue  # a block around blocks, e.g. a U-Net's skip: without it, most of the model would be gone
        name, stage = _name_block(branch.layers)
        blocks.setdefault(name, Block(name, stage)).branches.append(branch)
    stages: dict[str, list[Block]] = {}
    for block in blocks.values():
        stages.setdefault(block.stage, []).append(block)
    return [Stage(name, _count_blocks(program, name, each), tuple(each)) for name, each in stages.items()]


def drop_blocks(program: Program, blocks: Sequence[Block]) -> Program:
    """Return a copy without these blocks; raises StepFailed where it does not run any more."""
    small = program.copy()
    nodes = {node.name: node for node in small.module.graph.nodes}
    branches = {branch.addition.name: branch for block in blocks for branch in block.branches}
    gone = set[str]()
    # From the end: what stands for a dropped addition may be an addition that is dropped itself.
    for name in reversed([node.name for node in program.module.graph.nodes if node.name in branches]):
        branch = branches[name]
        nodes[name].replace_all_uses_with(nodes[branch.kept.name])
        gone |= {name, *(node.name for node in branch.inner)}
    # By hand: dead code elimination keeps what works in place, such as relu_ and a batch norm's counter.
    for node in reversed(list(small.module.graph.nodes)):
        if node.name in gone and not node.users:
            small.module.graph.erase_node(node)
    small.module.graph.eliminate_dead_code()
    small.module.delete_all_unused_submodules()
    small.module.graph.lint()
    small.module.recompile()
    names = {name for name, _ in small.module.named_parameters(remove_duplicate=False)}
    small.tied = tuple(kept for group in small.tied if len(kept := tuple(name for name in group if name in names)) > 1)
    _check(program, small, [block.name for block in blocks])
    return small


def _check(program: Program, small: Program, names: list[str]) -> None:
    sizes = _BATCHES if program.signature.batch_size is None else _BATCHES[:1]
    for size in sizes:
        inputs = program.example_inputs(allowed_batch(program, size), seed=0)
        with torch.no_grad():
            expected, actual = program.module.eval()(*inputs), small.module.eval()(*inputs)
        for want, got in zip(expected, actual, strict=True):
            if want.shape != got.shape or not torch.isfinite(got).all():
                raise StepFailed(
                    f"without the blocks {names} an output of shape {tuple(want.shape)} becomes {tuple(got.shape)}"
                    + ("" if want.shape != got.shape else " and is not finite"),
                    code="blocks_not_droppable",
                    fix="Set depth to 1 and shrink the width only.",
                )


def _read_branch(program: Program, node: fx.Node, shapes: dict[fx.Node, object]) -> Branch | None:
    if node.op != "call_function" or node.target not in _ADDITIONS:
        return None
    terms = node.args[:2]
    if len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms) or node.kwargs.get("alpha", 1) != 1:
        return None
    for kept in terms:
        assert isinstance(kept, fx.Node)
        between = _between(kept, _other(node, kept))
        if between and shapes.get(kept) == shapes.get(node):
            layers = tuple(
                str(each.target) for each in node.graph.nodes if each in between and each.op == "call_module"
            )
            if any(_has_weights(program, name) for name in layers):
                return Branch(node, kept, frozenset(between), layers)
    return None


def _has_weights(program: Program, name: str) -> bool:
    return any(True for _ in program.module.get_submodule(name).parameters())


def _other(addition: fx.Node, kept: fx.Node) -> fx.Node:
    first, second = addition.args[:2]
    other = second if first is kept else first
    assert isinstance(other, fx.Node)
    return other


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node] | None:
    """Return the nodes on the ways from `start` to `end`, None where there is no way."""
    above = _closure(end, lambda node: node.all_input_nodes, start)
    if start not in above or end is start:
        return None
    below = _closure(start, lambda node: list(node.users), end)
    return (above & below) - {start}


def _closure(node: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]], stop: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        for each in neighbours(waiting.pop()):
            if each not in found:
                found.add(each)
                if each is not stop:
                    waiting.append(each)
    return found


def _name_block(layers: Sequence[str]) -> tuple[str, str]:
    """Return the block's name, up to the last number that all its layers share, and what stands before the number."""
    paths = [name.split(".") for name in layers]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    parts = paths[0][:shared]
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return ".".join(parts) or layers[0], ""
    return ".".join(parts[: numbers[-1] + 1]), ".".join(parts[: numbers[-1]])


def _count_blocks(program: Program, stage: str, blocks: Sequence[Block]) -> int:
    if all(block.stage == "" and not block.name.isdigit() for block in blocks):
        return len(blocks)
    prefix = f"{stage}." if stage else ""
    numbers = {
        name.removeprefix(prefix).split(".")[0]
        for name, _ in program.module.named_parameters()
        if name.startswith(prefix)
    }
    return len({number for number in numbers if number.isdigit()})

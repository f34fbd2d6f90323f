"""Files for torch name weights as the model's own code does, whatever layers they were imported as."""

import operator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, TensorArgument

from worker.engine.programs.program import Program

aten = torch.ops.aten


def restore_names(exported: ExportedProgram, program: Program) -> None:
    """Let the parameters of an exported program have the names of the model that was uploaded, in place.

    Pieces of one parameter become it again, and the graph cuts it as the model did. What a step made of a parameter is
    named as it is here.
    """
    state = exported.state_dict
    for name, pieces in program.joined.items():
        if all(piece in state for piece in pieces):
            _join(exported, name, pieces)
    for spec in exported.graph_signature.input_specs:
        if spec.target in program.renamed:
            spec.target = program.renamed[spec.target]
    for new in program.renamed.keys() & state.keys():
        state[program.renamed[new]] = state.pop(new)


def restore_state(tensors: dict[str, Tensor], program: Program) -> dict[str, Tensor]:
    """Return tensors by the names of the model that was uploaded."""
    named = {program.renamed.get(name, name): tensor for name, tensor in tensors.items()}
    for name, pieces in program.joined.items():
        if all(piece in named for piece in pieces):
            named[name] = torch.cat([named.pop(piece) for piece in pieces])
    return named


def _join(exported: ExportedProgram, name: str, pieces: tuple[str, ...]) -> None:
    state, graph = exported.state_dict, exported.graph
    parts = [state.pop(piece) for piece in pieces]
    whole = torch.cat([part.detach() for part in parts])
    state[name] = nn.Parameter(whole, requires_grad=any(part.requires_grad for part in parts))

    signature = exported.graph_signature
    specs = {spec.target: spec for spec in signature.input_specs}
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    olds = [nodes[specs[piece].arg.name] for piece in pieces]
    with graph.inserting_before(olds[0]):
        new = graph.placeholder(f"p_{name.replace('.', '_')}")
    new.meta["val"] = olds[0].meta["val"].new_empty(whole.shape)
    with graph.inserting_after(next(reversed(nodes.values()))):
        cut = graph.call_function(aten.split_with_sizes.default, (new, [len(part) for part in parts]))
    cut.meta["val"] = [old.meta["val"] for old in olds]
    place = cut
    for index, old in enumerate(olds):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (cut, index))
        place.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(place)
        graph.erase_node(old)
    first = specs[pieces[0]]
    spec = InputSpec(first.kind, TensorArgument(new.name), name, first.persistent)
    listed = [spec if each is first else each for each in signature.input_specs]
    signature.input_specs = [each for each in listed if each.target not in pieces]
    exported.graph_module.recompile()

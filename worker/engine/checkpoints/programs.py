"""A program as JSON and tensors: its graph, its layers and containers, whatever steps made of them, masks, encodings.

Layers are written as the plain attributes of a known class, so that the restored one computes and trains as it did.
"""

import re
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, fx, nn

from worker.engine.checkpoints.archive import NotRestorable
from worker.engine.checkpoints.values import decode, encode, find_function, name_function
from worker.engine.packing.encodings import Codebook, Encoding, FixedPoint, Floating, Grouped
from worker.engine.programs.layers import ScaledDotProductAttention
from worker.engine.programs.program import Program

_KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.Module, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
        nn.ConvTranspose3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d,
        nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU, nn.Dropout, nn.Dropout1d,
        nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.LSTM, nn.GRU, nn.RNN,
        ScaledDotProductAttention,
    )
}  # fmt: skip
_ENCODINGS: dict[str, type[Encoding]] = {kind.__name__: kind for kind in (Codebook, Grouped, Floating, FixedPoint)}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_PLAIN = frozenset({"_flat_weights", "_flat_weight_refs"})
"""A recurrent layer's second list of its weights."""
_PATH = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATIONS = ("placeholder", "get_attr", "call_function", "call_module", "output")
_ROOT = "Program"


def encode_program(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON and the tensors of a program. Raises NotRestorable where it holds something unknown."""
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    modules = [_encode_module(path, module, tensors, first) for path, module in _list_modules(program.module)]
    tensors |= {f"mask/{name}": mask for name, mask in program.masks.items()}
    encodings = {}
    for name, encoding in program.encodings.items():
        plain = {}
        for each in fields(encoding):
            value = getattr(encoding, each.name)
            if isinstance(value, Tensor):
                tensors[f"encoding/{name}/{each.name}"] = value
            else:
                plain[each.name] = encode(value)
        encodings[name] = {"kind": type(encoding).__name__, "plain": plain}
    structure = {
        "modules": modules,
        "nodes": [_encode_node(node) for node in program.module.graph.nodes],
        "masks": list(program.masks),
        "encodings": encodings,
        "tied": [list(group) for group in program.tied],
        "renamed": program.renamed,
        "joined": {name: list(pieces) for name, pieces in program.joined.items()},
    }
    return structure, tensors


def decode_program(structure: dict[str, Any], tensors: dict[str, Tensor], original: Program) -> Program:
    """Return the program; what no step changes (signature, tokenizer, ...) is that of the original."""
    try:
        module = _build(structure, tensors)
        encodings = {}
        for name, each in structure["encodings"].items():
            prefix = f"encoding/{name}/"
            held: dict[str, Any] = {
                key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)
            }
            plain = {key: decode(value, {}) for key, value in each["plain"].items()}
            encodings[name] = _ENCODINGS[each["kind"]](**held, **plain)
        return replace(
            original,
            module=module,
            tied=tuple(tuple(group) for group in structure["tied"]),
            renamed=structure["renamed"],
            joined={name: tuple(pieces) for name, pieces in structure["joined"].items()},
            masks={name: tensors[f"mask/{name}"].clone() for name in structure["masks"]},
            encodings=encodings,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise NotRestorable(f"its program is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _list_modules(module: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    found = list(module.named_modules())
    if len(found) != len(list(module.named_modules(remove_duplicate=False))):
        raise NotRestorable("a layer of the program has two names")
    for path, _ in found[1:]:
        if not _PATH.fullmatch(path):
            raise NotRestorable(f"a checkpoint cannot hold the layer name {path[:100]!r}")
    return found


def _encode_module(path: str, module: nn.Module, tensors: dict[str, Tensor], first: dict[int, str]) -> dict[str, Any]:
    kind = type(module).__name__ if path else _ROOT
    if path and _KINDS.get(kind) is not type(module):
        raise NotRestorable(f"a checkpoint cannot hold a layer of type {kind}")

    def place(name: str, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        key = f"module/{path}.{name}"
        # Names of one tensor become one object again.
        stored = first.setdefault(id(tensor), key)
        tensors.setdefault(stored, tensor.detach())
        return stored

    return {
        "path": path,
        "kind": kind,
        "training": module.training,
        "attributes": {} if not path else {
            name: encode(value) for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and name not in _NOT_PLAIN
        },
        "parameters": [
            [name, place(name, each), each is not None and each.requires_grad]
            for name, each in module._parameters.items()
        ],
        "buffers": [
            [name, place(name, each), name not in module._non_persistent_buffers_set]
            for name, each in module._buffers.items()
        ],
    }  # fmt: skip


def _encode_node(node: fx.Node) -> list[Any]:
    target = name_function(node.target) if node.op == "call_function" else str(node.target)
    return [node.op, node.name, target, encode(node.args), {name: encode(value) for name, value in node.kwargs.items()}]


def _build(structure: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    root = fx.GraphModule({}, fx.Graph(), class_name=_ROOT)
    made: dict[str, Tensor] = {}
    for each in structure["modules"]:
        path = each["path"]
        if each["kind"] == _ROOT and path == "":
            module: nn.Module = root
        else:
            kind = _KINDS[each["kind"]]
            module = kind.__new__(kind)
            nn.Module.__init__(module)
            vars(module).update({name: decode(value, {}) for name, value in each["attributes"].items()})
            _check(bool(_PATH.fullmatch(path)), f"the layer name {path[:100]!r}")
            parent, _, name = path.rpartition(".")
            root.get_submodule(parent).add_module(name, module)
        for name, stored, trains in each["parameters"]:
            if stored is not None and stored not in made:
                made[stored] = nn.Parameter(tensors[stored].clone(), requires_grad=trains)
            parameter = made[stored] if stored is not None else None
            assert parameter is None or isinstance(parameter, nn.Parameter)
            module.register_parameter(name, parameter)
        for name, stored, persistent in each["buffers"]:
            if stored is not None and stored not in made:
                made[stored] = tensors[stored].clone()
            module.register_buffer(name, made[stored] if stored is not None else None, persistent=persistent)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        module.training = bool(each["training"])
    root.graph = _build_graph(structure["nodes"])
    return root


def _build_graph(listed: list[list[Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for operation, name, target, args, kwargs in listed:
        # Names and targets become Python source of the module's forward.
        _check(operation in _OPERATIONS and bool(_NAME.fullmatch(name)), f"the node {str(name)[:100]!r}")
        _check(all(_NAME.fullmatch(key) for key in kwargs), f"an argument of {name}")
        function: Any = find_function(target) if operation == "call_function" else target
        named = _PATH if operation in ("get_attr", "call_module") else _NAME
        _check(function is not None and (operation == "call_function" or bool(named.fullmatch(target))), target)
        decoded = {key: decode(value, nodes) for key, value in kwargs.items()}
        node = graph.create_node(operation, function, decode(args, nodes), decoded, name=name)
        _check(node.name == name, f"the name {name} is there twice")
        nodes[name] = node
    graph.lint()
    return graph


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise NotRestorable(f"its program is damaged: {what[:200]}")

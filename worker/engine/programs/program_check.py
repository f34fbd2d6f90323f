"""Checking of models/model.json as a whole: signature against graph and stored tensors, call structure, symbols."""

import re
from dataclasses import dataclass
from typing import Any

from worker.engine.programs.call_structure import flat_specs, output_names
from worker.engine.programs.expressions import SYMBOL
from worker.engine.programs.graph_check import rebuild_graph
from worker.engine.programs.json_reader import boolean, integer, items, mapping, record, text, union
from worker.engine.programs.payloads import Payload, check_path
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.values import check_name

NAMES_MEMBER = "extra/output_names.json"
"""Where Pare's own archives keep the names of the outputs, which torch's format has no place for."""
_SCHEMA_MAJOR, _SCHEMA_MINOR = 8, 20
_OUTPUT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}")


@dataclass
class CheckedProgram:
    """A rebuilt models/model.json."""

    document: dict[str, Any]
    output_names: list[str]


def rebuild_program(value: Any, weights: dict[str, Payload], constants: dict[str, Payload]) -> CheckedProgram:
    """Rebuild models/model.json from its checked parts."""
    where = "models/model.json"
    top = record(
        value,
        where,
        ("graph_module", "opset_version", "range_constraints", "schema_version"),
        ("verifiers", "torch_version", "guards_code"),
    )
    version = record(top["schema_version"], where, ("major", "minor"))
    if version["major"] != _SCHEMA_MAJOR:
        reject(
            "unsupported_schema",
            f"The program has schema version {shown(version['major'])}; version {_SCHEMA_MAJOR} is accepted.",
            "Export the model with torch 2.13.",
        )
    for namespace in mapping(top["opset_version"], where):
        if namespace != "aten":
            reject(
                "unsupported_operator", f"The program uses the operator library {shown(namespace)}; only aten is known."
            )
    _check_no_conflicts([*weights, *constants])
    module = record(
        top["graph_module"],
        where,
        ("graph", "signature", "module_call_graph"),
        ("metadata", "treespec_namedtuple_fields"),
    )
    signature = record(module["signature"], where, ("input_specs", "output_specs"))
    candidates = [_input(spec, weights, constants) for spec in items(signature["input_specs"], where)]
    inputs = [candidate for candidate in candidates if candidate is not None]
    graph = rebuild_graph(module["graph"], "the graph", [name for name, _ in inputs])
    for name, spec in inputs:
        _check_stored(name, spec, graph, weights, constants)
    user_inputs = [name for name, spec in inputs if "user_input" in spec]
    names, specs, outputs = _outputs(signature["output_specs"], module, graph, weights)
    graph["outputs"] = outputs
    in_spec, out_spec = flat_specs(len(user_inputs), len(names))
    root = {"inputs": [], "outputs": [], "in_spec": in_spec, "out_spec": out_spec, "forward_arg_names": user_inputs}
    document = {
        "graph_module": {
            "graph": graph,
            "signature": {"input_specs": [spec for _, spec in inputs], "output_specs": specs},
            "module_call_graph": [{"fqn": "", "signature": root}],
            "metadata": {},
            "treespec_namedtuple_fields": {},
        },
        "opset_version": {"aten": 10},
        "range_constraints": _ranges(top["range_constraints"], where),
        "schema_version": {"major": _SCHEMA_MAJOR, "minor": _SCHEMA_MINOR},
        "verifiers": ["TRAINING"],
        "torch_version": "2.13.0",
        "guards_code": [],
    }
    return CheckedProgram(document, _unique(names, user_inputs))


def rebuild_names(value: Any, found: list[str]) -> list[str]:
    """Check the list of output names that Pare's own archives carry."""
    names = [text(name, NAMES_MEMBER, 200) for name in items(value, NAMES_MEMBER, 10_000)]
    wrong = [name for name in names if not _OUTPUT_NAME.fullmatch(name)]
    if wrong or len(names) != len(found) or len(set(names)) != len(names):
        reject("bad_structure", f"{NAMES_MEMBER}: {shown(names)} does not name {len(found)} outputs.")
    return names


def _input(value: Any, weights: dict[str, Payload], constants: dict[str, Payload]) -> tuple[str, dict[str, Any]] | None:
    where = "the signature"
    kinds = ("user_input", "parameter", "buffer", "tensor_constant", "constant_input", "custom_obj", "token")
    kind, spec = union(value, where, kinds)
    if kind in ("custom_obj", "token"):
        reject("custom_object", f"{where}: the input kind {kind} needs code that is not in the file.")
    if kind == "constant_input":
        # A Python constant given when exporting (None, True, 3): its value is already part of the graph.
        record(spec, where, ("name", "value"))
        return None
    if kind == "user_input":
        argument, content = union(record(spec, where, ("arg",))["arg"], where, ("as_tensor", "as_none", "as_sym_int"))
        if argument == "as_none":
            return None
        if argument == "as_sym_int":
            reject(
                "unsupported_input",
                "An input is a number that may vary; only tensors can be inputs.",
                "Pass the number as a tensor, or fix it when exporting.",
            )
        name = check_name(record(content, where, ("name",))["name"], where)
        return name, {"user_input": {"arg": {"as_tensor": {"name": name}}}}
    label = f"{kind}_name"
    fields = record(spec, where, ("arg", label), ("persistent",))
    name = check_name(record(fields["arg"], where, ("name",))["name"], where)
    rebuilt: dict[str, Any] = {"arg": {"name": name}, label: check_path(fields[label], where)}
    persistent = True
    if kind == "buffer":
        persistent = rebuilt["persistent"] = boolean(fields.get("persistent"), where)
    stored = constants if kind == "tensor_constant" or not persistent else weights
    if rebuilt[label] not in stored:
        reject("bad_structure", f"{where}: no tensor named {rebuilt[label]} is stored.")
    return name, {kind: rebuilt}


def _check_stored(
    name: str, spec: dict[str, Any], graph: dict[str, Any], weights: dict[str, Payload], constants: dict[str, Payload]
) -> None:
    kind, fields = next(iter(spec.items()))
    if kind == "user_input":
        return
    target = fields[f"{kind}_name"]
    payload = (constants if kind == "tensor_constant" or not fields.get("persistent", True) else weights)[target]
    meta = graph["tensor_values"][name]
    sizes = [size.get("as_int") for size in meta["sizes"]]
    if sizes != list(payload.tensor.shape) or meta["dtype"] != payload.dtype:
        reject(
            "bad_structure",
            f"The stored tensor {target} has shape {tuple(payload.tensor.shape)} and dtype {payload.tensor.dtype}; the "
            f"graph expects {sizes} and dtype number {meta['dtype']}.",
        )


def _outputs(
    value: Any, module: dict[str, Any], graph: dict[str, Any], weights: dict[str, Payload]
) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    where = "the signature"
    specs = items(value, where)
    if len(specs) != len(graph["outputs"]):
        reject("bad_structure", f"{where}: {len(specs)} outputs are described, the graph has {len(graph['outputs'])}.")
    candidates = iter(output_names(module))
    names: list[str] = []
    kept_specs: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for spec, output in zip(specs, graph["outputs"], strict=True):
        kind, fields = union(
            spec,
            where,
            ("user_output", "buffer_mutation", "loss_output", "gradient_to_parameter", "gradient_to_user_input",
             "user_input_mutation", "token", "parameter_mutation"),
        )  # fmt: skip
        if kind == "user_output":
            name = next(candidates, f"output_{len(names)}")
            # Constants and sizes among the outputs are not tensors: dropped.
            if "as_tensor" in output:
                if fields != {"arg": output}:
                    reject("bad_structure", f"{where}: the output {shown(fields)} is not the graph's.")
                names.append(name)
                kept.append(output)
                kept_specs.append({"user_output": {"arg": output}})
        elif kind == "buffer_mutation" and "as_tensor" in output:
            target = check_path(record(fields, where, ("arg", "buffer_name"))["buffer_name"], where)
            if target not in weights:
                reject("unsupported_mutation", f"The model changes {target}, which is not a stored buffer.")
            if fields["arg"] != output["as_tensor"]:
                reject("bad_structure", f"{where}: the changed buffer {target} is not the graph's output.")
            kept.append(output)
            kept_specs.append({"buffer_mutation": {"arg": output["as_tensor"], "buffer_name": target}})
        else:
            reject(
                "unsupported_mutation",
                f"The program has an output of kind {kind}; only values and changed buffers are accepted.",
                "Export the forward pass of the model, one that does not change its inputs or parameters.",
            )
    if not names:
        reject("no_output", "The program returns no tensor.")
    return names, kept_specs, kept


def _ranges(value: Any, where: str) -> dict[str, Any]:
    ranges = {}
    for symbol, content in mapping(value, where).items():
        limits = record(content, where, ("min_val", "max_val"))
        # Keys such as "4*s39" are derived from others.
        if SYMBOL.fullmatch(symbol):
            ranges[symbol] = {
                key: None if limits[key] is None else integer(limits[key], where) for key in ("min_val", "max_val")
            }
    return ranges


def _check_no_conflicts(names: list[str]) -> None:
    known = set(names)
    if len(known) != len(names):
        reject("bad_structure", "A tensor is stored as a weight and as a constant.")
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[:end]) in known:
                reject("bad_name", f"The tensor {name} lies inside the tensor {'.'.join(parts[:end])}.")


def _unique(names: list[str], taken: list[str]) -> list[str]:
    used = set(taken)
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        candidate = name
        while candidate in used:
            counts[name] = counts.get(name, 1) + 1
            candidate = f"{name}_{counts[name]}"
        used.add(candidate)
        unique.append(candidate)
    return unique

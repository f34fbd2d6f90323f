"""Hostile graphs and tensors in a well-formed archive: each is refused with its code, and nothing in them runs."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.engine.programs.hostile import (
    CONSTANTS,
    MODEL,
    WEIGHTS,
    Members,
    alter_json,
    refuse,
    replace_at,
    strings_of,
    write_members,
)
from worker.engine.errors import ModelRejected
from worker.engine.programs.intake import open_program

DROPPED = (
    "graph_module.graph.nodes.*.metadata.",
    "graph_module.module_call_graph.*.",
    "range_constraints.<",
    "guards_code.",
    "torch_version",
    "verifiers.",
)
"""Where models/model.json may hold any string, because it is never read."""


SIZE = "Symbol('s0', positive=True, integer=True)"


def expressions(marker: Path) -> list[str]:
    write = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return [
        write,
        f"[{write}, Symbol('s0')][1]",
        f"Symbol(({write}, 's0')[1])",
        f"Integer({write} or 3)",
        f"(lambda: {write})()",
        f"Add(Symbol('s0', positive=True, integer=True), {write})",
        f"Symbol('s0', positive=({write} is None), integer=True)",
        f"Symbol('s0').__class__.__init__.__globals__['__builtins__']['eval']({write!r})",
        f"Integer.__call__({write})",
        f"f'{{{write}}}'",
        f"os.system('touch {marker}')",
        "Pow(Pow(Pow(Integer(9), Integer(8)), Integer(8)), Integer(8))",
        "Pow(Integer(2), Integer(999999999999))",
        "Pow(Integer(2), Symbol('s0', positive=True, integer=True))",
        "factorial(Integer(99999999))",
        "Symbol('u0', integer=True)",
        "(" * 5000,
        "Add(" * 300 + "Integer(1)" + ")" * 300,
        "Integer(1)" + "+1" * 9000,
        "\0",
        # No code, but hours for sympy.
        f"FloorDiv(Mul({', '.join(f'Pow(Add({SIZE}, Integer({k})), Integer(8))' for k in range(60))}), Add({SIZE}))",
        f"Pow({SIZE}, Integer(9))",
        f"FloorDiv(Mul({', '.join(f'Add({SIZE}, Integer({k}))' for k in range(7))}), Add({SIZE}, Integer(9)))",
        f"Add({', '.join([SIZE] * 200)})",
    ]


@pytest.mark.parametrize("index", range(24))
def test_evil_size_expressions_are_refused(members: Members, tmp_path: Path, marker: Path, index: int) -> None:
    text = expressions(marker)[index]

    def change(value: Any) -> None:
        value["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text

    evil = alter_json(members, MODEL, change)
    refuse(write_members(tmp_path / "a.pt2", evil), "bad_expression", "data_dependent_size", "bad_structure")
    assert not marker.exists()


def test_no_string_anywhere_is_executed(members: Members, tmp_path: Path, marker: Path) -> None:
    """Put code into every string and key of every JSON member, one at a time."""
    write = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    accepted = set()
    for member in (MODEL, WEIGHTS, CONSTANTS):
        value = json.loads(members[member])
        seen: set[Any] = set()
        for path in strings_of(value):
            # One of each kind of place is enough: list positions do not matter.
            place = tuple("*" if isinstance(step, int) else step for step in path)
            if place in seen:
                continue
            seen.add(place)
            altered = json.loads(members[member])
            replace_at(altered, path, write)
            try:
                program = open_program(
                    write_members(tmp_path / "a.pt2", {**members, member: json.dumps(altered).encode()}), tmp_path
                )
                program.module(*program.example_inputs(2))
                accepted.add(".".join(f"<{step[1]}>" if isinstance(step, tuple) else step for step in place))
            except ModelRejected:
                pass
            assert not marker.exists(), path
    # What is accepted is dropped: it stands for nothing that is loaded.
    assert {place for place in accepted if not place.startswith(DROPPED)} == set()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch._C._jit_pass_inline",
        "torch.hub.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten._local_scalar_dense.default",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten.as_strided.default",
        "torch.ops.aten.item.default",
        "torch.ops.aten.nonzero.default",
        "torch.ops.aten.relu.out",
        "torch.ops.aten.add.str",
        "torch.ops.prim.Print.default",
        "torch.ops.debugprims.load_tensor.default",
        "torch.ops.higher_order.call_torchbind",
        "torch.ops.higher_order.cond",
        "torch.ops.mylib.evil.default",
        "torch.serialization.load",
        "_operator.call",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "math.__loader__.load_module",
        "torch.ops.aten.relu.default.__class__",
        "torch.ops.aten.__init__.__globals__",
        "#evil:op",
        "builtins.eval",
        "",
    ],
)
def test_unknown_operators_are_refused_by_name(members: Members, tmp_path: Path, target: str) -> None:
    def change(value: Any) -> None:
        node = next(node for node in value["graph_module"]["graph"]["nodes"] if "relu" in node["target"])
        node["target"] = target

    error = refuse(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, change)), "unsupported_operator")
    assert target in error.detail


@pytest.mark.parametrize(
    "argument",
    [
        {"as_operator": "torch.hub.load"},
        {"as_custom_obj": {"name": "x", "class_fqn": "os.system"}},
        {"as_string_to_argument": {"a": {"as_int": 1}}},
        {"as_tensor": {"name": "nobody"}},
        {"as_string": "__import__('os')"},
        {"as_int": 2**70},
        {"as_int": True},
        {"as_device": {"type": "meta", "index": None}},
        {"as_layout": 1},
        {"as_scalar_type": 10},
        {"as_int": 1, "as_bool": True},
        {"as_graph": {"name": "g", "graph": {}}},
        {},
        None,
        [],
    ],
)
def test_bad_arguments_are_refused(members: Members, tmp_path: Path, argument: Any) -> None:
    def change(value: Any) -> None:
        node = next(node for node in value["graph_module"]["graph"]["nodes"] if "relu" in node["target"])
        node["inputs"][0]["arg"] = argument

    refuse(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, change)))


def test_a_graph_that_cannot_run_is_refused(members: Members, tmp_path: Path) -> None:
    def swap(value: Any) -> None:
        node = next(node for node in value["graph_module"]["graph"]["nodes"] if "conv2d" in node["target"])
        node["inputs"][3]["arg"] = {"as_string": "two"}

    refuse(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, swap)), "graph_not_runnable")

    def grow(value: Any) -> None:
        node = next(node for node in value["graph_module"]["graph"]["nodes"] if "mean" in node["target"])
        node["target"] = "torch.ops.aten.repeat.default"
        node["inputs"] = [
            node["inputs"][0],
            {"name": "repeats", "arg": {"as_ints": [2**20, 2**20, 1, 1]}, "kind": 1},
        ]

    refuse(write_members(tmp_path / "b.pt2", alter_json(members, MODEL, grow)), "tensor_too_large")


@pytest.mark.parametrize("name", ["import", "self", "torch", "__class__", "a b", "x;y", "x\n", "\xe9", "", "a" * 500])
def test_bad_value_names_are_refused(members: Members, tmp_path: Path, name: str) -> None:
    text = members[MODEL].decode().replace('"relu"', json.dumps(name))
    refuse(write_members(tmp_path / "a.pt2", {**members, MODEL: text.encode()}), "bad_name")


@pytest.mark.parametrize(
    "name",
    ["forward", "training", "_parameters.x", "fc.__class__", "fc..weight", "fc.weight.x", "a-b", "a." * 60 + "w"],
)
def test_bad_weight_names_are_refused(members: Members, tmp_path: Path, name: str) -> None:
    evil = {
        member: content.decode().replace('"fc.bias"', json.dumps(name)).encode()
        if member.endswith(".json")
        else content
        for member, content in members.items()
    }
    refuse(write_members(tmp_path / "a.pt2", evil), "bad_name")


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (
            {"sizes": [{"as_int": 2**18}, {"as_int": 2**18}], "strides": [{"as_int": 0}] * 2},
            ("shape_bomb", "tensor_too_large"),
        ),
        ({"sizes": [{"as_int": 2**30}, {"as_int": 4}], "strides": [{"as_int": 0}, {"as_int": 1}]}, ("shape_bomb",)),
        ({"sizes": [{"as_int": 2**39}, {"as_int": 2**39}]}, ("tensor_too_large",)),
        ({"storage_offset": {"as_int": 1}}, ("tensor_out_of_bounds",)),
        ({"storage_offset": {"as_int": -1}}, ("bad_structure",)),
        ({"strides": [{"as_int": 2**39}, {"as_int": 1}]}, ("tensor_out_of_bounds",)),
        ({"strides": [{"as_int": -4}, {"as_int": 1}]}, ("bad_structure",)),
        ({"sizes": [{"as_int": 3}, {"as_int": 4}]}, ("tensor_out_of_bounds",)),
        ({"sizes": [{"as_int": 1}, {"as_int": 4}]}, ("bad_structure",)),
        ({"sizes": [{"as_int": 2}]}, ("bad_graph",)),
        ({"dtype": 8}, ("tensor_out_of_bounds",)),
        ({"dtype": 10}, ("unsupported_dtype",)),
        ({"dtype": 7.0}, ("bad_structure",)),
        ({"layout": 1}, ("unsupported_layout",)),
        ({"device": {"type": "meta"}}, ("unsupported_device",)),
        ({"extra": 1}, ("bad_structure",)),
    ],
)
def test_bad_tensor_descriptions_are_refused(
    members: Members, tmp_path: Path, change: dict[str, Any], codes: tuple[str, ...]
) -> None:
    evil = alter_json(members, WEIGHTS, lambda value: value["config"]["fc.weight"]["tensor_meta"].update(change))
    refuse(write_members(tmp_path / "a.pt2", evil), *codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_by_name(members: Members, tmp_path: Path, value: float) -> None:
    entry = json.loads(members[WEIGHTS])["config"]["fc.weight"]["path_name"]
    raw = bytearray(members[f"data/weights/{entry}"])
    raw[4:8] = struct.pack("<f", value)
    error = refuse(
        write_members(tmp_path / "a.pt2", {**members, f"data/weights/{entry}": bytes(raw)}), "nonfinite_weight"
    )
    assert "fc.weight" in error.detail

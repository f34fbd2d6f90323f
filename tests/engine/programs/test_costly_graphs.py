"""Graphs and tensors that are small as files and would cost hours or gigabytes: each is refused before it does."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.programs.hostile import MODEL, WEIGHTS, Members, alter_json, read_members, refuse, write_members
from tests.engine.programs.test_hostile_graphs import SIZE
from worker.engine.programs import graph_check
from worker.engine.programs.rewrite import check_and_rewrite
from worker.engine.programs.values import MAX_EXPRESSIONS, Budget


def argument(name: str, kind: str, value: Any) -> dict[str, Any]:
    return {"name": name, "arg": {kind: value}, "kind": 1}


def describe_tensor(*sizes: int) -> dict[str, Any]:
    whole = [{"as_int": size} for size in sizes]
    return {"dtype": 7, "sizes": whole, "strides": [{"as_int": 1}] * len(sizes), "requires_grad": False, "layout": 7,
            "device": {"type": "cpu", "index": None}, "storage_offset": {"as_int": 0}}  # fmt: skip


def write_graph(
    members: Members,
    path: Path,
    nodes: list[tuple[str, list[dict[str, Any]], str]],
    tensors: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
) -> Path:
    """Put nodes (operator, arguments, result) in front of those of the valid graph. An effect keeps them alive."""

    def change(value: Any) -> None:
        graph = value["graph_module"]["graph"]
        graph["tensor_values"].update({**(tensors or {}), "kept": describe_tensor(1), "changed": describe_tensor(1)})
        graph["sym_int_values"].update(sizes or {})
        added = []
        last = nodes[-1][2]
        for target, inputs, result in (
            *nodes,
            ("torch.ops.aten.full.default", [
                argument("size", "as_sym_ints", [{"as_name": last}]) if last in (sizes or {})
                else argument("size", "as_ints", [1]),
                argument("fill_value", "as_float", 1.0)], "kept"),
            ("torch.ops.aten.mul_.Tensor", [
                argument("self", "as_tensor", {"name": "kept"}),
                argument("other", "as_tensor", {"name": last if last in (tensors or {}) else "kept"})], "changed"),
        ):  # fmt: skip
            kind, label = ("as_sym_int", "as_name") if result in (sizes or {}) else ("as_tensor", "name")
            several = any(word in target for word in ("split", "chunk", "unbind"))
            made = {"as_tensors": [{"name": result}]} if several else {kind: {label: result}}
            added.append({"target": target, "inputs": inputs, "outputs": [made], "metadata": {}})
        graph["nodes"] = added + graph["nodes"]

    return write_members(path, alter_json(members, MODEL, change))


def test_sizes_that_grow_without_end_are_refused(members: Members, tmp_path: Path) -> None:
    """Forty squarings of 3 are a number of a trillion bits, which Python would compute."""
    squares = [
        ("_operator.mul", [argument(side, "as_sym_int", {"as_name": f"q{k}"}) for side in "ab"], f"q{k + 1}")
        for k in range(60)
    ]
    size = [argument("self", "as_tensor", {"name": "x"}), argument("dim", "as_int", 0)]
    known: dict[str, Any] = {f"q{k}": {"as_int": 5} for k in range(1, 61)}
    known["q0"] = {"as_expr": {"expr_str": "Symbol('s77', positive=True, integer=True)", "hint": {"as_int": 3}}}
    nodes = [("torch.ops.aten.sym_size.int", size, "q0"), *squares]
    refuse(write_graph(members, tmp_path / "a.pt2", nodes, sizes=known), "tensor_too_large")


@pytest.mark.parametrize(
    ("kind", "value"), [("as_ints", [1] * 1000), ("as_string", "a" * 200), ("as_floats", [1.0]), ("as_none", True)]
)
def test_arithmetic_on_sizes_takes_numbers_alone(members: Members, tmp_path: Path, kind: str, value: Any) -> None:
    nodes = [("_operator.mul", [argument("a", kind, value), argument("b", "as_int", 10**9)], "q0")]
    refuse(write_graph(members, tmp_path / "a.pt2", nodes, sizes={"q0": {"as_int": 5}}), "bad_structure")


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("unbind.int", []),
        ("split.Tensor", [argument("split_size", "as_int", 1)]),
        ("unsafe_split.Tensor", [argument("split_size", "as_int", 2)]),
        ("chunk.default", [argument("chunks", "as_int", 2**40)]),
        ("tensor_split.sections", [argument("sections", "as_int", 2**40)]),
        ("hsplit.int", [argument("sections", "as_int", 2**33)]),
    ],
)
def test_a_tensor_is_not_cut_into_billions(
    members: Members, tmp_path: Path, target: str, arguments: list[dict[str, Any]]
) -> None:
    full = [argument("size", "as_ints", [2**34]), argument("fill_value", "as_float", 1.0)]
    nodes = [
        ("torch.ops.aten.full.default", full, "long"),
        (f"torch.ops.aten.{target}", [argument("self", "as_tensor", {"name": "long"}), *arguments], "piece"),
    ]
    tensors = {"long": describe_tensor(2**34), "piece": describe_tensor(1)}
    error = refuse(write_graph(members, tmp_path / "a.pt2", nodes, tensors), "tensor_too_large")
    assert "tensors" in error.detail


def test_one_tensor_of_many_names_is_looked_at_once(members: Members, tmp_path: Path) -> None:
    count, names = 2**21, 3000
    meta = {**describe_tensor(count), "dtype": 7}
    entry = {"path_name": "weight_99", "is_param": False, "use_pickle": False, "tensor_meta": meta}
    booleans = {**entry, "path_name": "weight_98", "tensor_meta": {**meta, "dtype": 12}}

    def change(value: Any) -> None:
        for index in range(names):
            value["config"] |= {f"t{index}": entry, f"b{index}": booleans}

    evil = alter_json(members, WEIGHTS, change)
    evil |= {"data/weights/weight_99": bytes(4 * count), "data/weights/weight_98": bytes(count)}
    started = time.process_time()
    check_and_rewrite(write_members(tmp_path / "a.pt2", evil), tmp_path)
    # Each time for each name, it would be half a minute.
    assert time.process_time() - started < 10


def test_operators_are_counted_with_those_of_inner_graphs(
    members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(json.loads(members[MODEL])["graph_module"]["graph"]["nodes"])
    # As many as either graph has, and fewer than both.
    monkeypatch.setattr(graph_check, "Budget", lambda: Budget(nodes=6 * count))

    def change(value: Any) -> None:
        graph = value["graph_module"]["graph"]
        inner = {"name": "g", "graph": {**graph, "nodes": graph["nodes"] * 4, "inputs": [], "outputs": []}}
        target = "torch.ops.higher_order.wrap_with_set_grad_enabled"
        call = [argument("", "as_bool", False), argument("", "as_graph", inner)]
        graph["nodes"] = [{"target": target, "inputs": call, "outputs": [], "metadata": {}}] + graph["nodes"] * 4

    error = refuse(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, change)), "bad_graph")
    assert "operators" in error.detail


def test_size_expressions_are_counted(members: Members, tmp_path: Path) -> None:
    def change(value: Any) -> None:
        known = value["graph_module"]["graph"]["sym_int_values"]
        for k in range(MAX_EXPRESSIONS + 1):
            known[f"q{k}"] = {"as_expr": {"expr_str": f"Add({SIZE}, Integer({k}))", "hint": {"as_int": 3}}}

    error = refuse(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, change)), "bad_expression")
    assert "different" in error.detail


def test_more_names_than_any_model_has_are_refused(members: Members, tmp_path: Path) -> None:
    def change(value: Any) -> None:
        entry = value["config"]["fc.weight"]
        value["config"] |= {f"t{index}": entry for index in range(20_001)}

    refuse(write_members(tmp_path / "a.pt2", alter_json(members, WEIGHTS, change)), "weights_count")


def test_many_outputs_of_one_name_get_names_of_their_own(members: Members, tmp_path: Path) -> None:
    count = 9_000
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

    def change(value: Any) -> None:
        module = value["graph_module"]
        output = module["graph"]["outputs"][0]
        module["graph"]["outputs"] = [output] * count
        module["signature"]["output_specs"] = [{"user_output": {"arg": output}}] * count
        spec = {"type": "builtins.dict", "context": json.dumps(["a"] * count), "children_spec": [leaf] * count}
        module["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])

    started = time.process_time()
    path = check_and_rewrite(write_members(tmp_path / "a.pt2", alter_json(members, MODEL, change)), tmp_path)
    assert time.process_time() - started < 5
    names = json.loads(read_members(path)["extra/output_names.json"])
    assert names[:3] == ["a", "a_2", "a_3"]
    assert len(set(names)) == count


def test_json_that_is_small_as_text_and_large_in_memory_is_refused(members: Members, tmp_path: Path) -> None:
    text = members[MODEL].replace(b'"guards_code": []', b'"guards_code": [' + b"[]," * 9_000_000 + b"[]]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refuse(write_members(tmp_path / "a.pt2", {**members, MODEL: text}), "bad_structure")
    assert "values" in error.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "half a GiB"


def test_a_deep_value_is_refused_and_not_quoted(members: Members, tmp_path: Path) -> None:
    deep = json.loads("[" * 800 + "]" * 800)
    evil = alter_json(members, MODEL, lambda value: value["graph_module"]["graph"].update(nodes=deep))
    error = refuse(write_members(tmp_path / "a.pt2", evil), "bad_structure")
    assert len(error.detail) < 200

"""The request language refuses what makes no sense, with the reason and the place."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from app.jobs.needs import derive_needs
from app.recipes import base, data, facts, metrics, plan, pruning, quantization, recipe, training
from app.recipes.base import Form
from app.recipes.recipe import KINDS, Recipe

DATASET = "dst_" + "a" * 26
LABELLED: dict[str, Any] = {
    "dataset_id": DATASET,
    "inputs": {"x": {"column": "image"}},
    "label_column": "label",
    "task": "classification",
}
UNLABELLED: dict[str, Any] = {"dataset_id": DATASET, "inputs": {"x": {"column": "image"}}}


def make(*steps: str | dict[str, Any], **other: Any) -> Recipe:
    listed = [{"kind": step} if isinstance(step, str) else step for step in steps]
    return Recipe.model_validate({"steps": listed, **other})


def messages(error: ValidationError) -> str:
    return " ".join(item["msg"] for item in error.errors())


@pytest.mark.parametrize(
    ("steps", "other", "expected"),
    [
        (["quantize_int8", "prune_magnitude"], {}, "put prune_magnitude before quantize_int8"),
        (["quantize_int8", "quantize_int8"], {}, "use one of them"),
        (["share_weights", "finetune"], {"data": LABELLED}, "put finetune before share_weights"),
        (["quantize_int4", "quantize_int8"], {}, "weights in few bits that quantize_int8 cannot work on; use one"),
        (["prune_wanda", "factorize_low_rank"], {"data": UNLABELLED}, "factorize first"),
        (["prune_magnitude", "prune_structured"], {}, "prune structures first, then weights"),
        (["prune_magnitude", "finetune", "prune_structured"], {"data": LABELLED}, "must not follow steps[0]"),
        (["finetune"], {}, "finetune needs data (labels)"),
        (["finetune"], {"data": UNLABELLED}, "finetune needs labels"),
        ([{"kind": "quantize_int8", "mode": "static"}], {}, "needs data (inputs)"),
        ([{"kind": "prune_structured", "criterion": "taylor"}], {"data": UNLABELLED}, "needs labels"),
        (
            [{"kind": "quantize_int8", "mode": "static"}],
            {"target": {"runtime": "torch"}, "data": UNLABELLED},
            "mode 'static' makes an ONNX model; torch takes 'dynamic' and 'weight_only'; set target.runtime to 'onnx",
        ),
        ([{"kind": "quantize_int8", "per_row": "none"}], {"target": {"runtime": "torch"}}, "per_row 'none' is a way"),
        (["quantize_aware_training"], {"target": {"runtime": "torch"}, "data": LABELLED}, "it makes an ONNX model"),
        (["quantize_int8"], {"outputs": {"formats": ["onnx", "pt2"]}}, "exists as onnx only"),
        (
            ["quantize_int8"],
            {"target": {"runtime": "torch"}, "outputs": {"formats": ["onnx", "pt2"]}},
            "exists as pt2 and aoti only; remove ['onnx']",
        ),
        (["quantize_int8"], {"outputs": {"formats": ["onnx", "aoti"]}}, "exists as onnx only; remove ['aoti']"),
        (
            [{"kind": "quantize_int8", "mode": "static"}],
            {"target": {"runtime": "aotinductor"}, "data": UNLABELLED},
            "mode 'static' makes an ONNX model; torch takes",
        ),
        (["quantize_int8", "finetune"], {"target": {"runtime": "aotinductor"}}, "put finetune before quantize_int8"),
        (["prune_magnitude"], {"target": {"device": "cuda"}}, "set target.runtime to 'torch'"),
        (
            ["quantize_aware_training"],
            {"target": {"device": "cuda", "runtime": "torch"}, "data": LABELLED},
            "set target.runtime to 'onnxruntime' and target.device to 'cpu'",
        ),
        (["prune_magnitude"], {"outputs": {"formats": ["onnx", "safetensors"]}}, "add 'pt2' to outputs.formats"),
    ],
)
def test_senseless_recipe_is_refused_with_the_reason(steps: list[Any], other: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(*steps, **other)
    assert expected in messages(caught.value)


def test_the_file_that_is_measured_is_among_the_files() -> None:
    assert make("quantize_int4", target={"device": "cuda", "runtime": "torch"}).formats == ("pt2", "packed")


@pytest.mark.parametrize(
    ("steps", "formats"),
    [
        (["finetune"], ("onnx", "pt2", "safetensors", "aoti")),
        (["prune_magnitude"], ("onnx", "pt2", "safetensors", "aoti", "packed")),
        (["quantize_int4"], ("pt2", "aoti", "packed")),
        (["quantize_int8"], ("pt2", "aoti")),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_compiled_comes_with_what_it_was_compiled_from(
    steps: list[str], formats: tuple[str, ...], device: str
) -> None:
    accepted = make(*steps, target={"device": device, "runtime": "aotinductor"}, data=LABELLED)
    assert accepted.formats == formats
    assert accepted.compiles
    assert derive_needs(accepted).device == ("cpu" if device == "cpu" else "gpu")


def test_a_compiled_file_can_be_one_among_others() -> None:
    assert make("prune_magnitude", outputs={"formats": ["onnx", "aoti"]}).compiles
    assert make("quantize_int8", target={"runtime": "torch"}, outputs={"formats": ["aoti"]}).compiles
    assert not make("prune_magnitude").compiles


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_integers_for_torch_are_a_pt2(mode: str, device: str) -> None:
    accepted = make({"kind": "quantize_int8", "mode": mode}, target={"device": device, "runtime": "torch"})
    assert (accepted.form, accepted.formats) == (Form.INTEGER, ("pt2",))


@pytest.mark.parametrize(
    ("steps", "form", "formats"),
    [
        (["prune_structured", "finetune", "quantize_int8"], Form.INTEGER, ("onnx",)),
        (["prune_structured", "finetune"], Form.MODULE, ("onnx", "pt2", "safetensors")),
        (["prune_structured", "prune_magnitude", "finetune"], Form.MODULE, ("onnx", "pt2", "safetensors", "packed")),
        (["factorize_low_rank", "distill", "prune_n_m"], Form.MODULE, ("onnx", "pt2", "safetensors", "packed")),
        (["prune_magnitude", "finetune", "share_weights"], Form.CODED, ("onnx", "packed")),
        (["quantize_mixed", "quantize_int4", "share_weights"], Form.CODED, ("onnx", "packed")),
    ],
)
def test_sensible_chain_is_accepted(steps: list[str], form: Form, formats: tuple[str, ...]) -> None:
    accepted = make(*steps, data=LABELLED)
    assert accepted.form is form
    assert accepted.formats == formats


MALFORMED: list[dict[str, Any]] = [
    {"steps": []},
    {"steps": [{"kind": "shrink_magically"}]},
    {"steps": [{"kind": "prune_magnitude", "sparsity": 1.0}]},
    {"steps": [{"kind": "prune_magnitude", "amount": 0.5}]},
    {"steps": [{"kind": "prune_magnitude", "sparsity": float("nan")}]},
    {"steps": [{"kind": "prune_magnitude"}], "seed": -1},
    {"steps": [{"kind": "prune_magnitude"}], "surprise": 1},
    {"steps": [{"kind": "prune_magnitude"}], "data": {**LABELLED, "dataset_id": "../../etc/passwd"}},
    {"steps": [{"kind": "prune_magnitude"}], "data": {**UNLABELLED, "label_column": "label"}},
    {"steps": [{"kind": "prune_magnitude"}], "data": {**LABELLED, "label_column": None}},
    {"steps": [{"kind": "prune_magnitude"}], "data": {**UNLABELLED, "inputs": {"x": {"column": "c", "std": [0]}}}},
]


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_recipe_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(body)


@given(kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6))
def test_only_the_order_rules_refuse_a_labelled_chain(kinds: list[str]) -> None:
    senseless = any(
        KINDS[kind].leaves not in KINDS[follower].takes for kind, follower in itertools.pairwise(kinds)
    ) or any(later in KINDS[kind].undone_by for index, kind in enumerate(kinds) for later in kinds[index + 1 :])
    senseless |= "take_student" in kinds[1:]
    if senseless:
        with pytest.raises(ValidationError):
            make(*kinds, data=LABELLED)
    else:
        assert make(*kinds, data=LABELLED).form is KINDS[kinds[-1]].leaves


def test_training_leaves_no_place_after_coding_and_coding_none_after_integers() -> None:
    trains = {"train", "finetune", "distill", "quantize_aware_training"}
    codes = {kind for kind, spec in KINDS.items() if spec.leaves is Form.CODED}
    assert codes == {"share_weights", "quantize_mixed", "quantize_int4", "quantize_float", "quantize_fixed"}
    assert all(Form.CODED not in KINDS[kind].takes for kind in trains)
    assert all(Form.INTEGER not in spec.takes for spec in KINDS.values())


def test_recipe_survives_json() -> None:
    original = make("prune_structured", "finetune", "quantize_int8", data=LABELLED, seed=7)
    assert Recipe.model_validate_json(original.model_dump_json()) == original


@pytest.mark.parametrize(
    "step",
    [
        *({"kind": kind} for kind in KINDS),
        {"kind": "share_weights", "num_clusters": 12},
        {"kind": "factorize_low_rank", "rank_by": "energy", "energy": 0.5},
        {"kind": "quantize_mixed", "budget": "quality"},
    ],
    ids=str,
)
def test_a_step_that_was_stored_with_its_defaults_is_still_a_step(step: dict[str, Any]) -> None:
    made = make(step, data=LABELLED)
    assert Recipe.model_validate(made.model_dump(mode="json")) == made
    assert Recipe.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"kind": "share_weights", "num_clusters": 12, "bits": 3}, "bits and num_clusters"),
        ({"kind": "factorize_low_rank", "energy": 0.5, "rank": 8}, "['energy', 'rank'] would have no effect"),
        ({"kind": "quantize_mixed", "max_quality_loss": 0.5}, "['max_quality_loss'] would have no effect"),
    ],
    ids=str,
)
def test_a_number_without_effect_is_refused(step: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(step, data=LABELLED)
    assert expected in messages(caught.value)


def test_every_kind_is_listed_under_its_own_name() -> None:
    assert {spec.model_fields["kind"].annotation.__args__[0] for spec in KINDS.values()} == set(KINDS)  # type: ignore[union-attr]


REQUEST_MODULES = (base, data, pruning, quantization, recipe, training, plan, facts, metrics)
REQUEST_SPECS = [
    value
    for module in (data, pruning, quantization, recipe, training)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__
]


@pytest.mark.parametrize("spec", REQUEST_SPECS, ids=lambda spec: spec.__name__)
def test_every_field_a_user_can_set_is_described(spec: type[BaseModel]) -> None:
    undescribed = [name for name, field in spec.model_fields.items() if not field.description]
    assert undescribed == []


@pytest.mark.parametrize("module", REQUEST_MODULES, ids=lambda module: module.__name__)
def test_specs_are_strict_and_frozen(module: Any) -> None:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__:
            assert value.model_config["extra"] == "forbid"
            assert value.model_config["frozen"] is True

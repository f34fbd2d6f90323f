"""What a job needs follows from its recipe where it is not asked for."""

from typing import Any

import pytest

from app.errors import InvalidRequest
from app.jobs import JobNeeds, derive_needs
from app.recipes.needs import Needs
from app.recipes.recipe import Recipe

GIB = 2**30
DATA = {
    "dataset_id": "dst_" + "a" * 26,
    "inputs": {"x": {"column": "x"}},
    "task": "classification",
    "label_column": "y",
}


def recipe(*plans: dict[str, Any] | None) -> Recipe:
    steps = [{"kind": "finetune", **({} if plan is None else {"parallel": plan})} for plan in plans]
    return Recipe.model_validate({"steps": steps, "data": DATA})


@pytest.mark.parametrize(
    ("plans", "asked", "needs"),
    [
        ([None], {}, JobNeeds()),
        ([{"data": 1, "threads_per_rank": 3}], {}, JobNeeds(num_threads=3)),
        ([{"data": 2}], {}, JobNeeds(memory_bytes=2 * GIB, num_threads=2)),
        ([{"data": 2, "tensor": 2, "threads_per_rank": 3}], {}, JobNeeds(memory_bytes=4 * GIB, num_threads=12)),
        ([{"data": 2}, None, {"pipeline": 3}], {}, JobNeeds(memory_bytes=3 * GIB, num_threads=3)),
        ([{"data": 2}], {"memory_bytes": 5 * GIB, "num_threads": 1}, JobNeeds(memory_bytes=5 * GIB, num_threads=1)),
        ([None], {"device": "gpu"}, JobNeeds("gpu", 1)),
        ([{"data": 2}], {"device": "gpu"}, JobNeeds("gpu", 2, memory_bytes=2 * GIB, num_threads=2)),
        ([{"data": 2}], {"num_devices": 3}, JobNeeds("gpu", 3, memory_bytes=2 * GIB, num_threads=2)),
        ([{"data": 2}, {"data": 2, "tensor": 2}], {"num_devices": 4}, JobNeeds("gpu", 4, 4 * GIB, num_threads=4)),
    ],
)
def test_a_rank_has_threads_and_memory_of_its_own(
    plans: list[dict[str, Any] | None], asked: dict[str, Any], needs: JobNeeds
) -> None:
    assert derive_needs(recipe(*plans), Needs(**asked)) == needs


def test_every_rank_needs_a_gpu_of_its_own() -> None:
    with pytest.raises(InvalidRequest) as caught:
        derive_needs(recipe({"data": 2, "pipeline": 2}), Needs(num_devices=3))
    (problem,) = caught.value.errors
    assert problem.pointer == "/needs/num_devices"
    assert "data 2 x pipeline 2 needs 4 GPUs" in problem.detail


@pytest.mark.parametrize(
    "step",
    [
        {"kind": "finetune", "precision": "tf32"},
        {"kind": "share_weights", "bits": 4, "training": {"precision": "tf32"}},
    ],
)
def test_arithmetic_that_only_gpus_have_needs_one(step: dict[str, Any]) -> None:
    found = derive_needs(Recipe.model_validate({"steps": [step], "data": DATA}))
    assert (found.device, found.num_devices) == ("gpu", 1)

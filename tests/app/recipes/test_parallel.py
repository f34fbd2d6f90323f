"""Plans that cannot be are refused with the equation or the reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.recipes.base import BaseStep
from app.recipes.distillation import Distill
from app.recipes.parallel import Parallel
from app.recipes.pruning import PruneMagnitude, PruneStructured
from app.recipes.quantization import QuantizeAwareTraining
from app.recipes.sharing import ShareWeights
from app.recipes.training import Finetune


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"data": 2, "tensor": 2, "devices": 3}, "data 2 x tensor 2 != 3 devices"),
        ({"data": 2, "pipeline": 4, "devices": 2}, "data 2 x pipeline 4 != 2 devices"),
        ({"data": 16, "tensor": 8}, "data 16 x tensor 8 = 128 ranks; at most 64"),
        ({"shard": True}, "data must be at least 2"),
        ({"data": 2, "shard": True, "tensor": 2}, "shard goes with data alone, not with data 2 x tensor 2"),
        ({"tensor": 2, "pipeline": 2}, "tensor 2 x pipeline 2: tensor and pipeline each go with data"),
        ({"data": 2, "num_microbatches": 4}, "are for pipelines, and pipeline is 1"),
    ],
)
def test_a_mesh_that_cannot_be(plan: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Parallel.model_validate(plan)


def test_a_mesh_that_can() -> None:
    plan = Parallel.model_validate({"data": 2, "pipeline": 3, "devices": 6})
    assert (plan.num_ranks, plan.microbatches, plan.describe()) == (6, 6, "data 2 x pipeline 3")
    assert Parallel().num_ranks == 1
    assert Parallel.model_validate_json(Parallel(data=2).model_dump_json()) == Parallel(data=2)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"batch_size": 3, "parallel": {"data": 4}}, "batch_size 3 is less than data 4: every part"),
        ({"batch_size": 7, "parallel": {"data": 2, "pipeline": 2}}, "less than data 2 x 4 micro-batches"),
        ({"accumulate": 2, "parallel": {"pipeline": 2}}, "set num_microbatches instead"),
    ],
)
def test_a_batch_that_cannot_be_shared_out(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Finetune.model_validate({"kind": "finetune", **spec})


def test_what_looks_into_layers_goes_with_data_alone() -> None:
    split, shared = {"tensor": 2}, {"data": 2, "shard": True}
    features = {"kind": "distill", "hidden_weight": 1.0}
    with pytest.raises(ValidationError, match=r"use parallel\.data alone"):
        Distill.model_validate({**features, "parallel": split})
    with pytest.raises(ValidationError, match=r"use parallel\.data alone"):
        QuantizeAwareTraining.model_validate({"kind": "quantize_aware_training", "parallel": split})
    assert Distill.model_validate({**features, "parallel": shared}).parallel
    assert Distill.model_validate({"kind": "distill", "parallel": split}).parallel


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (PruneStructured, {"kind": "prune_structured", "num_iterations": 2}),
        (PruneMagnitude, {"kind": "prune_magnitude", "schedule": "cubic"}),
        (ShareWeights, {"kind": "share_weights", "bits": 4}),
    ],
)
def test_training_inside_another_step_stays_in_one_process(kind: type[BaseStep], step: dict[str, Any]) -> None:
    kind.model_validate({**step, "training": {"epochs": 1, "parallel": None}})
    with pytest.raises(ValidationError, match="runs in one process; leave parallel out"):
        kind.model_validate({**step, "training": {"epochs": 1, "parallel": {"data": 2}}})

"""Can a model be trained by a parallel plan? What its facts tell is said at submission; the engine finds the rest."""

from collections.abc import Iterator

from app.recipes.facts import ModelFacts
from app.recipes.parallel import Parallel


def find_plan_problems(plan: Parallel, model: ModelFacts) -> Iterator[str]:
    """Yield why no step with this plan can train this model."""
    if plan.data * plan.microbatches > 1 and model.batch_size is not None:
        yield (
            f"the model takes exactly {model.batch_size} examples at a time, which {plan.describe()} cannot divide; "
            "export it with a dynamic batch"
        )
    norms = [layer.name for layer in model.layers if layer.type.startswith("BatchNorm")]
    if plan.microbatches > 1 and norms:
        yield (
            f"the model has batch norms ({norms[0]} is the first of {len(norms)}), which would see one of "
            f"{plan.microbatches} micro-batches at a time; use data instead of pipeline, or set num_microbatches to 1"
        )
    if plan.pipeline > max(len(model.layers), 1):
        yield (f"{len(model.layers)} layers with weights cannot make {plan.pipeline} pipeline stages; use fewer stages")
    num_linear = sum(layer.type == "Linear" for layer in model.layers)
    if plan.tensor > 1 and num_linear < 2:
        yield (
            f"tensor ranks share the channels between two linear layers, and the model has {num_linear}; use data "
            "instead of tensor"
        )

"""Cluster the weights of each layer by k-means: an index per weight, and a codebook (Han et al. 2015)."""

from typing import cast

from app.recipes.base import Runtime
from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.sharing import ShareWeights
from worker.engine.errors import StepFailed
from worker.engine.packing.encodings import Codebook
from worker.engine.packing.tensors import packed_bytes
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program
from worker.engine.quantization.weights import (
    DECODED_AT_EVERY_CALL,
    LEAVE_SOME,
    Weight,
    Weights,
    find_weights,
    name_some,
)
from worker.engine.sharing.codebooks import SharedWeights, share
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import train
from worker.engine.training.summary import find_warnings, list_facts

ONLY_PACKED = (
    "Shared weights take few bytes in model.packed only. It is decoded when it is loaded: memory and speed are those "
    "of the dense model."
)


def inspect(program: Program) -> Capability:
    """Name the layers whose weights can be shared."""
    found = find_weights(program, embeddings=True)
    layers = tuple(dict.fromkeys(layer for weight in found.chosen for layer in weight.layers))
    missing = None if layers else "there are no linear, convolution, recurrent or embedding layers in 32-bit floats"
    return Capability(kind="share_weights", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: ShareWeights, context: Context) -> Outcome:
    """Put every weight onto the centroids of its codebook, then tune the centroids where `training` is set."""
    found = find_weights(program, step.skip_layers, embeddings=step.include_embeddings)
    codebooks, effects, tiny = {}, [], []
    error = power = 0.0
    for number, weight in enumerate(found.chosen):
        dense = weight.parameter.detach().clone()
        num_clusters = step.num_clusters or 2**step.bits
        codebook = share(dense, num_clusters, step.rows_per_codebook, step.initialization, step.max_iterations)
        num_bytes = packed_bytes(codebook)
        if num_bytes >= dense.numel() * dense.element_size():
            tiny.append(weight.name)
            continue
        codebooks[weight.name] = codebook
        program.encode(weight.name, codebook)
        squares = float((weight.parameter.detach() - dense).double().square().sum())
        size = float(dense.double().square().sum())
        error, power = error + squares, power + size
        effects.append(_tell_effect(weight, codebook, num_bytes, squares / size if size else 0.0, context))
        context.report((0.2 if step.training else 1.0) * (number + 1) / len(found.chosen), f"shared {weight.name}")
    if not codebooks:
        raise StepFailed(
            f"no weights are left to share; already coded: {name_some(found.coded_before) or 'none'}, "
            f"skipped: {name_some(sorted(step.skip_layers)) or 'none'}, smaller without a codebook: "
            f"{name_some(tiny) or 'none'}",
            code="nothing_to_share",
            fix=LEAVE_SOME if found.coded_before else None,
        )
    total = sum(codebook.indices.numel() for codebook in codebooks.values())
    outcome = Outcome(program, sensitivity=tuple(effects), warnings=tuple(_warn(found, tiny, context.target.runtime)))
    trained_facts = {}
    if step.training is not None:
        examples = cast(BoundExamples, context.examples)
        with on_device(program):
            shared = SharedWeights(program, codebooks)
            trained = train(
                program, examples, step.training, seed=context.seed, constraints=(shared,),
                checkpoints=context.checkpoints,
                report=lambda fraction, *args, **metrics: context.report(0.2 + 0.8 * fraction, *args, **metrics),
            )  # fmt: skip
            shared.encode(program)
        trained_facts = list_facts(trained, step.training)
        outcome.warnings += tuple(find_warnings("Tuning centroids", trained, examples, step.training))
    used = [cast(Codebook, program.encodings[name]) for name in codebooks]
    num_bytes = sum(packed_bytes(each) for each in used)
    outcome.facts = {
        "layers_shared": len({layer for weight in found.chosen if weight.name in codebooks for layer in weight.layers}),
        "weights_shared": total,
        "clusters": max(each.centroids.shape[1] for each in used),
        "codebooks": sum(each.centroids.shape[0] for each in used),
        "bits_per_weight": 8 * num_bytes / total,
        "packed_bytes": num_bytes,
        "dense_bytes": 4 * total,
        "mean_squared_error": error / total,
        "relative_squared_error": error / power if power else 0.0,
        "coded_before": len(found.coded_before),
        **trained_facts,
    }
    return outcome


def _tell_effect(weight: Weight, codebook: Codebook, num_bytes: int, effect: float, context: Context) -> LayerEffect:
    books, clusters = codebook.centroids.shape
    return LayerEffect(
        step=context.index,
        layer=weight.layers[0],
        choice=f"{clusters} clusters" if books == 1 else f"{books} x {clusters} clusters",
        metric="weight_error",
        effect=effect,
        weight_bytes=num_bytes,
        chosen=True,
    )


def _warn(found: Weights, tiny: list[str], runtime: Runtime) -> list[str]:
    warnings = [ONLY_PACKED if runtime == "onnxruntime" else DECODED_AT_EVERY_CALL]
    if found.coded_before:
        warnings.append(f"Left as an earlier step coded them: {name_some(found.coded_before)}.")
    if found.embeddings:
        warnings.append(f"Embeddings were left dense, as asked: {name_some(found.embeddings + found.shared)}.")
    if tiny:
        warnings.append(f"Left dense because a codebook would be larger than they are: {name_some(tiny)}.")
    return warnings

"""Train with 8-bit weights and activations simulated, then store exactly what was simulated as an integer ONNX file."""

from dataclasses import replace
from typing import cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.quantization import QuantizeAwareTraining
from worker.engine.devices import CPU
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.capture import evaluating
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.placement import move_module
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.calibration import CALIBRATION_BATCH, has_exact_integer_products
from worker.engine.quantization.fake_quantization import (
    CONVOLUTIONS,
    FakeActivation,
    convert,
    find_activations,
    find_layers,
    simulate,
)
from worker.engine.quantization.int8_effects import measure_int8_effects
from worker.engine.quantization.preparation import fold_batch_norms
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.feeding import drops_last
from worker.engine.training.loop import train
from worker.engine.training.summary import warn_about_plan

NUM_LAYERS_NAMED = 20
LARGEST_DIFFERENCE = 0.05
"""Between file and simulation, relative to the size of the output, before a warning."""


def inspect(program: Program) -> Capability:
    """Name the linear layers and convolutions."""
    layers = tuple(
        name for name, layer in program.module.named_modules() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))
    )
    missing = None if layers else "there are no linear layers or convolutions"
    return Capability(kind="quantize_aware_training", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: QuantizeAwareTraining, context: Context) -> Outcome:
    """Fold batch norms, set first ranges on data, train with rounding simulated, convert and compare."""
    names = {name for name, _ in program.module.named_modules()}
    unknown = sorted(set(step.skip_layers) - names)
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    examples = cast(BoundExamples, context.examples)
    program = program.copy()
    with evaluating(program):
        num_folded = fold_batch_norms(program.module)
    bits = 8 if has_exact_integer_products() else 7
    simulated = simulate(program.module, step.skip_layers, bits=bits, per_channel=step.per_channel)
    layers = find_layers(simulated)
    if not layers:
        raise StepFailed(
            "no layers are left to quantize: every linear layer and convolution is in skip_layers",
            code="nothing_quantized",
            fix="Skip fewer layers, or leave quantize_aware_training out.",
        )
    _set_first_ranges(simulated, examples, step, context.seed)
    freezing = _Freezing(find_activations(simulated), _count_steps(examples, step), step.freeze_ranges_after)
    trained = train(
        program,
        examples,
        step,
        seed=context.seed,
        report=context.report,
        module=simulated,
        constraints=[freezing],
        stateful=[freezing],
        checkpoints=context.checkpoints,
    )
    # Training brought the program's own tensors back, not those that only the simulation has.
    move_module(simulated, CPU)
    path = context.directory / "int8.onnx"
    export_onnx(replace(program, module=convert(simulated), masks={}, encodings={}), path)
    tensors = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    difference = _compare(simulated, program, context, path)
    before, after = trained.quality_before, trained.quality_after
    warnings = warn_about_plan(trained)
    if step.keep_best and trained.best_epoch == 0:
        warnings.append(
            f"Training found nothing better than its start ({before.metric} {before.value:.4g}, rounding simulated, "
            f"on {before.num_examples} examples set apart) in {trained.epochs_run} epochs, so the start was kept."
        )
    kept = [
        name
        for name, layer in program.module.named_modules()
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS, nn.ConvTranspose2d, nn.RNNBase, nn.Embedding))
        and name not in layers
    ]
    if kept:
        more = f" and {len(kept) - NUM_LAYERS_NAMED} more" if len(kept) > NUM_LAYERS_NAMED else ""
        warnings.append(f"Layers that stay in floating point: {', '.join(kept[:NUM_LAYERS_NAMED])}{more}.")
    if difference > LARGEST_DIFFERENCE:
        warnings.append(
            f"The file's outputs differ from the trained simulation by {difference:.3g} of their size; trust the "
            "measured quality of the file, not that of the training."
        )
    return Outcome(
        program=FileProgram(
            path,
            program.signature,
            sum(each.size for each in tensors),
            sum(int(np.count_nonzero(each)) for each in tensors),
        ),
        facts={
            "layers_quantized": len(layers),
            "layers_kept_float": len(kept),
            "activation_ranges": len(find_activations(simulated)),
            "batch_norms_folded": num_folded,
            "weight_bits": bits,
            "epochs_run": trained.epochs_run,
            "steps_run": trained.steps_run,
            "best_epoch": trained.best_epoch,
            "quality_metric": before.metric,
            "quality_before": before.value,
            "quality_after": after.value,
            "difference_from_simulation": difference,
            **trained.parallel_facts,
        },
        warnings=tuple(warnings),
        sensitivity=measure_int8_effects(
            program,
            layers,
            next(iter(examples.training_batches(CALIBRATION_BATCH, seed=context.seed)))[0],
            bits=lambda _: bits,
            per_channel=step.per_channel,
            activations=lambda _: "per_tensor",
            step=context.index,
        ),
    )


class _Freezing:
    """After a share of the steps, activation ranges no longer move."""

    def __init__(self, activations: list[FakeActivation], num_steps: int, share: float) -> None:
        self._activations, self._last, self._step = activations, round(num_steps * share), 0
        self._apply()

    def limit_gradients(self) -> None:
        """Leave the gradients alone."""

    def restore(self) -> None:
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._step = int(state["step"])
        self._apply()

    def _apply(self) -> None:
        for each in self._activations:
            each.learning = self._step < self._last


def _count_steps(examples: BoundExamples, step: QuantizeAwareTraining) -> int:
    used = examples.set_apart() if step.keep_best else examples
    num_batches = used.num_training_batches(step.batch_size, drop_last=drops_last(used, step))
    return min(step.epochs * num_batches, step.max_steps or step.epochs * num_batches)


def _set_first_ranges(simulated: nn.Module, examples: BoundExamples, step: QuantizeAwareTraining, seed: int) -> None:
    """Let every activation see some training examples; the layers before it already round."""
    used = examples.set_apart() if step.keep_best else examples
    simulated.eval()
    activations = find_activations(simulated)
    for each in activations:
        each.training = True
    num_seen = 0
    with torch.no_grad():
        for inputs, _ in used.training_batches(min(CALIBRATION_BATCH, step.num_calibration_examples), seed=seed):
            simulated(*inputs)
            num_seen += len(inputs[0])
            if num_seen >= step.num_calibration_examples:
                break
    simulated.eval()


def _compare(simulated: nn.Module, program: Program, context: Context, path: object) -> float:
    """Return the largest root mean square difference between file and simulation, relative to the output's size."""
    inputs = next(iter(cast(BoundExamples, context.examples).evaluation_batches(CALIBRATION_BATCH)))[0]
    predict = open_model(path, "onnxruntime", program.signature, context.num_threads)  # type: ignore[arg-type]
    found = predict(tuple(tensor.numpy() for tensor in inputs))
    with torch.no_grad():
        expected: tuple[Tensor, ...] = simulated(*inputs)
    differences = [0.0]
    for one, other in zip(expected, found, strict=True):
        if one.is_floating_point():
            size = float(one.square().mean().sqrt())
            differences.append(float((one - torch.from_numpy(other)).square().mean().sqrt()) / max(size, 1e-12))
    return max(differences)

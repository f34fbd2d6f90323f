"""Make a narrower and shallower model of the program's own layers, as a student for a distill step that follows."""

from itertools import islice
from typing import cast

from torch import Tensor

from app.recipes.facts import Capability
from app.recipes.students import DeriveStudent
from worker.engine.errors import StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.measure.size import count_parameters
from worker.engine.programs.program import Program
from worker.engine.pruning.compensation import compensate
from worker.engine.pruning.ranking import choose_units, measure_weights, score_units
from worker.engine.pruning.removal import find_sound_channels, remove_channels
from worker.engine.students.blocks import drop_blocks, find_stages
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.summary import find_trainable

CALIBRATION_BATCH, CALIBRATION_EXAMPLES = 32, 256
NO_BLOCKS = (
    "no residual block repeats: nowhere is a value added to what layers make of it, so every layer is needed for the "
    "shape of the next"
)


def inspect(program: Program) -> Capability:
    """Name the layers with weights, and say where no block can be dropped; `width` needs what prune_structured does."""
    has_blocks = any(stage.droppable for stage in find_stages(program))
    trainable = find_trainable("derive_student", program)
    return trainable.model_copy(update={"missing": None if has_blocks else f"{NO_BLOCKS}; depth must be 1"})


def run(program: Program, step: DeriveStudent, context: Context) -> Outcome:
    """Drop blocks, then channels; layers that read removed channels are adjusted on examples, where there are some."""
    before, macs = count_parameters(program).total, count_macs(program).total
    small, dropped = program, list[str]()
    if step.depth < 1:
        small, dropped = _drop(program, step.depth)
        context.report(0.2, f"{len(dropped)} blocks dropped")
    facts: dict[str, float | int | str | bool | None] = {"blocks_dropped": len(dropped)}
    if step.width < 1:
        small, removed = _narrow(small, step, context)
        facts["channels_removed"] = removed
    facts |= {
        "dropped": ", ".join(dropped[:20]) or None,
        "parameters_before": before,
        "parameters_after": count_parameters(small).total,
        "macs_before": macs,
        "macs_after": count_macs(small).total,
    }
    return Outcome(program=small, facts=facts)


def _drop(program: Program, depth: float) -> tuple[Program, list[str]]:
    stages = find_stages(program)
    chosen = [block for stage in stages for block in stage.choose(depth)]
    if not stages:
        raise StepFailed(f"depth {depth:g}: {NO_BLOCKS}", code="no_repeated_blocks", fix="Set depth to 1.")
    if not chosen:
        counts = ", ".join(f"{stage.name or 'the model'}: {stage.num_blocks}" for stage in stages)
        raise StepFailed(
            f"depth {depth:g} rounds to all blocks of every stage ({counts})",
            code="no_repeated_blocks",
            fix="Lower depth, or set it to 1.",
        )
    return drop_blocks(program, chosen), [block.name for block in chosen]


def _narrow(program: Program, step: DeriveStudent, context: Context) -> tuple[Program, int]:
    channels = find_sound_channels(program)
    saliency = measure_weights(program.module, step.criterion)
    scored = [(group, score_units(group, step.criterion, saliency, program.module)) for group in channels.groups]
    groups = [group for group, score in scored if score is not None]
    scores = [score for _, score in scored if score is not None]
    context.report(0.5, f"{len(groups)} groups of channels found")
    full = {group.name: group.num_units for group in groups}
    chosen = choose_units(groups, scores, ratio=1 - step.width, scope="local", round_to=step.round_to, full=full)
    removal = remove_channels(program, channels, chosen)
    if not removal.removed:
        counts = sorted({group.num_channels for group in groups})
        reasons = "; ".join(dict.fromkeys(each.reason for each in (*channels.left, *removal.left)))
        raise StepFailed(
            f"width {step.width:g} with round_to {step.round_to} removes no channel from groups of {counts} channels"
            + (f" ({reasons[:500]})" if reasons else ""),
            code="nothing_to_narrow",
            fix="Lower width or round_to, or set width to 1 and lower depth.",
        )
    if context.examples is not None:
        sound = {name: units for name, units in chosen.items() if name in removal.removed}
        adjusted, _ = compensate(program, channels, sound, _batches(context))
        removal = remove_channels(adjusted, channels, sound)
    return removal.program, sum(removal.removed.values())


def _batches(context: Context) -> list[tuple[Tensor, ...]]:
    examples = cast(BoundExamples, context.examples)
    wanted = -(-CALIBRATION_EXAMPLES // (examples.fixed_batch or CALIBRATION_BATCH))
    batches = islice(examples.training_batches(CALIBRATION_BATCH, seed=context.seed), wanted)
    return [inputs for inputs, _ in batches]

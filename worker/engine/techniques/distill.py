"""Train the program to behave like a teacher: its soft outputs, its hidden states, its attention."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor

from app.recipes.distillation import Distill
from app.recipes.facts import Capability
from worker.engine.devices import move
from worker.engine.errors import RecipeRefused
from worker.engine.parallel.strategy import Seen
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.features import Pairs, Taps, check_layer, choose_pairs, make_pairs, tap
from worker.engine.training.imitation import imitate
from worker.engine.training.loop import train
from worker.engine.training.quality import Module, evaluate_module, is_better
from worker.engine.training.remembered import Remembered
from worker.engine.training.summary import find_trainable, find_warnings, list_facts


def inspect(program: Program) -> Capability:
    """Name the layers with trainable weights."""
    return find_trainable("distill", program)


def run(program: Program, step: Distill, context: Context) -> Outcome:
    """Train in place; pruned weights stay pruned. The teacher is in eval mode and in float32. It runs once a batch,
    or once over the data where its outputs alone are wanted and no augmentation changes the inputs.
    """
    examples = cast(BoundExamples, context.examples)
    teacher = _open_teacher(step, context)
    teacher.device = program.device
    ask = _fit_teacher(teacher, program, examples)
    names = _name_pairs(step, program, teacher)
    remembered: Remembered | None = None
    with on_device(program), on_device(teacher), ExitStack() as stack:
        mine = stack.enter_context(tap(program.module, [student for student, _ in names]))
        theirs = stack.enter_context(tap(teacher.module, [other for _, other in names]))
        if not names and not step.augmentations and step.epochs > 1:
            ask = remembered = Remembered(ask)
        pairs = _probe(program, ask, examples, step, names, (mine, theirs), context.seed)
        masks = [index for index, each in enumerate(program.signature.inputs) if each.name == "attention_mask"]

        def compute_loss(outputs: tuple[Tensor, ...], seen: Seen) -> Tensor:
            inputs, labels = seen.inputs, seen.labels
            with torch.no_grad():
                wanted = ask(*inputs) if remembered is None else remembered.recall(seen.host_inputs, inputs)
            total = outputs[examples.output_index].new_zeros(())
            if step.soft_weight:
                total = total + step.soft_weight * imitate(examples, outputs, wanted, labels, step.temperature)
            if step.label_weight and labels is not None:
                loss = examples.loss(outputs, labels, label_smoothing=step.label_smoothing)
                total = total + step.label_weight * loss
            if names:
                features, padding = (mine.take(), theirs.take()), inputs[masks[0]] != 0 if masks else None
                if step.hidden_weight:
                    total = total + step.hidden_weight * pairs.compare_hidden(*features, padding)
                if step.attention_weight:
                    total = total + step.attention_weight * pairs.compare_attention(*features, padding)
            return total

        trained = train(
            program, examples, step, seed=context.seed, report=context.report, loss=compute_loss,
            extra_parameters=pairs.parameters(), stateful=[remembered] if remembered is not None else [], reference=ask,
            checkpoints=context.checkpoints,
        )  # fmt: skip
    warnings = find_warnings("Distillation", trained, examples, step)
    facts = list_facts(trained, step) | {
        "teacher": step.teacher_model_id or "original",
        "label_loss_used": examples.has_labels and step.label_weight > 0,
        "pairs": ", ".join(pair.name for pair in pairs.pairs) or None,
        "projections": sum(pair.projection is not None for pair in pairs.pairs),
    }
    if examples.has_labels:
        choosing = examples.set_apart() if step.keep_best else examples
        with on_device(teacher):
            quality = evaluate_module(ask, choosing, min(step.batch_size, 256))
        facts["teacher_quality"] = quality.value
        if not is_better(quality, trained.quality_before):
            warnings.append(
                f"The teacher ({quality.metric} {quality.value:.4g}) is no better than the model was before the step "
                f"({trained.quality_before.value:.4g}) on {quality.num_examples} examples, so it has little to teach."
            )
    return Outcome(program=program, facts=facts, warnings=tuple(warnings))


def _open_teacher(step: Distill, context: Context) -> Program:
    if step.teacher_model_id is None:
        assert context.open_original is not None, "the pipeline keeps the original for this kind"
        teacher = context.open_original()
    else:
        assert context.open_teacher is not None
        teacher = context.open_teacher(step.teacher_model_id)
    teacher.module.eval().requires_grad_(False)
    return teacher


def _fit_teacher(teacher: Program, program: Program, examples: BoundExamples) -> Module:
    """Return the teacher as a function of the student's inputs; refuse one that takes or gives something else."""
    names = [each.name for each in program.signature.inputs]
    wanted = [each.name for each in teacher.signature.inputs]
    if sorted(names) != sorted(wanted):
        raise _refuse(f"the teacher's inputs are {wanted}, the model's are {names}")
    if teacher.signature.batch_size not in (None, examples.fixed_batch):
        raise _refuse(f"the teacher was exported with a fixed batch of {teacher.signature.batch_size}")
    order = [names.index(name) for name in wanted]

    def ask(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = teacher.module(*move((inputs[index] for index in order), teacher.device))
        return outputs

    return ask


def _name_pairs(step: Distill, program: Program, teacher: Program) -> list[tuple[str, str]]:
    if not step.hidden_weight and not step.attention_weight:
        return []
    for pair in step.pairs:
        check_layer(program.module, pair.student, "model")
        check_layer(teacher.module, pair.teacher, "teacher")
    names = [(pair.student, pair.teacher) for pair in step.pairs] or choose_pairs(program.module, teacher.module)
    if not names:
        raise RecipeRefused(
            "hidden_weight or attention_weight is set, and the models have no inner layers to match",
            code="no_layers_to_match",
            fix="Set both weights to 0, or name layers in pairs.",
        )
    return names


def _probe(
    program: Program,
    ask: Module,
    examples: BoundExamples,
    step: Distill,
    names: Sequence[tuple[str, str]],
    taps: tuple[Taps, Taps],
    seed: int,
) -> Pairs:
    """Run both models once, to see whether outputs and features correspond, and which widths differ."""
    program.module.eval()
    inputs, _ = next(iter(examples.training_batches(min(step.batch_size, 2), seed=seed)))
    with torch.no_grad():
        outputs, wanted = program.module(*move(inputs, program.device)), ask(*inputs)
    index = examples.output_index
    several = examples.task == "none" and not examples.output_is_named
    for place in range(len(outputs)) if several else [index]:
        if place >= len(wanted) or outputs[place].shape != wanted[place].shape:
            got = [list(each.shape) for each in wanted]
            raise _refuse(
                f"output {place} of the model has shape {list(outputs[place].shape)}, the teacher gives {got}"
            )
    if not names:
        return Pairs()
    pairs = make_pairs(names, program.module, taps[0].take(), taps[1].take(), project=step.hidden_weight > 0, seed=seed)
    if step.attention_weight and not any(each.has_positions for each in pairs.pairs):
        raise RecipeRefused(
            f"attention_weight is set, and none of {[name for name, _ in names]} gives maps or tokens",
            code="no_attention",
            fix="Set attention_weight to 0, or name layers with maps or tokens in pairs.",
        )
    return pairs


def _refuse(what: str) -> RecipeRefused:
    return RecipeRefused(
        f"the teacher does not fit: {what}",
        code="teacher_does_not_fit",
        fix="Name a teacher with the same inputs and output, or none: the original is the teacher then.",
    )

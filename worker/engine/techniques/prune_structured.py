"""Remove whole channels, and with them everything that reads them, so that layers become physically smaller."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from threading import current_thread, main_thread
from types import FrameType
from typing import cast

from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.pruning import PruneStructured
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.programs.program import Program
from worker.engine.pruning.groups import LeftAlone
from worker.engine.pruning.ranking import choose_channels, measure_magnitude, measure_taylor, score_units
from worker.engine.pruning.removal import find_sound_channels, remove_channels
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples

ANALYSIS_SECONDS = 600
"""torch-pruning's graph walk has no bound of its own."""
NUM_LAYERS_NAMED = 8
EXAMPLE_BATCH = 2


def inspect(program: Program) -> Capability:
    """Name the layers of which channels can be removed, tried out on a copy."""
    copy = program.copy()
    try:
        with _time_limit():
            channels = find_sound_channels(copy, _example_inputs(copy))
    except StepFailed as error:
        return Capability(kind="prune_structured", applicable=False, layers=(), missing=error.detail)
    layers = tuple(dict.fromkeys(name for group in channels.groups for name in group.makers))
    missing = _explain(channels.left)
    recurrent = [n for n, layer in program.module.named_modules() if isinstance(layer, nn.RNNBase)]
    if recurrent:
        missing = f"{missing}; recurrent layers keep their width: {', '.join(recurrent[:NUM_LAYERS_NAMED])}".lstrip(
            "; "
        )
    return Capability(kind="prune_structured", applicable=bool(layers), layers=layers, missing=missing or None)


def run(program: Program, step: PruneStructured, context: Context) -> Outcome:
    """Remove the least important channels of every group, prove the result and count what it saved."""
    assert not program.masks, "the recipe's validation puts prune_structured before prune_magnitude"
    names = {name for name, _ in program.module.named_modules()}
    unknown = sorted(set(step.skip_layers) - names)
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    skip = frozenset(step.skip_layers)
    inputs = _example_inputs(program)
    before, macs_before = _count_parameters(program), count_macs(program).total
    with _time_limit():
        channels = find_sound_channels(program, inputs, skip)
        if not channels.groups:
            raise StepFailed(f"no layer can lose channels: {_explain(channels.left)}", code="nothing_to_prune")
        context.report(0.3, f"{len(channels.groups)} groups of channels found")
        if step.criterion == "taylor":
            saliency = measure_taylor(
                program, cast(BoundExamples, context.examples), num_batches=step.num_batches,
                batch_size=step.batch_size, seed=context.seed,
            )  # fmt: skip
        else:
            saliency = measure_magnitude(program.module)
        context.report(0.6, f"channels ranked by {step.criterion}")
        scores = [score_units(group, saliency) for group in channels.groups]
        chosen = choose_channels(channels.groups, scores, ratio=step.ratio, scope=step.scope, round_to=step.round_to)
        if not chosen:
            counts = sorted({group.num_channels for group in channels.groups})
            raise StepFailed(
                f"ratio {step.ratio} with round_to {step.round_to} removes no channel from groups of {counts} channels",
                code="nothing_to_prune",
                fix="Lower round_to or raise ratio.",
            )
        removal = remove_channels(program, chosen, inputs, skip)
    small = removal.program
    after = _count_parameters(small)
    if not removal.removed or after >= before:
        raise StepFailed(
            f"removing channels left {after} of {before} parameters: {_explain([*channels.left, *removal.left])}",
            code="nothing_to_prune",
        )
    _check_ties(program, small)
    left = [*channels.left, *removal.left]
    untouched = [group for group in channels.groups if group.root_name not in chosen]
    if untouched:
        left.append(
            LeftAlone(
                tuple(name for group in untouched for name in group.makers),
                f"ratio {step.ratio} with round_to {step.round_to} leaves their count as it is",
            )
        )
    explanation = _explain(left)
    return Outcome(
        program=small,
        facts={
            "channels_removed": sum(removal.removed.values()),
            "channels_prunable": sum(group.num_channels for group in channels.groups),
            "groups_pruned": len(removal.removed),
            "parameters_before": before,
            "parameters_after": after,
            "macs_before": macs_before,
            "macs_after": count_macs(small).total,
            "layers_kept": sum(len(each.layers) for each in left),
        },
        warnings=(f"Layers that kept their width: {explanation}.",) if explanation else (),
    )


def _example_inputs(program: Program) -> tuple[Tensor, ...]:
    return program.example_inputs(program.signature.batch_size or EXAMPLE_BATCH, seed=0)


def _count_parameters(program: Program) -> int:
    return sum(parameter.numel() for parameter in program.module.parameters())


def _check_ties(before: Program, after: Program) -> None:
    parameters = dict(after.module.named_parameters(remove_duplicate=False))
    for names in before.tied:
        if len({id(parameters[name]) for name in names}) > 1:
            raise StepFailed(f"pruning separated the shared parameters {list(names)}", code="pruning_unsound")


def _explain(left: list[LeftAlone]) -> str:
    """Return "a, b: reason; c: reason", each reason once."""
    layers: dict[str, list[str]] = {}
    for each in left:
        layers.setdefault(each.reason, []).extend(each.layers)
    counts = Counter({reason: len(names) for reason, names in layers.items()})
    sentences = []
    for reason, _ in counts.most_common(NUM_LAYERS_NAMED):
        names = list(dict.fromkeys(layers[reason]))
        more = f" and {len(names) - NUM_LAYERS_NAMED} more" if len(names) > NUM_LAYERS_NAMED else ""
        sentences.append(f"{', '.join(names[:NUM_LAYERS_NAMED])}{more}: {reason}")
    return "; ".join(sentences)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Give up after ANALYSIS_SECONDS. Only the main thread can; the engine runs its steps there."""
    if current_thread() is not main_thread():
        yield
        return

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise StepFailed(
            f"the analysis of channel groups took more than {ANALYSIS_SECONDS} s",
            code="pruning_timeout",
            fix="Leave prune_structured out for this model.",
        )

    previous = signal(SIGALRM, give_up)
    setitimer(ITIMER_REAL, ANALYSIS_SECONDS)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, previous)

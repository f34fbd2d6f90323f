"""Remove whole channels, heads and hidden units, with all that depends on them: layers get physically smaller."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from threading import current_thread, main_thread
from types import FrameType
from typing import cast

from torch import Tensor

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.pruning import PruneStructured
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.programs.program import Program
from worker.engine.pruning.budget import Timer, make_ladder, measure_saving, search_count, search_latency
from worker.engine.pruning.compensation import compensate
from worker.engine.pruning.groups import Channels, LeftAlone
from worker.engine.pruning.ranking import Chosen, choose_units, measure_taylor, measure_weights, score_units
from worker.engine.pruning.removal import find_sound_channels, remove_channels, shrink
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import train

ANALYSIS_SECONDS = 600
"""Finding and proving groups has no bound of its own; training has."""
NUM_LAYERS_NAMED = 8
CALIBRATION_BATCH = 32
STRUCTURE_WORDS = {
    "channels": "convolution channels",
    "hidden_units": "hidden units",
    "heads": "attention heads",
    "width": "the width of embeddings and of streams that layers add to",
}


def inspect(program: Program) -> Capability:
    """Name the layers of which channels can be removed, tried out on a copy."""
    copy = program.copy()
    try:
        with _time_limit():
            channels = find_sound_channels(copy)
    except StepFailed as error:
        return Capability(kind="prune_structured", applicable=False, layers=(), missing=error.detail)
    layers = tuple(dict.fromkeys(name for group in channels.groups for name in group.makers))
    without = None if layers else "there are no layers with channels or hidden units"
    return Capability(
        kind="prune_structured", applicable=bool(layers), layers=layers, missing=_explain(channels.left) or without
    )


@dataclass
class _Run:
    """What the rounds of one step share."""

    step: PruneStructured
    context: Context
    timer: Timer | None = None
    """Set where the target is a latency."""
    full: dict[str, int] = field(default_factory=dict)
    """Group -> units it had at first."""
    removed: Counter[str] = field(default_factory=Counter)
    """Group -> channels removed so far."""
    effects: list[LayerEffect] = field(default_factory=list)
    left: dict[LeftAlone, None] = field(default_factory=dict)
    num_probes: int = 0
    num_adjusted: int = 0
    """Layers adjusted to the channels that stay, in the last round."""
    prunable: int = 0
    """Channels of all groups at first."""


def run(program: Program, step: PruneStructured, context: Context) -> Outcome:
    """Remove the least important units, in rounds, prove every result and count what it saved."""
    assert not program.masks, "the recipe's validation puts prune_structured before what makes zeros"
    names = {name for name, _ in program.module.named_modules()}
    unknown = sorted(set(step.skip_layers) - names)
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    parameters, macs = _count_parameters(program), count_macs(program).total
    state = _Run(
        step, context, Timer(program, context.target, context.directory, context.seed) if step.of == "latency" else None
    )
    small = program
    trained = 0
    for index in range(step.num_iterations):
        share = 1 - (1 - step.ratio) ** ((index + 1) / step.num_iterations)
        small = _prune(state, small, share, index, parameters, macs)
        if step.training is not None and index + 1 < step.num_iterations:
            run_of_training = train(
                small, cast(BoundExamples, context.examples), step.training, seed=context.seed + index,
                report=lambda fraction, message="", at=index, **metrics: context.report(
                    (at + 0.5 + fraction / 2) / step.num_iterations, f"round {at + 1}: {message}", **metrics
                ),
            )  # fmt: skip
            trained += run_of_training.steps_run
    after = _count_parameters(small)
    if not state.removed or after >= parameters:
        raise StepFailed(
            f"removing channels left {after} of {parameters} parameters: {_explain(list(state.left))}",
            code="nothing_to_prune",
        )
    _check_ties(program, small)
    macs_after = count_macs(small).total
    facts: dict[str, float | int | str | bool | None] = {
        "channels_removed": sum(state.removed.values()),
        "channels_prunable": state.prunable,
        "groups_pruned": len(state.removed),
        "parameters_before": parameters,
        "parameters_after": after,
        "macs_before": macs,
        "macs_after": macs_after,
        "layers_adjusted": state.num_adjusted,
        "layers_kept": len({name for each in state.left for name in each.layers}),
    }
    explanation = _explain(list(state.left))
    warnings = [f"Layers that kept their width: {explanation}."] if explanation else []
    if step.of != "channels":
        reached = (
            1
            - {
                "macs": macs_after / max(macs, 1),
                "parameters": after / parameters,
                "latency": state.timer.measure(small) if state.timer else 1.0,
            }[step.of]
        )
        facts |= {"share_asked": step.ratio, "share_reached": reached, "probes": state.num_probes}
        if step.of == "latency" and reached < step.ratio:
            warnings.append(
                f"prune_structured was asked for {step.ratio:.1%} less latency and measured {reached:.1%} in the end."
            )
    if trained:
        facts["training_steps"] = trained
    return Outcome(program=small, facts=facts, warnings=tuple(warnings), sensitivity=tuple(state.effects))


def _prune(state: _Run, program: Program, share: float, index: int, parameters: int, macs: int) -> Program:
    """Return the program with the share `share` of the original quantity gone: one round."""
    step, context = state.step, state.context

    def report(fraction: float, message: str) -> None:
        part = 0.5 if step.training is not None else 1.0
        context.report((index + part * fraction) / step.num_iterations, message)

    with _time_limit():
        channels = find_sound_channels(program, frozenset(step.skip_layers))
    _keep_structures(channels, step)
    report(0.3, f"{len(channels.groups)} groups of channels found")
    module = program.module
    if step.criterion == "taylor":
        saliency = measure_taylor(
            program, cast(BoundExamples, context.examples), num_batches=step.num_batches,
            batch_size=step.batch_size, seed=context.seed,
        )  # fmt: skip
    else:
        saliency = measure_weights(module, step.criterion)
    scored = [(group, score_units(group, step.criterion, saliency, module)) for group in channels.groups]
    channels.left += [
        LeftAlone(group.makers, "no batch norm follows, whose scale would judge it") for group, s in scored if s is None
    ]
    groups = [group for group, score in scored if score is not None]
    scores = [score for _, score in scored if score is not None]
    if index == 0:
        state.full = {group.name: group.num_units for group in groups}
        state.prunable = sum(group.num_channels for group in groups)
        state.left = dict.fromkeys(channels.left)
        if not groups:
            raise StepFailed(f"no layer can lose channels: {_explain(channels.left)}", code="nothing_to_prune")
    report(0.5, f"channels ranked by {step.criterion}")

    def choose(ratio: float) -> Chosen:
        return choose_units(
            groups, scores, ratio=ratio, scope=step.scope, round_to=step.round_to, full=state.full, savings=savings
        )

    def count(chosen: Chosen) -> float:
        candidate = shrink(program, channels, chosen) if chosen else program
        if step.of == "macs":
            return count_macs(candidate).total / max(macs, 1)
        return _count_parameters(candidate) / parameters

    savings: list[float] | None = None
    if step.criterion == "taylor" and step.scope == "global" and step.of in ("macs", "parameters"):
        savings = [measure_saving(group, count) for group in groups]
    if step.of == "channels":
        chosen = choose(share)
    else:
        ladder = make_ladder(choose, {group.name: score for group, score in zip(groups, scores, strict=True)})
        if state.timer is not None:
            timer = state.timer
            found = search_latency(1 - share, ladder, lambda c: timer.measure(shrink(program, channels, c)), report)
        else:
            found = search_count(1 - share, ladder, count)
        chosen, state.num_probes = found.chosen, state.num_probes + found.num_probes
    last = index + 1 == step.num_iterations
    if not chosen and last and not state.removed:
        counts = sorted({group.num_channels for group in groups})
        raise StepFailed(
            f"ratio {step.ratio} with round_to {step.round_to} removes no channel from groups of {counts} channels",
            code="nothing_to_prune",
            fix="Lower round_to or raise ratio.",
        )
    with _time_limit():
        removal = remove_channels(program, channels, chosen)
        if step.compensate and context.examples is not None and removal.removed:
            sound = {name: units for name, units in chosen.items() if name in removal.removed}
            adjusted, state.num_adjusted = compensate(program, channels, sound, _batches(step, context))
            removal = replace(remove_channels(adjusted, channels, sound), left=removal.left)
    state.removed.update(removal.removed)
    state.effects += [
        LayerEffect(
            step=context.index, layer=group.makers[0], metric="importance_lost",
            choice=f"{removal.removed[group.name]} of {group.num_channels} channels",
            effect=float(score[chosen[group.name]].sum() / max(score.sum(), 1e-30)), chosen=True,
        )
        for group, score in zip(groups, scores, strict=True)
        if group.name in removal.removed
    ]  # fmt: skip
    state.left |= dict.fromkeys(removal.left)
    untouched = [name for group in groups if group.name not in state.removed for name in group.makers]
    if last and untouched:
        state.left[
            LeftAlone(tuple(untouched), f"ratio {step.ratio} with round_to {step.round_to} leaves their count as it is")
        ] = None
    return removal.program


def _batches(step: PruneStructured, context: Context) -> list[tuple[Tensor, ...]]:
    examples = cast(BoundExamples, context.examples)
    size = min(CALIBRATION_BATCH, step.num_calibration_examples)
    wanted = -(-step.num_calibration_examples // (examples.fixed_batch or size))
    return [inputs for inputs, _ in islice(examples.training_batches(size, seed=context.seed), wanted)]


def _keep_structures(channels: Channels, step: PruneStructured) -> None:
    """Leave out the groups whose structure the step does not name."""
    for structure, words in STRUCTURE_WORDS.items():
        if structure in step.structures:
            continue
        names = [name for group in channels.groups if group.structure == structure for name in group.makers]
        if names:
            channels.left.append(LeftAlone(tuple(names), f"{words} are not among the structures to remove"))
    channels.groups = [group for group in channels.groups if group.structure in step.structures]


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

"""The runs of trials: what each reached, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.jobs.lifecycle import State
from app.jobs.parents import Part
from app.recipes.metrics import Metrics, Trial
from app.recipes.pipelines import Values

Outcome = Literal["running", "advanced", "stopped", "failed", "chosen"]


@dataclass(frozen=True)
class TrialRun:
    """One trial on one rung."""

    number: int
    rung: int
    epochs: int
    values: Values
    objective: float | None
    part: Part


def describe_values(values: Values) -> str:
    """Return "temperature 4, label_weight 0.1"."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def measure_objective(metrics: Metrics, size_weight: float) -> float | None:
    """Return what trials are compared by, higher is better: the quality that the last step measured on training rows
    set apart, minus `size_weight` times the share of parameters left. None where the step measured none.

    Not the quality of the report: whoever chooses by the rows that are measured in the end reports a number that is too
    good.
    """
    quality = metrics.steps[-1].facts.get("quality_after")
    if not isinstance(quality, (int, float)) or metrics.result.quality is None:
        return None
    signed = quality if metrics.result.quality.higher_is_better else -quality
    return signed - size_weight * metrics.comparison.parameters_ratio


def list_outcomes(runs: Sequence[TrialRun], *, chosen: int | None) -> tuple[Trial, ...]:
    """Return every run with what became of it; `chosen` is the number of the trial that trains in full, once known."""
    last = max((run.rung for run in runs), default=0)
    advanced = {(run.rung - 1, run.number) for run in runs if run.rung > 0}
    trials = []
    for run in runs:
        rivals = sorted(
            (-each.objective, each.number) for each in runs if each.rung == run.rung and each.objective is not None
        )
        outcome, why = _judge(run, rivals, advanced, chosen if run.rung == last else None, run.rung == last)
        trials.append(
            Trial(
                number=run.number,
                rung=run.rung,
                epochs=run.epochs,
                values=run.values,
                objective=run.objective,
                outcome=outcome,
                why=why,
                job_id=run.part.job_id,
            )
        )
    return tuple(trials)


def _judge(
    run: TrialRun, rivals: list[tuple[float, int]], advanced: set[tuple[int, int]], chosen: int | None, is_last: bool
) -> tuple[Outcome, str]:
    if not run.part.is_over:
        return "running", "it is waiting or at work"
    if run.objective is None:
        code = run.part.error.code if run.part.error else "no_objective"
        return "failed", f"its job {run.part.state.value}: {code}" if run.part.state is not State.SUCCEEDED else code
    assert run.objective is not None
    place = rivals.index((-run.objective, run.number)) + 1
    rank = f"place {place} of {len(rivals)} on its rung"
    if (run.rung, run.number) in advanced:
        return "advanced", rank
    if is_last and chosen is None:
        return "running", f"{rank} so far"
    if is_last and run.number == chosen:
        return "chosen", f"{rank}: it trains in full"
    return "stopped", f"{rank}: the best one had {-rivals[0][0]:.4g}"

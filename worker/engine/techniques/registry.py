"""Every technique by its kind: a written list, so that a missing file is an error and nothing is found by scanning."""

from types import ModuleType

from app.recipes.facts import Capability
from worker.engine.programs.program import Program
from worker.engine.techniques import (
    derive_student,
    distill,
    factorize_low_rank,
    finetune,
    prune_magnitude,
    prune_n_m,
    prune_structured,
    prune_wanda,
    quantize_aware_training,
    quantize_fixed,
    quantize_float,
    quantize_int4,
    quantize_int8,
    quantize_mixed,
    share_weights,
    take_student,
    train,
)

TECHNIQUES: dict[str, ModuleType] = {
    "train": train,
    "take_student": take_student,
    "derive_student": derive_student,
    "prune_structured": prune_structured,
    "factorize_low_rank": factorize_low_rank,
    "prune_magnitude": prune_magnitude,
    "prune_n_m": prune_n_m,
    "prune_wanda": prune_wanda,
    "finetune": finetune,
    "distill": distill,
    "share_weights": share_weights,
    "quantize_mixed": quantize_mixed,
    "quantize_int4": quantize_int4,
    "quantize_float": quantize_float,
    "quantize_fixed": quantize_fixed,
    "quantize_aware_training": quantize_aware_training,
    "quantize_int8": quantize_int8,
}


def inspect_all(program: Program) -> tuple[Capability, ...]:
    """Return what each technique can do with a program, in the order of the list."""
    return tuple(technique.inspect(program) for technique in TECHNIQUES.values())

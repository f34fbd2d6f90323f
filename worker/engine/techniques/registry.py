"""Every technique by its kind: a written list, so that a missing file is an error and nothing is found by scanning."""

from types import ModuleType

from app.recipes.facts import Capability
from worker.engine.programs.program import Program
from worker.engine.techniques import finetune, prune_magnitude, prune_structured, quantize_int8

TECHNIQUES: dict[str, ModuleType] = {
    "prune_structured": prune_structured,
    "prune_magnitude": prune_magnitude,
    "finetune": finetune,
    "quantize_int8": quantize_int8,
}


def inspect_all(program: Program) -> tuple[Capability, ...]:
    """Return what each technique can do with a program, in the order of the list."""
    return tuple(technique.inspect(program) for technique in TECHNIQUES.values())

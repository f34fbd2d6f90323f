"""What writing a program with 8-bit weights to a file gives, whichever runtime the file is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from worker.engine.programs.program import Program
from worker.engine.quantization.int8_grid import Floats


@dataclass(frozen=True)
class Built:
    """A file of integers, and the program it was made from."""

    source: Program
    plain: Program
    """The source before GPTQ rounded its weights."""
    scales: Mapping[str, Floats]
    """Layer -> the scales of weights that are on their grids already."""
    path: Path
    done: frozenset[str]
    """Layers whose weights are integers in the file."""
    kept: tuple[str, ...]
    """Layers with weights that stay in floating point."""
    parameters: int
    """Numbers stored in the file, scales and zero points included."""
    nonzero: int
    weight_bytes: int


class Int8Builder(Protocol):
    """Writes programs with 8-bit weights for one runtime."""

    float_file: Path
    """The program as it came to the step, in the same format."""
    float_bytes: int
    """Bytes of its weights."""

    def build(self, program: Program, word: str, scales: Mapping[str, Floats], plain: Program | None = None) -> Built:
        """Write the program's integers to a file named after `word`; "plain" is the program as it came."""

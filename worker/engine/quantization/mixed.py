"""Choosing a precision per layer: by the effects measured layer by layer, then by the error of the whole.

Effects of single layers do not simply add up. So what the sums suggest is measured as a whole, the effects are scaled
to what each layer adds in the company of the others, and near ties are swapped as long as the measured error falls.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from worker.engine.measure.sensitivity import Sensitivity, Variant
from worker.engine.programs.program import Program
from worker.engine.quantization.allocation import Option, allocate, cost_of, effect_of, uniform_choices
from worker.engine.quantization.precisions import Choice, CodableLayer

Assignment = tuple[int, ...]
"""For each layer, the index of its choice."""

NUM_RESCALINGS = 2
NUM_SWAPS = 24
"""Swaps tried at most, each with one pass over the rows."""
MAX_MOVES = 1000
"""Changes of one layer that are paired with each other; those that change the sum least."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-3, 1e3

Report = Callable[[float, str], None]


class MixedSearch:
    """The layers, their choices, and what was measured of them. The program carries one assignment at a time."""

    def __init__(
        self,
        program: Program,
        layers: Sequence[CodableLayer],
        choices: Sequence[Sequence[Choice]],
        sensitivity: Sensitivity,
        key: str,
    ) -> None:
        """`key` names what `choices` were made with, for the cache of effects."""
        self.program, self.layers, self.choices, self.sensitivity = program, layers, choices, sensitivity
        parameters = dict(program.module.named_parameters(remove_duplicate=False))
        self._parameters = parameters
        self._before = {name: parameters[name].detach().clone() for layer in layers for name in layer.parameters}
        self._now: list[int | None] = [None] * len(layers)
        self._key = key
        self._errors: dict[Assignment, float] = {}
        self.effects: list[list[float]] = []
        """By layer and choice, each layer alone."""

    def measure_effects(self, report: Report) -> None:
        """Measure what every choice of every layer does alone. Untouched weights do nothing."""
        tried = [(row, column) for row, each in enumerate(self.choices) for column, c in enumerate(each) if c.encodings]
        variants = [
            Variant(
                self.layers[row].parameters,
                partial(self.values, row, column),
                f"{self._key} {self.choices[row][column].precision}",
            )
            for row, column in tried
        ]
        found = self.sensitivity.measure_alone(
            variants, report=lambda done: report(done, f"{len(variants)} single choices measured")
        )
        effects = dict(zip(tried, found, strict=True))
        self.effects = [
            [effects.get((row, column), 0.0) for column in range(len(each))] for row, each in enumerate(self.choices)
        ]

    def values(self, row: int, column: int) -> Mapping[str, Tensor]:
        """Return the weights of a layer in one of its choices."""
        encodings = self.choices[row][column].encodings
        names = self.layers[row].parameters
        return {name: encodings[name].decode() if name in encodings else self._before[name] for name in names}

    def _own_values(self, row: int) -> Mapping[str, Tensor]:
        return {name: self._before[name] for name in self.layers[row].parameters}

    def options(self, scales: Sequence[float] | None = None) -> list[list[Option]]:
        """Return bytes and effects for the allocation; `scales` multiplies the effects of each layer."""
        scales = scales or [1.0] * len(self.layers)
        return [
            [Option(c.num_bytes, effect * scale) for c, effect in zip(choices, effects, strict=True)]
            for choices, effects, scale in zip(self.choices, self.effects, scales, strict=True)
        ]

    def set(self, assignment: Assignment) -> None:
        """Let the program's weights be those of an assignment. The encodings are not noted."""
        with torch.no_grad():
            for row, column in enumerate(assignment):
                if self._now[row] != column:
                    for name, value in self.values(row, column).items():
                        self._parameters[name].copy_(value)
                    self._now[row] = column

    def restore(self) -> None:
        """Give every weight the bits back that it had."""
        with torch.no_grad():
            for name, value in self._before.items():
                self._parameters[name].copy_(value)
        self._now = [None] * len(self.layers)

    def error(self, assignment: Assignment) -> float:
        """Return the measured effect of a whole assignment; each is measured once."""
        if assignment not in self._errors:
            self.set(assignment)
            self._errors[assignment] = self.sensitivity.measure_now()
        return self._errors[assignment]

    def num_weights(self, row: int) -> int:
        """Return how many weights a layer has in its matrices."""
        return sum(self._before[name].numel() for name in self.layers[row].parameters)

    def size(self, assignment: Assignment) -> int:
        """Return the bytes of an assignment."""
        return cost_of(self.options(), assignment)

    def choose(self, max_bytes: int, report: Report) -> Assignment | None:
        """Return the best measured assignment within a budget; None where even the smallest choices do not fit.

        Candidates are the optimum of the summed effects, every precision for all layers that fits (so that the result
        is never worse than those), the optima with rescaled effects, and swaps.
        """
        options = self.options()
        first = allocate(options, max_bytes)
        if first is None:
            return None
        fitting = [each for each in uniform_choices(options) if cost_of(options, each) <= max_bytes]
        best = min(dict.fromkeys([first, *fitting]), key=self.error)
        report(0.2, f"{self.sensitivity.metric} {self.error(best):.3g}")
        scales = [1.0] * len(self.layers)
        for number in range(NUM_RESCALINGS):
            scales = self._scale(best)
            other = allocate(self.options(scales), max_bytes)
            assert other is not None
            if self.error(other) >= self.error(best):
                break
            best = other
            report(0.2 + 0.2 * (number + 1), f"{self.sensitivity.metric} {self.error(best):.3g}")
        best = self._swap(best, self.options(scales), max_bytes)
        report(1.0, f"{self.sensitivity.metric} {self.error(best):.3g}")
        return best

    def _scale(self, assignment: Assignment) -> list[float]:
        """Return, per layer, what it adds to the error of the whole over what it does alone."""
        error = self.error(assignment)
        self.set(assignment)
        rows = [row for row, column in enumerate(assignment) if self.effects[row][column] > 0]
        # What a layer adds is what falls when it alone gets its own weights back.
        variants = [Variant(self.layers[row].parameters, partial(self._own_values, row), "") for row in rows]
        without = self.sensitivity.measure_alone(variants, remember=False)
        scales = [1.0] * len(self.layers)
        for row, rest in zip(rows, without, strict=True):
            scale = (error - rest) / self.effects[row][assignment[row]]
            scales[row] = min(max(scale, SMALLEST_SCALE), LARGEST_SCALE)
        return scales

    def _swap(self, assignment: Assignment, options: list[list[Option]], max_bytes: int) -> Assignment:
        """Try the moves of one or two layers that the sums think best, and keep each that lowers the measured error."""
        best, tried = assignment, {assignment}
        for _ in range(NUM_SWAPS):
            other = _find_move(best, options, max_bytes, tried)
            if other is None:
                return best
            tried.add(other)
            if self.error(other) < self.error(best):
                best = other
        return best


def _find_move(
    now: Assignment, options: list[list[Option]], max_bytes: int, tried: set[Assignment]
) -> Assignment | None:
    """Return the untried assignment that differs in one or two layers, fits, and has the smallest summed effect."""
    moves = [
        (row, column, option.cost - options[row][now[row]].cost, option.effect - options[row][now[row]].effect)
        for row, each in enumerate(options)
        for column, option in enumerate(each)
        if column != now[row]
    ]
    moves = sorted(moves, key=lambda move: abs(move[3]))[:MAX_MOVES]
    left = max_bytes - cost_of(options, now)
    rows, columns = (torch.tensor([move[index] for move in moves]) for index in (0, 1))
    costs = torch.tensor([move[2] for move in moves], dtype=torch.int64)
    effects = torch.tensor([move[3] for move in moves], dtype=torch.float64)
    # A pair of a move with itself stands for that move alone.
    alone = torch.eye(len(moves), dtype=torch.bool)
    pair_costs = torch.where(alone, costs[:, None], costs[:, None] + costs)
    pair_effects = torch.where(alone, effects[:, None], effects[:, None] + effects)
    allowed = ((rows[:, None] != rows) | alone) & (pair_costs <= left)
    # A move that saves bytes and lowers nothing is of use only beside one that spends them.
    allowed &= ~(alone & (costs[:, None] <= 0) & (effects[:, None] >= 0))
    allowed = allowed.triu()
    pair_effects[~allowed] = torch.inf
    order = torch.argsort(pair_effects.flatten(), stable=True)
    for place in order[: len(tried) + 1].tolist():
        first, second = divmod(place, len(moves))
        if not bool(allowed[first, second]):
            return None
        changed = list(now)
        for index in (first, second):
            changed[int(rows[index])] = int(columns[index])
        if (other := tuple(changed)) not in tried:
            return other
    return None


def sum_of_effects(search: MixedSearch, assignment: Assignment) -> float:
    """Return what the assignment would do if effects simply added up."""
    return effect_of(search.options(), assignment)

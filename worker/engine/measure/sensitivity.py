"""How much the model's output changes when one layer alone, or all of them together, get other weights.

`output_error` is the squared error of the output over its squared length, all rows together: 0 is equal, 1 as wrong as
an output of zeros. `output_divergence` is the mean Kullback-Leibler divergence, in nats, of the predicted classes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, fx

from worker.engine.devices import device_of, move
from worker.engine.measure.replay import Replay
from worker.engine.training.examples import BoundExamples

Metric = Literal["output_error", "output_divergence"]

BATCH = 16
MAX_OUTPUT_BYTES = 2**28
"""Of outputs kept for comparison; rows beyond it are not measured on."""
LARGEST_EFFECT = 1e12
"""Stands for an output that is not finite any more."""


@dataclass(frozen=True)
class Variant:
    """Other values for the weights of one layer. `values` is called when it is that layer's turn."""

    parameters: tuple[str, ...]
    values: Callable[[], Mapping[str, Tensor]]
    key: str
    """Names what is tried, for the cache: equal keys are equal values in the same layer."""


class Sensitivity:
    """Measures effects on a bounded set of rows; the unchanged model's outputs are computed once and kept.

    Rows and outputs are kept on the CPU; they are brought to the module's device batch by batch.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        examples: BoundExamples,
        *,
        num_examples: int,
        seed: int,
        cache: dict[str, float] | None = None,
    ) -> None:
        self._module = module.eval()
        self._output = examples.output_index
        self._cache = {} if cache is None else cache
        self._replay = Replay(module)
        self.inputs: list[tuple[Tensor, ...]] = []
        """What is measured on, in batches."""
        self._expected: list[Tensor] = []
        self.num_examples = 0
        """Rows measured on."""
        self.num_measured = 0
        """Variants whose effect was measured, and not remembered."""
        self.num_remembered = 0
        """Variants whose effect an earlier step of the job had measured."""
        self.metric: Metric = "output_error"
        """What the numbers are."""
        self._collect(examples, num_examples, seed)

    @property
    def forwards(self) -> float:
        """What was computed so far, in passes over all rows (counted in graph nodes)."""
        return self._replay.nodes_run / (self._replay.num_nodes * max(len(self.inputs), 1))

    def measure_alone(
        self, variants: Sequence[Variant], *, remember: bool = True, report: Callable[[float], None] = lambda _: None
    ) -> list[float]:
        """Return the error of the module with each variant alone. Afterwards every weight has the very bits it had.

        `remember` is for a module that is otherwise unchanged: the effects are looked up in, and added to, the cache.
        """
        keys = [self._key(variant) if remember else f"{index}" for index, variant in enumerate(variants)]
        cache = self._cache if remember else {}
        missing = [index for index, key in enumerate(keys) if key not in cache]
        if remember:
            self.num_measured += len(missing)
            self.num_remembered += len(variants) - len(missing)
        tallies = {index: _Tally(self.metric) for index in missing}
        rounds = len(self.inputs) * max(len(missing), 1)
        for number, (inputs, expected) in enumerate(zip(self.inputs, self._expected, strict=True)):
            if missing:
                self._replay.start(move(inputs, device_of(self._module)))
            for done, index in enumerate(missing):
                variant = variants[index]
                with replaced(self._module, variant.values()):
                    tallies[index].add(expected, self._replay.run(variant.parameters)[self._output])
                report((number * len(missing) + done + 1) / rounds)
        for index, tally in tallies.items():
            cache[keys[index]] = tally.conclude()
        return [cache[key] for key in keys]

    def measure_now(self) -> float:
        """Return the effect of all the changes that the module carries at this moment."""
        tally = _Tally(self.metric)
        for inputs, expected in zip(self.inputs, self._expected, strict=True):
            tally.add(expected, self._run(inputs))
        return tally.conclude()

    def _collect(self, examples: BoundExamples, num_examples: int, seed: int) -> None:
        kept = 0
        digest = hashlib.sha256()
        for inputs, _ in examples.training_batches(min(BATCH, num_examples), seed=seed):
            output = self._run(inputs)
            if not self.inputs:
                self.metric = _choose_metric(examples.task, output)
            self.inputs.append(inputs)
            self._expected.append(output)
            for tensor in inputs:
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
            self.num_examples += len(inputs[0])
            kept += output.numel() * output.element_size()
            if self.num_examples >= num_examples or kept > MAX_OUTPUT_BYTES:
                break
        self._rows = f"{self.metric} {self._output} {digest.hexdigest()}"

    @torch.inference_mode()
    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self._replay.nodes_run += self._replay.num_nodes
        output: Tensor = self._module(*move(inputs, device_of(self._module)))[self._output]
        return output.cpu()

    def _key(self, variant: Variant) -> str:
        """Name the measurement by rows, layer, its present weights and what is tried; the other layers aside."""
        digest = hashlib.sha256(f"{self._rows} {variant.parameters} {variant.key}".encode())
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        for name in variant.parameters:
            digest.update(parameters[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def replaced(module: fx.GraphModule, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values for a while; then they get the very bits back that they had."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    before = {name: parameters[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def _choose_metric(task: str, output: Tensor) -> Metric:
    classes = output.is_floating_point() and (
        (task == "classification" and output.ndim == 2) or (task == "language_modeling" and output.ndim == 3)
    )
    return "output_divergence" if classes and output.shape[-1] > 1 else "output_error"


class _Tally:
    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._error, self._size = 0.0, 0.0

    def add(self, expected: Tensor, output: Tensor) -> None:
        """Compare the outputs of one batch, where the second is."""
        expected = expected.to(output.device)
        if self._metric == "output_divergence":
            old, new = (each.float().log_softmax(-1) for each in (expected, output))
            divergence = (old.exp() * (old - new)).nan_to_num(nan=float("inf")).sum(-1)
            self._error += float(divergence.double().sum())
            self._size += divergence.numel()
            return
        # What is infinite in the original (masked scores) carries no number to compare.
        finite = expected.isfinite()
        old, new = expected.double(), output.double()
        self._error += float(torch.where(finite, new - old, 0.0).square().sum())
        self._size += float(torch.where(finite, old, 0.0).square().sum())

    def conclude(self) -> float:
        """Return the effect over everything added."""
        if self._error == 0:
            return 0.0
        effect = self._error / self._size if self._size > 0 else LARGEST_EFFECT
        # Rounding in the divergence of two equal distributions may fall below zero.
        return min(max(effect, 0.0), LARGEST_EFFECT) if isfinite(effect) else LARGEST_EFFECT

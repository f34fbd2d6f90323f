"""How right a model is on held-out examples, with the standard error of the number."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, isfinite, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.metrics import Quality
from worker.engine.devices import CPU, device_of
from worker.engine.errors import StepFailed
from worker.engine.training.examples import BoundExamples
from worker.engine.training.losses import IGNORED_LABEL, align_classes, align_values, shift_tokens

Predict = Callable[[tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]
"""Model inputs of one batch -> all model outputs."""
Module = Callable[..., tuple[Tensor, ...]]
"""The same with tensors, one argument per input."""
Metric = Literal["accuracy", "agreement", "mean_squared_error", "perplexity", "cosine"]


@dataclass(frozen=True)
class PairedQuality:
    """Original and result on the same held-out examples."""

    baseline: Quality
    result: Quality
    change_error: float | None
    """Standard error of (result - baseline), from the differences example by example."""


def evaluate(
    predict: Predict, examples: BoundExamples, *, baseline: Predict | None = None, batch_size: int = 64
) -> Quality:
    """Measure `predict` on the held-out examples; `baseline` is the original model, needed where there are no labels.

    Without labels and without `baseline`, `predict` is taken for the original and compared with itself.
    """
    tally = _Tally()
    with torch.inference_mode():
        for inputs, labels, num_rows in examples.padded_batches(batch_size):
            arrays = tuple(tensor.numpy() for tensor in inputs)
            output = _output(predict(arrays), examples.output_index, num_rows)
            if labels is not None:
                _score_labels(tally, examples.task, output, labels[:num_rows])
            else:
                other = output if baseline is None else _output(baseline(arrays), examples.output_index, num_rows)
                _score_likeness(tally, examples.task, output, other)
    return tally.conclude()


def evaluate_pair(
    original: Predict, result: Predict, examples: BoundExamples, *, batch_size: int = 64
) -> PairedQuality:
    """Measure both models on the held-out examples, calling each once a batch."""
    before, after = _Tally(), _Tally()
    with torch.inference_mode():
        for inputs, labels, num_rows in examples.padded_batches(batch_size):
            arrays = tuple(tensor.numpy() for tensor in inputs)
            outputs = [_output(predict(arrays), examples.output_index, num_rows) for predict in (original, result)]
            for tally, output in zip((before, after), outputs, strict=True):
                if labels is not None:
                    _score_labels(tally, examples.task, output, labels[:num_rows])
                else:
                    _score_likeness(tally, examples.task, output, outputs[0])
    return PairedQuality(before.conclude(), after.conclude(), before.change_error(after))


def evaluate_module(
    module: Module, examples: BoundExamples, batch_size: int, reference: Module | None = None
) -> Quality:
    """Measure a torch module, in whatever mode and on whatever device it is; `reference` takes inputs from the CPU.

    Without labels it is compared with `reference`.
    """
    baseline = None if reference is None else predict_with(reference)
    return evaluate(predict_with(module), examples, baseline=baseline, batch_size=batch_size)


def predict_with(module: Module) -> Predict:
    """Return the module as a function of arrays; a module's inputs are brought to where it is."""
    device = device_of(module) if isinstance(module, nn.Module) else CPU

    def predict(inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        outputs = module(*(torch.from_numpy(array).to(device) for array in inputs))
        return tuple((each.float() if each.is_floating_point() else each).cpu().numpy() for each in outputs)

    return predict


def is_better(quality: Quality, than: Quality) -> bool:
    """Compare two measurements of the same metric. NaN is never better."""
    if quality.higher_is_better:
        return quality.value > than.value
    return quality.value < than.value


@dataclass
class _Tally:
    """Scores and their weights per example: the value is sum(scores) / sum(weights)."""

    metric: Metric = "accuracy"
    scores: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)

    def add(self, metric: Metric, scores: Tensor, weights: Tensor | None = None) -> None:
        """Add one score, and one weight (else 1), per example."""
        scores = scores.double()
        self.metric = metric
        self.scores.append(scores.numpy())
        self.weights.append((torch.ones_like(scores) if weights is None else weights.double()).numpy())

    def conclude(self) -> Quality:
        """Return the metric's value with its standard error."""
        value, slope = self._value()
        residuals = self._residuals()
        if not isfinite(value):
            raise StepFailed(
                f"the model's output on the held-out examples is not finite: {self.metric} is {value}",
                code="output_not_finite",
                fix="Lower the learning rate or the strength of the compression; check the model on this data.",
            )
        return Quality(
            metric=self.metric,
            value=value,
            higher_is_better=self.metric not in ("mean_squared_error", "perplexity"),
            num_examples=len(residuals),
            standard_error=_spread(slope * residuals),
        )

    def change_error(self, after: "_Tally") -> float | None:
        """Return the standard error of (after - self), both measured on the same examples."""
        (_, slope_before), (_, slope_after) = self._value(), after._value()
        return _spread(slope_after * after._residuals() - slope_before * self._residuals())

    def _value(self) -> tuple[float, float]:
        """Return the value and its derivative by the mean score."""
        mean = self._mean()
        if self.metric == "perplexity":
            # A hopeless model would overflow.
            perplexity = exp(min(mean, 700.0))
            return perplexity, perplexity
        return mean, 1.0

    def _mean(self) -> float:
        total = float(np.concatenate(self.weights).sum())
        return float(np.concatenate(self.scores).sum()) / total if total else 0.0

    def _residuals(self) -> np.ndarray:
        """Return what each example adds to the deviation of a ratio of sums, linearized."""
        scores, weights = np.concatenate(self.scores), np.concatenate(self.weights)
        average = float(weights.mean())
        return (scores - self._mean() * weights) / average if average else np.zeros_like(scores)


def _spread(residuals: np.ndarray) -> float | None:
    """Return the standard error of a mean; None for one example."""
    count = len(residuals)
    if count < 2:
        return None
    return sqrt(float((residuals**2).sum()) / (count * (count - 1)))


def _output(outputs: tuple[np.ndarray, ...], index: int, num_rows: int) -> Tensor:
    array = np.ascontiguousarray(outputs[index][:num_rows])
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _score_labels(tally: _Tally, task: str, output: Tensor, labels: Tensor) -> None:
    rows = len(labels)
    if task == "classification":
        scores, classes = align_classes(output, labels)
        chosen = (scores[:, 0] > 0).long() if scores.shape[-1] == 1 else scores.argmax(-1)
        counted = classes != IGNORED_LABEL
        right = (chosen == classes) & counted
        tally.add("accuracy", right.view(rows, -1).sum(1), counted.view(rows, -1).sum(1))
    elif task == "language_modeling":
        scores, tokens = shift_tokens(output, labels)
        losses = functional.cross_entropy(
            scores.transpose(1, 2).float(), tokens, ignore_index=IGNORED_LABEL, reduction="none"
        )
        tally.add("perplexity", losses.sum(1), (tokens != IGNORED_LABEL).sum(1))
    elif task == "embedding":
        values = align_values(output, labels).flatten(1)
        tally.add("cosine", functional.cosine_similarity(output.float().flatten(1), values))
    else:
        errors = (output.float() - align_values(output, labels)).square()
        tally.add("mean_squared_error", errors.reshape(rows, -1).mean(1))


def _score_likeness(tally: _Tally, task: str, output: Tensor, other: Tensor) -> None:
    """Compare with the original: the chosen class for score vectors, equality for integers, else the direction.

    An embedding is a vector too, but its largest component means nothing: its direction does.
    """
    rows = len(output)
    if not output.is_floating_point():
        tally.add("agreement", (output == other).reshape(rows, -1).double().mean(1))
    elif task != "embedding" and output.ndim == 2 and output.shape[1] > 1:
        tally.add("agreement", (output.argmax(1) == other.argmax(1)).double())
    else:
        similarity = functional.cosine_similarity(output.reshape(rows, -1).float(), other.reshape(rows, -1).float())
        tally.add("cosine", similarity)

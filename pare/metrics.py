"""The numbers of a finished job, as the service answers them. Units are in the names."""

from dataclasses import dataclass, field
from typing import Any

from pare.records import Verdict


@dataclass(frozen=True)
class Quality:
    """How right a model is on held-out examples."""

    metric: str
    value: float
    higher_is_better: bool
    num_examples: int
    standard_error: float | None = None


@dataclass(frozen=True)
class Latency:
    """Time of one call."""

    batch_size: int
    num_threads: int
    num_runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float


@dataclass(frozen=True)
class Measurement:
    """Everything measured about one model."""

    latency: Latency
    throughput_per_second: float
    peak_memory_bytes: int
    file_bytes: int
    parameters: int
    nonzero_parameters: int
    quality: Quality | None = None
    macs: int | None = None
    uncounted_operators: tuple[str, ...] = ()
    packed_bytes: int | None = None
    peak_device_memory_bytes: int | None = None


@dataclass(frozen=True)
class Ratio:
    """Result / original with a 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Equivalence:
    """How close an output of the result is to the original's."""

    output: str
    cosine: float
    snr_db: float | None
    max_abs_error: float
    num_examples: int


@dataclass(frozen=True)
class Comparison:
    """The two models against each other."""

    latency_ratio: Ratio
    file_ratio: float
    parameters_ratio: float
    macs_ratio: float | None = None
    peak_memory_ratio: float | None = None
    quality_change: float | None = None
    equivalence: tuple[Equivalence, ...] = ()
    packed_ratio: float | None = None
    peak_device_memory_ratio: float | None = None


@dataclass(frozen=True)
class StepMetrics:
    """What one step did."""

    index: int
    kind: str
    seconds: float
    facts: dict[str, Any]
    parameters: int | None = None
    nonzero_parameters: int | None = None
    macs: int | None = None
    packed_bytes: int | None = None


@dataclass(frozen=True)
class LayerEffect:
    """What one choice did to a layer, or by it alone to the model, as `metric` says; 0 is nothing, larger is worse."""

    step: int
    layer: str
    choice: str
    metric: str
    effect: float
    weight_bytes: int | None = None
    chosen: bool = False


@dataclass(frozen=True)
class LayerMetrics:
    """One layer before and after."""

    name: str
    type: str
    parameters_before: int
    shape_before: tuple[int, ...]
    parameters_after: int | None = None
    nonzero_after: int | None = None
    shape_after: tuple[int, ...] | None = None
    macs_before: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class Environment:
    """Where the numbers come from."""

    processor: str
    num_cores: int
    runtime: str
    num_threads: int
    versions: dict[str, str]
    isolation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One of the models that a distillation compares: teacher, student_alone or student."""

    name: str
    job_id: str
    file_bytes: int
    parameters: int
    p50_ms: float
    quality: Quality | None = None
    macs: int | None = None
    latency_ratio: Ratio | None = None


@dataclass(frozen=True)
class Gain:
    """What the teacher, or its own training, added; positive where it helped.

    `helped` is None where no standard error is known.
    """

    metric: str
    value: float
    standard_error: float | None = None
    helped: bool | None = None


@dataclass(frozen=True)
class Trial:
    """One run of a trial, on one rung."""

    number: int
    rung: int
    epochs: int
    values: dict[str, float]
    outcome: str
    why: str
    job_id: str
    objective: float | None = None


@dataclass(frozen=True)
class DistillationMetrics:
    """The comparison that a distillation is for."""

    candidates: tuple[Candidate, ...]
    gain: Gain | None = None
    teacher_gain: Gain | None = None
    values: dict[str, float] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """All numbers of a job."""

    baseline: Measurement
    result: Measurement
    comparison: Comparison
    verdict: Verdict
    environment: Environment
    steps: tuple[StepMetrics, ...] = ()
    layers: tuple[LayerMetrics, ...] = ()
    sensitivity: tuple[LayerEffect, ...] = ()
    distillation: DistillationMetrics | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

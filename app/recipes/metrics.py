"""Measured numbers: what the engine reports and what GET /v1/jobs/{id}/metrics answers. Units are in the names."""

from typing import Literal

from pydantic import Field

from app.recipes.base import Items, Spec


class Quality(Spec):
    """How right a model is on held-out examples."""

    metric: Literal["accuracy", "agreement", "mean_squared_error", "perplexity", "cosine"]
    """What `value` is. `agreement` and `cosine` are relative to the original model (no labels)."""
    value: float
    """The number."""
    higher_is_better: bool
    """Direction."""
    num_examples: int
    """Held-out examples it was measured on."""
    standard_error: float | None
    """Standard error of `value` over the examples, where it has one."""


class Latency(Spec):
    """Time of one call, over `num_runs` calls after warm-up."""

    batch_size: int
    num_threads: int
    num_runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float


class Measurement(Spec):
    """Everything measured about one model."""

    quality: Quality | None
    """None where the recipe has no data."""
    latency: Latency
    throughput_per_second: float
    """Examples per second at the median latency."""
    peak_memory_bytes: int
    """Peak resident growth of a fresh process that loads and runs the model once."""
    peak_device_memory_bytes: int | None = None
    """Peak of what torch gave out on the GPU in that process: weights and activations; None on the CPU."""
    file_bytes: int
    """The file in the target's runtime format, on disk."""
    packed_bytes: int | None = None
    """The packed file, whole: graph, codebooks, indices and tables; None where none was made."""
    parameters: int
    """Numbers stored."""
    nonzero_parameters: int
    """Of these, not zero."""
    macs: int | None
    """Multiply-accumulates of one example; None where they could not be counted."""
    uncounted_operators: Items[str] = ()
    """Operators that MAC counting does not know."""


class Ratio(Spec):
    """result / original with a 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float


class Equivalence(Spec):
    """How close the result's output is to the original's on the same inputs."""

    output: str
    cosine: float
    """Mean cosine similarity over examples."""
    snr_db: float | None
    """10 log10(signal power / error power); None when the outputs are equal."""
    max_abs_error: float
    num_examples: int


class Comparison(Spec):
    """The two models against each other."""

    latency_ratio: Ratio
    """Result / original, below 1 is faster."""
    file_ratio: float
    packed_ratio: float | None = None
    """Packed file of the result / file of the original."""
    parameters_ratio: float
    macs_ratio: float | None
    peak_memory_ratio: float | None
    peak_device_memory_ratio: float | None = None
    quality_change: float | None
    """Result - original in the unit of the metric."""
    equivalence: Items[Equivalence]


class StepMetrics(Spec):
    """What one step did."""

    index: int
    kind: str
    seconds: float
    facts: dict[str, float | int | str | bool | None]
    """Named facts of the technique, e.g. channels_removed, sparsity, epochs_run."""
    parameters: int | None
    """After the step; None where the form has no parameters to count."""
    nonzero_parameters: int | None
    macs: int | None
    packed_bytes: int | None = None
    """Of the packed weights after the step, where the recipe makes a packed file: what this stage gained."""


class LayerEffect(Spec):
    """What one choice did to one layer, or by this layer alone to the model's output, as `metric` says."""

    step: int
    """Index into recipe.steps."""
    layer: str
    """Its name."""
    choice: str
    """What was tried, e.g. "int4" or "sparsity 0.5"."""
    metric: str
    """What `effect` is. Of the model's output, everything else as it was: "output_error" (squared error over squared
    length), "output_divergence" (mean Kullback-Leibler divergence of the predicted classes, in nats). Of the layer
    itself: "layer_output_error", "weight_error" (squared error over squared length), "importance_lost" (share)."""
    effect: float
    """The number; 0 is none, larger is worse."""
    weight_bytes: int | None = None
    """Of the layer's weights with this choice."""
    chosen: bool = False
    """Whether the step took this choice for this layer."""


class LayerMetrics(Spec):
    """One layer before and after."""

    name: str
    type: str
    parameters_before: int
    parameters_after: int | None
    """None when the layer no longer exists as such."""
    nonzero_after: int | None
    shape_before: Items[int]
    shape_after: Items[int] | None
    macs_before: int | None
    macs_after: int | None


class Verdict(Spec):
    """The comparison in words; every sentence holds its numbers."""

    outcome: Literal["better", "mixed", "worse", "no_difference"]
    summary: str
    better: Items[str] = ()
    worse: Items[str] = ()
    within_noise: Items[str] = ()
    warnings: Items[str] = ()


class DeviceFacts(Spec):
    """A GPU, as torch and its driver describe it."""

    name: str
    memory_bytes: int
    compute_capability: str
    """e.g. "9.0"."""
    cuda_version: str
    """That torch was built for."""
    driver: str | None
    """Version of the kernel's driver, where it can be read."""


class Environment(Spec):
    """Where the numbers come from."""

    processor: str
    num_cores: int
    runtime: str
    num_threads: int
    versions: dict[str, str]
    isolation: Items[str] = ()
    device: DeviceFacts | None = None
    """The GPU that the steps ran on, if any."""
    target_device: str = "cpu"
    """Where the two models were measured: cpu or cuda."""


class Candidate(Spec):
    """One of the models that a distillation compares."""

    name: Literal["teacher", "student_alone", "student"]
    """`student_alone` learnt from the labels only, with the same start, settings and budget."""
    job_id: str
    """The job that measured it."""
    quality: Quality | None
    """On the held-out examples."""
    file_bytes: int
    parameters: int
    macs: int | None
    p50_ms: float
    """Median latency in its job."""
    latency_ratio: Ratio | None
    """Against the teacher, both measured in the same job; None for the teacher."""


class Gain(Spec):
    """What something added: the student with a teacher against the one without, the teacher after its training against
    before."""

    metric: str
    value: float
    """With - without, positive where it helped, whatever the metric's direction."""
    standard_error: float | None
    """Of the difference, as if both were measured on different examples: an upper bound for positively correlated
    results."""
    helped: bool | None
    """Whether the gain is above 1.96 standard errors; None where no standard error is known."""


class Trial(Spec):
    """One run of a trial, on one rung."""

    number: int
    """Counts from 0; 0 are the values of the request."""
    rung: int
    epochs: int
    values: dict[str, float]
    objective: float | None
    """On training rows set apart; higher is better; None where it failed."""
    outcome: Literal["running", "advanced", "stopped", "failed", "chosen"]
    why: str
    job_id: str


class DistillationMetrics(Spec):
    """The comparison that a distillation is for. `baseline` and `result` beside it are teacher and student."""

    candidates: Items[Candidate]
    gain: Gain | None
    """None where there is no student without a teacher to compare with."""
    teacher_gain: Gain | None = None
    """What the first stage added to the uploaded model; None where the teacher was not trained."""
    values: dict[str, float]
    """The hyper-parameters that were chosen; empty without tuning."""
    trials: Items[Trial]


class Metrics(Spec):
    """All numbers of a job."""

    baseline: Measurement
    result: Measurement
    comparison: Comparison
    steps: Items[StepMetrics]
    layers: Items[LayerMetrics] = Field(max_length=100_000)
    sensitivity: Items[LayerEffect] = Field((), max_length=100_000)
    """Which layer suffers from what, as far as the steps measured it."""
    verdict: Verdict
    environment: Environment
    distillation: DistillationMetrics | None = None
    """Of a distillation: all that it compared; `baseline` is the teacher, `result` the student."""

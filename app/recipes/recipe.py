"""A recipe: ordered steps, the data they use, the target they are measured on, the files they produce."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Form, Items, Runtime, Spec
from app.recipes.data import Data
from app.recipes.distillation import Distill
from app.recipes.low_rank import FactorizeLowRank
from app.recipes.parallel import Parallel
from app.recipes.pruning import PruneMagnitude, PruneNM, PruneStructured, PruneWanda
from app.recipes.quantization import (
    QuantizeAwareTraining,
    QuantizeFixed,
    QuantizeFloat,
    QuantizeInt4,
    QuantizeInt8,
    QuantizeMixed,
)
from app.recipes.sharing import ShareWeights
from app.recipes.students import DeriveStudent, TakeStudent
from app.recipes.training import Finetune, Train, TrainingSettings

Step = Annotated[
    Train
    | TakeStudent
    | DeriveStudent
    | PruneStructured
    | FactorizeLowRank
    | PruneMagnitude
    | PruneNM
    | PruneWanda
    | Finetune
    | Distill
    | ShareWeights
    | QuantizeMixed
    | QuantizeInt4
    | QuantizeFloat
    | QuantizeFixed
    | QuantizeAwareTraining
    | QuantizeInt8,
    Field(discriminator="kind"),
]

KINDS: dict[str, type[BaseStep]] = {
    "train": Train,
    "take_student": TakeStudent,
    "derive_student": DeriveStudent,
    "prune_structured": PruneStructured,
    "factorize_low_rank": FactorizeLowRank,
    "prune_magnitude": PruneMagnitude,
    "prune_n_m": PruneNM,
    "prune_wanda": PruneWanda,
    "finetune": Finetune,
    "distill": Distill,
    "share_weights": ShareWeights,
    "quantize_mixed": QuantizeMixed,
    "quantize_int4": QuantizeInt4,
    "quantize_float": QuantizeFloat,
    "quantize_fixed": QuantizeFixed,
    "quantize_aware_training": QuantizeAwareTraining,
    "quantize_int8": QuantizeInt8,
}
"""Every technique by its name, in the order in which they are usually applied."""

Format = Literal["onnx", "pt2", "safetensors", "packed", "aoti"]
FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "pt2": "model.pt2",
    "safetensors": "model.safetensors",
    "packed": "model.packed",
    "aoti": "model.aoti.pt2",
}
"""The artifact of each format. torch's loader of compiled packages wants the last suffix to be .pt2."""
RUNTIME_FORMATS: dict[Runtime, Format] = {"onnxruntime": "onnx", "torch": "pt2", "aotinductor": "aoti"}
"""The file that each runtime opens."""
RUNTIME_FILES: dict[Runtime, tuple[Format, ...]] = {
    "onnxruntime": ("onnx",),
    "torch": ("pt2",),
    "aotinductor": ("pt2", "aoti"),
}
"""What an integer or coded model made for a runtime leaves: a compiled package comes with what it was compiled from."""
Device = Literal["cpu", "cuda"]


class Target(Spec):
    """The device and runtime on which original and result are measured, side by side."""

    device: Device = "cpu"
    """Where the artifact will run. Steps compute on a GPU wherever the worker has one; this is what is measured."""
    runtime: Runtime = "onnxruntime"
    """What will run it. Both models are measured in the same one, and an integer model is made for it. aotinductor:
    torch runs both as native code, compiled ahead of time for the worker's machine; the worker needs a C++ compiler."""
    num_threads: int = Field(1, ge=1, le=64)
    """Threads of the runtime during measurement, on the CPU."""
    batch_size: int = Field(1, ge=1, le=4096)
    """Examples per call. A model exported with a fixed batch is measured at that batch."""
    num_runs: int = Field(100, ge=10, le=10_000)
    """Timed calls of each model, interleaved, after warm-up."""


class Outputs(Spec):
    """The files a job leaves behind."""

    formats: Items[Format] | None = Field(None, max_length=5, json_schema_extra={"minItems": 1})
    """Null: what suits the final form. `packed` stores weights in as few bits as they have: zeros are left out, shared
    and quantized weights are indices, entropy-coded; load.py decodes it. `aoti` is native code for machines like the
    worker's, compiled by AOTInductor for target.device. Where target.runtime is torch or aotinductor, `pt2` and
    `safetensors` keep weights of few bits as codes; otherwise they hold plain floats. An integer model exists as
    `onnx` only, or as `pt2` and `aoti` where target.runtime is torch or aotinductor."""


class Recipe(Spec):
    """What to do to a model."""

    steps: Items[Step] = Field(max_length=32, json_schema_extra={"minItems": 1})
    """The techniques, in order."""
    data: Data | None = None
    """Examples for training, calibration and measuring quality; without it quality is compared on random inputs."""
    target: Target = Target()
    """Where speed is measured."""
    outputs: Outputs = Outputs()
    """Which files to make."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Fixes every random choice: same model, recipe, data and seed give the same artifacts on the same machine."""

    # Emptiness is checked here and not by min_length, which pydantic also reports for steps that are merely invalid.
    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if not self.steps:
            raise ValueError("steps is empty; a recipe needs at least one technique")
        if self.outputs.formats == ():
            raise ValueError("outputs.formats is empty; name a format or leave it null for all")
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for index, step in enumerate(self.steps):
            if step.comes_first and index:
                raise ValueError(
                    f"steps[{index}] {step.kind} puts another model in the place of what the steps before it made; "
                    "make it the first step"
                )
            later = self.steps[index + 1 :]
            if later and step.leaves not in later[0].takes:
                what = "an integer model" if step.leaves is Form.INTEGER else "weights in few bits"
                way = (
                    "use one of them"
                    if later[0].leaves is not Form.MODULE
                    else f"put {later[0].kind} before {step.kind}, or leave it out"
                )
                raise ValueError(f"steps[{index}] {step.kind} leaves {what} that {later[0].kind} cannot work on; {way}")
            for offset, other in enumerate(later, start=index + 1):
                if other.kind in step.undone_by:
                    raise ValueError(
                        f"steps[{offset}] {other.kind} must not follow steps[{index}] {step.kind}: "
                        f"{step.undone_by[other.kind]}"
                    )
        return self

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        for index, step in enumerate(self.steps):
            need = step.data_need()
            if need is not DataNeed.NONE and self.data is None:
                raise ValueError(f"steps[{index}] {step.kind} needs data ({need.value}); set recipe.data")
            if need is DataNeed.LABELS and self.data is not None and not self.data.has_labels:
                raise ValueError(
                    f"steps[{index}] {step.kind} needs labels; set recipe.data.label_column and recipe.data.task"
                )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        target, last = self.target, self.steps[-1]
        if target.device == "cuda" and target.runtime == "onnxruntime":
            raise ValueError(
                f"target.device is 'cuda', where target.runtime {target.runtime!r} does not run (its build is "
                "for CPUs); set target.runtime to 'torch'"
            )
        reason = last.refuse_runtime(target.runtime)
        if reason is not None:
            device = " and target.device to 'cpu'" if target.device == "cuda" else ""
            raise ValueError(
                f"steps[{len(self.steps) - 1}] {last.kind} cannot run in target.runtime {target.runtime!r}: {reason}; "
                f"set target.runtime to 'onnxruntime'{device}"
            )
        return self

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        if self.form is Form.INTEGER:
            allowed = RUNTIME_FILES["onnxruntime" if self.target.runtime == "onnxruntime" else "aotinductor"]
            wrong = [f for f in self.outputs.formats or () if f not in allowed]
            if wrong:
                raise ValueError(
                    f"an integer model for target.runtime {self.target.runtime!r} exists as {' and '.join(allowed)} "
                    f"only; remove {wrong} from outputs.formats"
                )
        if "safetensors" in self.formats and "pt2" not in self.formats:
            raise ValueError(
                "safetensors holds weights and no program, so it is checked against a pt2 file; add 'pt2' to "
                "outputs.formats"
            )
        return self

    @property
    def plan(self) -> Parallel:
        """The parallel plan with the most ranks among the steps'; one of a single rank where no step has any."""
        plans = [step.parallel for step in self.steps if isinstance(step, TrainingSettings) and step.parallel]
        return max(plans, key=lambda plan: plan.num_ranks, default=Parallel())

    @property
    def needs_gpu(self) -> bool:
        """Whether it can run on a GPU only: it is measured there, or trains in arithmetic that only GPUs have."""
        trainings = (getattr(step, "training", None) or step for step in self.steps)
        return self.target.device == "cuda" or any(
            isinstance(each, TrainingSettings) and each.precision == "tf32" for each in trainings
        )

    @property
    def compiles(self) -> bool:
        """Whether models are compiled ahead of time, which the worker needs a compiler for."""
        return self.target.runtime == "aotinductor" or "aoti" in self.formats

    @property
    def form(self) -> Form:
        """The form of the program after the last step."""
        return self.steps[-1].leaves

    @property
    def formats(self) -> tuple[Format, ...]:
        """The artifact formats this recipe produces."""
        if self.outputs.formats is not None:
            return tuple(dict.fromkeys(self.outputs.formats))
        native = RUNTIME_FILES[self.target.runtime]
        if self.form is Form.INTEGER:
            return native
        if self.form is Form.CODED:
            return (*native, "packed")
        sparse = any(step.fills_zeros for step in self.steps)
        compiled: tuple[Format, ...] = ("aoti",) if "aoti" in native else ()
        return ("onnx", "pt2", "safetensors", *compiled, *(("packed",) if sparse else ()))

"""Integer quantization: weights and activations in 8 bits, and weights in fewer."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Form, Items, Runtime
from app.recipes.training import TrainingSettings


class QuantizeInt8(BaseStep):
    """Store weights as 8-bit integers and compute with them: in ONNX Runtime on the CPU, or in torch on either device.

    With `target.runtime` torch or aotinductor the result is a .pt2 whose linear layers and embeddings hold integers.
    """

    kind: Literal["quantize_int8"]
    """The technique."""
    mode: Literal["dynamic", "static", "weight_only"] = "dynamic"
    """Dynamic: activation ranges found at run time (linear layers). Static: calibrated on data (convolutions too; ONNX
    Runtime only). Weight-only: integers on disk, floating point arithmetic."""
    per_channel: bool = True
    """One scale per output channel instead of one per tensor."""
    per_row: Literal["all", "narrowing", "none"] = "all"
    """Dynamic in ONNX Runtime only: in which layers every row (token) of the input is brought to the same range first;
    narrowing layers have more inputs than outputs. More exact, a little slower. In torch each row always has its
    own range."""
    calibration: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    """Static only: how activation ranges are chosen from the calibration examples."""
    num_calibration_examples: int = Field(256, ge=1, le=65536)
    """Training examples used for calibration, smoothing, GPTQ and bias correction."""
    quantize_embeddings: bool = True
    """Store embedding tables in 8 bits too, one scale per row."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How weights of linear layers are rounded; GPTQ makes good each error by the weights still to come (Frantar et al.
    2022); needs data, and is for `dynamic` and `weight_only`."""
    smoothing: float | None = Field(None, ge=0, le=1)
    """Move activation outliers into the weights first, with this exponent (SmoothQuant, Xiao et al. 2023); needs
    data."""
    equalize: bool = False
    """Equalize weight ranges across consecutive layers first (Nagel et al. 2019)."""
    correct_bias: bool = False
    """Remove the mean output error of every quantized layer by its bias (Nagel et al. 2019); needs data."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave in floating point."""

    family: ClassVar[str] = "quantization"
    summary: ClassVar[str] = "Integer weights and arithmetic; not always faster, so the report compares."
    leaves: ClassVar[Form] = Form.INTEGER

    def data_need(self) -> DataNeed:
        uses_data = self.mode == "static" or self.smoothing is not None or self.correct_bias or self.rounding == "gptq"
        return DataNeed.INPUTS if uses_data else DataNeed.NONE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rounding == "gptq" and self.mode == "static":
            raise ValueError("rounding 'gptq' is for modes 'dynamic' and 'weight_only', not for 'static'")
        if self.rounding == "gptq" and self.correct_bias:
            raise ValueError("rounding 'gptq' leaves no mean error for correct_bias to correct; leave one of them out")
        return self

    def refuse_runtime(self, runtime: Runtime) -> str | None:
        if runtime != "onnxruntime" and self.mode == "static":
            return "mode 'static' makes an ONNX model; torch takes 'dynamic' and 'weight_only'"
        if runtime != "onnxruntime" and self.changed("per_row"):
            return f"per_row {self.per_row!r} is a way of ONNX models; in torch each row always has its own range"
        return None

    def refuse(self, layer_types: Sequence[str]) -> str | None:
        if self.mode == "dynamic" and layer_types and all(name.startswith("Conv") for name in layer_types):
            return (
                f"mode 'dynamic' works on linear and LSTM layers, and all {len(layer_types)} layers of this model that "
                "could be quantized are convolutions; use mode 'static' with data"
            )
        return None


class QuantizeAwareTraining(TrainingSettings, BaseStep):
    """Train with the rounding of 8-bit weights and activations simulated, then store and compute in integers."""

    kind: Literal["quantize_aware_training"]
    """The technique."""
    per_channel: bool = True
    """One weight scale per output channel instead of one per tensor."""
    num_calibration_examples: int = Field(256, ge=1, le=65536)
    """Training examples that set the first activation ranges."""
    freeze_ranges_after: float = Field(0.5, ge=0, le=1)
    """Share of the steps after which activation ranges and batch-norm statistics no longer move."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave in floating point."""

    family: ClassVar[str] = "quantization"
    summary: ClassVar[str] = "Learns to live with 8-bit arithmetic; for models that static quantization harms."
    leaves: ClassVar[Form] = Form.INTEGER

    def data_need(self) -> DataNeed:
        return DataNeed.LABELS

    @model_validator(mode="after")
    def _check_plan(self) -> Self:
        if self.parallel is not None and self.parallel.tensor * self.parallel.pipeline > 1:
            raise ValueError(
                f"simulated rounding looks at whole batches and layers, which {self.parallel.describe()} divides; use "
                "parallel.data alone"
            )
        return self


class CodingStep(BaseStep):
    """A step that rewrites weights in fewer bits and leaves activations alone."""

    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave as they are."""

    family: ClassVar[str] = "quantization"
    takes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE, Form.CODED})
    leaves: ClassVar[Form] = Form.CODED


class QuantizeInt4(CodingStep):
    """Store weights as 4-bit (or 3, 2-bit) integers with a scale per group; activations stay in floating point."""

    kind: Literal["quantize_int4"]
    """The technique."""
    bits: Literal[2, 3, 4] = 4
    """Bits per weight."""
    group_size: Literal[16, 32, 64, 128, 256] = 32
    """Neighbouring input weights that share a scale."""
    method: Literal["rtn", "gptq", "hqq", "awq"] = "rtn"
    """Round to nearest; GPTQ (error-compensated, Frantar et al. 2022; needs data); HQQ (Badri and Shaji 2023);
    AWQ (activation-aware scaling, Lin et al. 2023; needs data)."""
    symmetric: bool = False
    """No zero points: a little smaller, a little worse."""
    num_calibration_examples: int = Field(128, ge=1, le=65536)
    """GPTQ and AWQ only: training examples used; labels are not needed."""
    damping: float = Field(0.01, gt=0, le=1)
    """GPTQ only: share of the mean diagonal added to the Hessian."""
    quantize_embeddings: bool = False
    """Store embedding tables in these bits too."""

    summary: ClassVar[str] = (
        "Group-wise 4, 3 or 2-bit weights; ONNX Runtime computes from them, torch decodes them at every call."
    )

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS if self.method in ("gptq", "awq") else DataNeed.NONE


class QuantizeFloat(CodingStep):
    """Store weights as 16-bit or 8-bit floating point numbers."""

    kind: Literal["quantize_float"]
    """The technique."""
    format: Literal["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"] = "fp16"
    """Half precision; brain float; 8 bits with 4 or 5 bits of exponent (Micikevicius et al. 2022)."""

    summary: ClassVar[str] = "Half or a quarter of the bytes, in torch in memory too; arithmetic stays in fp32."


class QuantizeFixed(CodingStep):
    """Store weights as fixed-point numbers: integers times a power of two, for targets without floating point."""

    kind: Literal["quantize_fixed"]
    """The technique."""
    bits: int = Field(8, ge=2, le=16)
    """Bits per weight, sign included."""
    fraction_bits: int | None = Field(None, ge=-32, le=47)
    """Bits after the binary point; null: in each tensor as many as fit its largest weight."""

    summary: ClassVar[str] = "Fixed-point weights (Qm.n): fewer bytes, in torch in memory too; not faster."


Precision = Literal["fp32", "fp16", "int8", "int4", "int3", "int2"]


class QuantizeMixed(CodingStep):
    """Measure how much each layer suffers in each precision, then choose a precision per layer under a budget."""

    kind: Literal["quantize_mixed"]
    """The technique."""
    precisions: Items[Precision] = Field(
        ("fp32", "fp16", "int8", "int4"), max_length=6, json_schema_extra={"minItems": 2}
    )
    """Precisions to choose from."""
    budget: Literal["size", "latency", "quality"] = "size"
    """What is limited; the others are made as good as possible."""
    max_size_ratio: float = Field(0.25, gt=0, le=1)
    """`size`: bytes of these weights, scales included, as a share of fp32."""
    max_latency_ratio: float = Field(0.8, gt=0, le=2)
    """`latency`: measured time of a call at the recipe's target, as a share of the original's."""
    max_quality_loss: float = Field(0.01, ge=0, le=1000)
    """`quality`: largest worsening of the metric on the rows set apart for choosing."""
    group_size: Literal[16, 32, 64, 128, 256] = 32
    """Neighbouring input weights that share a scale in 4 bits and fewer; 8-bit weights share one per row."""
    method: Literal["rtn", "gptq", "hqq"] = "gptq"
    """How weights are rounded to 4 bits and fewer; layers whose inputs GPTQ cannot see are rounded to nearest."""
    num_calibration_examples: int = Field(64, ge=1, le=65536)
    """Training examples on which sensitivity is measured, at (layers x precisions) / 2 passes over them."""

    summary: ClassVar[str] = "Keeps the layers that suffer in high precision and squeezes the rest, as measured."

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.precisions)) < 2:
            raise ValueError(f"precisions is {list(self.precisions)}; a choice needs at least two")
        limits = {"size": "max_size_ratio", "latency": "max_latency_ratio", "quality": "max_quality_loss"}
        given = self.changed(*set(limits.values()) - {limits[self.budget]})
        if given:
            raise ValueError(f"budget is {self.budget!r}, so {given} would have no effect; leave it out")
        return self

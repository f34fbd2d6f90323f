"""Quantization: fewer bits per number."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from app.recipes.base import BaseStep, DataNeed, Form, Items


class QuantizeInt8(BaseStep):
    """Store weights as 8-bit integers and compute with them in ONNX Runtime on the CPU."""

    kind: Literal["quantize_int8"]
    """The technique."""
    mode: Literal["dynamic", "static"] = "dynamic"
    """Dynamic: activation ranges found at run time (linear layers). Static: calibrated on data (convolutions too)."""
    per_channel: bool = True
    """One scale per output channel instead of one per tensor."""
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    """Static only: how activation ranges are chosen from the calibration examples."""
    num_calibration_examples: int = Field(256, ge=1, le=65536)
    """Static only: training examples used for calibration."""
    skip_layers: Items[str] = Field((), max_length=1024)
    """Names of layers to leave in floating point."""

    family: ClassVar[str] = "quantization"
    summary: ClassVar[str] = "Integer weights and arithmetic for CPUs; not always faster, so the report compares."
    leaves: ClassVar[Form] = Form.INTEGER

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS if self.mode == "static" else DataNeed.NONE

    def refuse(self, layer_types: Sequence[str]) -> str | None:
        if self.mode == "dynamic" and layer_types and all(name.startswith("Conv") for name in layer_types):
            return (
                f"mode 'dynamic' works on linear and LSTM layers, and all {len(layer_types)} layers of this model that "
                "could be quantized are convolutions; use mode 'static' with data"
            )
        return None

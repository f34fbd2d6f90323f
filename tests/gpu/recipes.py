"""Named recipes that every device must run: each kind, in each of its ways that computes differently on a device.

Both models take each of them, unless `only` says otherwise. The CPU suite runs a few as they are and all of them,
but for what is compiled, on a simulated device; `make test-gpu` runs all on a GPU, and there each .pt2 of a coding step
with its codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.engine.digits import Convolutions, Rows

MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": Convolutions, "transformer": Rows}

TRAINING: dict[str, Any] = {"epochs": 1, "max_steps": 4, "batch_size": 64, "learning_rate": 1e-3}
CALIBRATION: dict[str, Any] = {"num_calibration_examples": 64}


@dataclass(frozen=True)
class NamedRecipe:
    """Steps as a client would send them."""

    name: str
    steps: list[dict[str, Any]]
    only: str | None = None
    """The model for which it is meant; None: both."""
    in_torch: bool = False
    """Integers for torch, on the device, rather than for ONNX Runtime on the CPU."""
    runtime: str = "torch"
    """Where it is measured, unless a step makes integers for ONNX Runtime."""
    computes: bool = True
    """Whether a step computes on the device; the others are a moment's work on the CPU, or ONNX Runtime's."""


RECIPES = (
    NamedRecipe("train", [{"kind": "train", **TRAINING}]),
    NamedRecipe("finetune", [{"kind": "finetune", **TRAINING}]),
    NamedRecipe("finetune_accumulated", [{"kind": "finetune", **TRAINING, "accumulate": 2, "gradient_clip_norm": 1.0}]),
    NamedRecipe("finetune_bf16", [{"kind": "finetune", **TRAINING, "precision": "bf16"}]),
    NamedRecipe("distill", [{"kind": "distill", **TRAINING}]),
    NamedRecipe("distill_hidden", [{"kind": "distill", **TRAINING, "hidden_weight": 1.0, "attention_weight": 1.0}]),
    NamedRecipe("prune_magnitude", [{"kind": "prune_magnitude", "sparsity": 0.5}, {"kind": "finetune", **TRAINING}]),
    NamedRecipe("prune_n_m", [{"kind": "prune_n_m"}], computes=False),
    NamedRecipe("prune_n_m_wanda", [{"kind": "prune_n_m", "criterion": "wanda", **CALIBRATION}]),
    NamedRecipe("prune_wanda", [{"kind": "prune_wanda", "sparsity": 0.5, **CALIBRATION}]),
    NamedRecipe("prune_structured", [{"kind": "prune_structured", "ratio": 0.3, "round_to": 4, **CALIBRATION}]),
    NamedRecipe("prune_structured_taylor",
                [{"kind": "prune_structured", "ratio": 0.3, "round_to": 4, "criterion": "taylor", **CALIBRATION}]),
    NamedRecipe("factorize_low_rank", [{"kind": "factorize_low_rank", "whiten": True, **CALIBRATION}]),
    NamedRecipe("share_weights", [{"kind": "share_weights", "bits": 4, "training": TRAINING}]),
    NamedRecipe("quantize_float", [{"kind": "quantize_float", "format": "fp8_e4m3"}], computes=False),
    NamedRecipe("quantize_float_bf16", [{"kind": "quantize_float", "format": "bf16"}], only="transformer",
                computes=False),
    NamedRecipe("quantize_fixed", [{"kind": "quantize_fixed"}], computes=False),
    NamedRecipe("quantize_int4", [{"kind": "quantize_int4"}]),
    NamedRecipe("quantize_int4_of_3_bits", [{"kind": "quantize_int4", "bits": 3}], only="transformer"),
    NamedRecipe("quantize_int4_hqq", [{"kind": "quantize_int4", "method": "hqq"}]),
    NamedRecipe("quantize_int4_gptq", [{"kind": "quantize_int4", "method": "gptq", **CALIBRATION}]),
    NamedRecipe("quantize_int4_awq", [{"kind": "quantize_int4", "method": "awq", **CALIBRATION}]),
    NamedRecipe("quantize_int4_of_pruned",
                [{"kind": "prune_wanda", "sparsity": 0.5, **CALIBRATION},
                 {"kind": "quantize_int4", "method": "gptq", **CALIBRATION}]),
    NamedRecipe("quantize_mixed", [{"kind": "quantize_mixed", **CALIBRATION}]),
    NamedRecipe("quantize_mixed_by_quality",
                [{"kind": "quantize_mixed", "budget": "quality", "max_quality_loss": 0.05, "method": "hqq",
                  **CALIBRATION}]),
    NamedRecipe("quantize_int8_gptq", [{"kind": "quantize_int8", "rounding": "gptq", **CALIBRATION}]),
    NamedRecipe("quantize_int8_torch", [{"kind": "quantize_int8"}], in_torch=True, computes=False),
    NamedRecipe("quantize_int8_torch_weights", [{"kind": "quantize_int8", "mode": "weight_only"}], in_torch=True,
                computes=False),
    NamedRecipe("quantize_int8_compiled", [{"kind": "quantize_int8"}], in_torch=True, runtime="aotinductor"),
    NamedRecipe("quantize_int8_compiled_weights", [{"kind": "quantize_int8", "mode": "weight_only"}], in_torch=True,
                runtime="aotinductor"),
    NamedRecipe("quantize_int4_compiled", [{"kind": "quantize_int4"}], runtime="aotinductor"),
    NamedRecipe("finetune_compiled", [{"kind": "finetune", **TRAINING}], runtime="aotinductor"),
    NamedRecipe("quantize_int8_static", [{"kind": "quantize_int8", "mode": "static", **CALIBRATION}], only="cnn",
                computes=False),
    NamedRecipe("quantize_aware_training", [{"kind": "quantize_aware_training", **TRAINING, **CALIBRATION}]),
)  # fmt: skip

CASES = tuple((model, recipe) for recipe in RECIPES for model in MODELS if recipe.only in (None, model))

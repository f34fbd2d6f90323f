"""What a standby engine does before its plan arrives: import everything and pay the costs of first calls."""

import importlib

import torch

from worker.engine import actions

LAZY = ("onnx_ir", "onnxruntime.quantization", "onnxscript")
"""What the exporters and techniques import only when they are first used."""


def warm_up() -> None:
    """Import what any action needs, and trace a one-layer model, which sets up torch's own lazy parts."""
    torch.set_num_interop_threads(1)
    for name in LAZY:
        importlib.import_module(name)
    assert actions.ACTIONS
    module = torch.nn.Linear(2, 2)
    example = torch.zeros(2, 2)
    torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))

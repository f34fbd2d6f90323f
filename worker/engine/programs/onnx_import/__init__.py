"""An ONNX file as an upload: read strictly, built again from torch's layers, and compared with ONNX Runtime."""

from worker.engine.programs.onnx_import.open import ONNX_FIX, open_onnx

__all__ = ["ONNX_FIX", "open_onnx"]

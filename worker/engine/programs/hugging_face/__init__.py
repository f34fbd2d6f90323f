"""A zip of a Hugging Face folder: config.json and safetensors, built offline from transformers' own architectures."""

from worker.engine.programs.hugging_face.build import HUGGING_FACE_FIX, open_hugging_face

__all__ = ["HUGGING_FACE_FIX", "open_hugging_face"]

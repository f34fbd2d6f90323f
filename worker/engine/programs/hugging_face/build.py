"""From the checked parts of a Hugging Face folder to a Program: transformers builds it, offline, and it is exported."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from worker.engine.errors import ModelRejected
from worker.engine.programs.convert import convert
from worker.engine.programs.hugging_face.config import HEADS_KEYS, ModelConfig, read_config
from worker.engine.programs.hugging_face.folder import Folder, unpack
from worker.engine.programs.hugging_face.pooling import add_pooling
from worker.engine.programs.program import Program
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.weights_file import read_tensors

HUGGING_FACE_FIX = (
    "Zip a folder written by save_pretrained of one of transformers' own architectures (config.json and "
    "model.safetensors), or export the live model with torch.export and upload the .pt2."
)
_SLACK_BYTES = 256 * 2**20
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_EXAMPLE_LENGTH = 16
_PAIRED = ("ForSequenceClassification", "ForQuestionAnswering")
"""Heads that may be given two texts, told apart by token_type_ids."""


def open_hugging_face(path: Path, directory: Path) -> Program:
    """Check the zip at `path` and return its model as a trainable program in float32. `directory` is scratch.

    Encoders take input_ids and attention_mask, BERT-like classifiers also token_type_ids; causal models take input_ids
    (pad on the right); image models take pixel_values.
    """
    # A job may open one file twice, as its model and as a teacher; the weights are not needed after the conversion.
    with tempfile.TemporaryDirectory(prefix="hugging_face_", dir=directory) as scratch:
        folder = unpack(path, Path(scratch))
        config = read_config(folder.config)
        model = _build(config, folder)
        if folder.pooling is not None:
            if config.family.kind != "encoder" or not config.architecture.endswith("Model"):
                reject(
                    "unsupported_modules", f"modules.json asks for pooling; {config.architecture} has no token vectors."
                )
            add_pooling(model, folder.pooling)
        inputs, lengths = _make_inputs(config)
        program = convert(model, inputs, lengths, directory, HUGGING_FACE_FIX)
    program.tokenizer = folder.tokenizer
    program.notes = (*folder.notes, *_note_guesses(config, model))
    return program


def _note_guesses(config: ModelConfig, model: nn.Module) -> tuple[str, ...]:
    key = next(key for key in HEADS_KEYS if key in config.family.fields)
    if key in config.values:
        return ()
    settings: Any = model.config
    return (
        f"config.json has no {key}, and the weights have the same shapes with any; {getattr(settings, key)}, the "
        f"default of transformers, was taken. The model is another one if it was trained with another number.",
    )


def _build(config: ModelConfig, folder: Folder) -> nn.Module:
    transformers = _import_transformers(folder.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings = getattr(transformers, config.family.config).from_dict(dict(config.values))
            settings.use_cache = False
            architecture = getattr(transformers, config.architecture)
            options = _leave_out_pooler(config, folder)
            _check_size(architecture, settings, options, folder)
        except ModelRejected:
            raise
        except Exception as error:
            # Each value is in its bounds, but they do not fit together; transformers raises many types for that.
            reject("bad_config", f"transformers cannot build what config.json describes: {_first_line(error)}.")
        for file in sorted(folder.weights.glob("*.safetensors")):
            read_tensors(file)  # refuses what is not finite
        try:
            model, info = architecture.from_pretrained(
                folder.weights,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            reject("weights_do_not_fit", f"transformers cannot load the weights: {_first_line(error)}.")
    if options:
        # Left out on purpose: what stands behind the encoder does not use it.
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if "pooler." not in name}
    _check_loaded(config, info)
    built: nn.Module = model.float().eval()
    return built


def _import_transformers(home: Path) -> Any:
    os.environ.update(_OFFLINE)
    os.environ.setdefault("HF_HOME", str(home / "home"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        reject(
            "transformers_missing",
            "This worker has no transformers, which builds Hugging Face models.",
            "Install the worker with the extra `hf`, or export the live model with torch.export and upload the .pt2.",
        )
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _leave_out_pooler(config: ModelConfig, folder: Folder) -> dict[str, Any]:
    # Bare encoders are often saved, or pooled otherwise, without the pooler that their class has by default.
    bare = config.architecture.endswith("Model") and config.model_type in (
        "bert",
        "roberta",
        "xlm-roberta",
        "mpnet",
        "albert",
        "vit",
    )
    without = folder.pooling is not None or not any("pooler" in name for name in folder.tensors)
    return {"add_pooling_layer": False} if bare and without else {}


def _check_size(architecture: Any, settings: Any, options: dict[str, Any], folder: Folder) -> None:
    """Build the model without memory and compare its size with the file's, before any memory is taken."""
    with torch.device("meta"):
        skeleton = architecture(settings, **options)
    numbers = sum(tensor.numel() for tensor in {id(each): each for each in skeleton.parameters()}.values())
    stored = sum(each.end - each.begin for each in folder.tensors.values())
    # No weight is stored in less than a byte.
    if numbers > stored:
        reject(
            "weights_do_not_fit",
            f"config.json describes {numbers} parameters; the weights have {stored} bytes in {len(folder.tensors)} "
            "tensors.",
        )
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in skeleton.buffers())
    if buffers > stored + _SLACK_BYTES:
        reject("shape_bomb", f"config.json describes tables of {buffers} bytes for {stored} bytes of weights.")


def _check_loaded(config: ModelConfig, info: dict[str, Any]) -> None:
    mismatched = [str(each[0] if isinstance(each, tuple | list) else each) for each in info["mismatched_keys"]]
    for words, names in (
        ("the weights lack", info["missing_keys"]),
        (f"{config.architecture} has no", info["unexpected_keys"]),
        ("the shape differs from config.json for", mismatched),
    ):
        if names:
            some = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            reject("weights_do_not_fit", f"The weights do not fit config.json: {words} {shown(some)}{more}.")


def _make_inputs(config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    if config.family.kind == "image":
        size, channels = config.values.get("image_size", 224), config.values.get("num_channels", 3)
        return {"pixel_values": torch.zeros(2, channels, size, size)}, {}
    length = min(_EXAMPLE_LENGTH, config.max_length)
    shape = (2, length)
    inputs = {"input_ids": torch.ones(shape, dtype=torch.long)}
    if config.family.kind == "encoder":
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if config.family.reads_segments and config.architecture.endswith(_PAIRED):
            inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    if length < 3:
        return inputs, {}
    dim = Dim("length", min=2, max=config.max_length)
    return inputs, {name: {1: dim} for name in inputs}


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {shown(line)}"

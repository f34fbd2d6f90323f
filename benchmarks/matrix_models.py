"""Tiny models of every kind that the intake takes, as the files that a user would upload, with random weights."""

import contextlib
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.recipes.architectures import ARCHITECTURES, parse_architecture
from app.recipes.plan import ModelFormat
from tests.engine.zoo import ZOO, export_model, make_model
from worker.engine.catalogue.registry import CATALOGUE

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Upload:
    """One file with what is said about it at upload."""

    name: str
    format: ModelFormat
    write: Callable[[Path], None]
    architecture: str | None = None


CATALOGUED = {
    "resnet20": "", "resnet18": "image_size=32", "mobilenet_v2": "width=0.25,image_size=32",
    "vit": "image_size=16,patch=4,width=32,depth=2,heads=4,num_classes=5,channels=3",
    "bert": "vocabulary=60,context=20,width=32,depth=2,heads=4,num_classes=3",
    "gpt": "vocabulary=60,context=20,width=32,depth=2,heads=4",
}  # fmt: skip
"""Architecture of the catalogue -> small parameters."""
_UNTOLD = {
    "resnet18": ("image_size",), "mobilenet_v2": ("image_size", "width"), "vit": ("heads", "image_size"),
    "bert": ("heads",), "gpt": ("heads",),
}  # fmt: skip
"""Those that whoever uploads the weights has to say, because no shape tells them, or another default would be taken."""

_ENCODER: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 24,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
_GPT2 = {"vocab_size": 60, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
         "eos_token_id": 1}  # fmt: skip
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
        "patch_size": 4}  # fmt: skip
_OPT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 24, "word_embed_proj_dim": 32}  # fmt: skip
_LABELS = {"num_labels": 3}
_DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 24}

FOLDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _ENCODER | _LABELS),
    "bert pairs": ("BertConfig", "BertForQuestionAnswering", _ENCODER),
    "bert masked": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForTokenClassification", _ENCODER | _LABELS | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", _ENCODER | _LABELS),
    "mpnet": ("MPNetConfig", "MPNetModel", _ENCODER),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", _ENCODER | _LABELS | {"embedding_size": 16}),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", _ENCODER | _LABELS | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", _DISTIL | _LABELS),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _ENCODER),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "vit": ("ViTConfig", "ViTForImageClassification", _VIT | _LABELS),
}
"""Name -> configuration and model class of transformers, and what makes it small."""


def list_uploads() -> Iterator[Upload]:
    """Yield every upload of the table."""
    for name in ZOO:
        yield Upload(f"pt2 {name}", "pt2", lambda path, name=name: _write_pt2(name, path))  # type: ignore[misc]
    yield Upload("pt2 vit, fixed batch", "pt2", lambda path: _write_pt2("vit", path, dynamic=False))
    for name, tail in CATALOGUED.items():
        architecture = f"{name}:{tail}" if tail else name
        kept = ",".join(each for each in tail.split(",") if each.partition("=")[0] in _UNTOLD.get(name, ()))
        yield Upload(
            f"catalogue {name}",
            "safetensors",
            lambda path, text=architecture: _write_state_dict(text, path),  # type: ignore[misc]
            f"{name}:{kept}" if kept else name,
        )
    for name in FOLDERS:
        yield Upload(f"hf {name}", "hf", lambda path, name=name: _write_folder(name, path))  # type: ignore[misc]
    for name in ("cnn", "mobilenet", "vit", "gpt", "lstm"):
        yield Upload(f"onnx {name}", "onnx", lambda path, name=name: _write_onnx(name, path))  # type: ignore[misc]


def _write_pt2(name: str, path: Path, *, dynamic: bool = True) -> None:
    export_model(name, path, dynamic=dynamic)


def _write_state_dict(text: str, path: Path) -> None:
    architecture, values = parse_architecture(text)
    defaults = {"num_classes": 10, "channels": 3}
    for key, parameter in ARCHITECTURES[architecture.name].parameters.items():
        default = parameter.default if parameter.default is not None else defaults.get(key)
        if default is not None:
            values.setdefault(key, default)
    torch.manual_seed(0)
    module = CATALOGUE[architecture.name].build(values, {})
    tensors = {name: value.clone() for name, value in module.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, path)


def _write_folder(name: str, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers  # seconds: only where a folder is written
    config, head, sizes = FOLDERS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, head)(getattr(transformers, config)(**sizes)).eval()
    folder = path.with_suffix(".folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)


def _write_onnx(name: str, path: Path) -> None:
    model: nn.Module = make_model(name)
    inputs: tuple[Tensor, ...] = ZOO[name].inputs(4)
    rows = torch.export.Dim("rows", min=1, max=4096)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, str(path), dynamo=True, external_data=False, dynamic_shapes=({0: rows},), verbose=False
        )

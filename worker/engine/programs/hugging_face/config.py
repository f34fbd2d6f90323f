"""config.json of a Hugging Face folder: every key known and bounded, or the model is refused."""

import difflib
from dataclasses import dataclass
from typing import Any

from worker.engine.programs.hugging_face.families import FAMILIES, IGNORED, Family
from worker.engine.programs.json_reader import integer, items, mapping, parse_json, text
from worker.engine.programs.rejections import reject, shown

_WHERE = "config.json"
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "use_kernels", "kernel_config")
_MAX_LABELS = 100_000
HEADS_KEYS = ("num_attention_heads", "n_heads", "n_head")
"""What the families call the number of attention heads."""


@dataclass(frozen=True)
class ModelConfig:
    """What Pare builds: a class of transformers with checked values."""

    family: Family
    model_type: str
    architecture: str
    values: dict[str, Any]

    @property
    def max_length(self) -> int:
        """Longest sequence the positions allow."""
        names = ("max_position_embeddings", "n_positions")
        given = next((self.values[name] for name in names if name in self.values), 512)
        return max(1, int(given) - self.family.position_offset)


def read_config(raw: bytes) -> ModelConfig:
    """Check the text of config.json and return what it describes; raises ModelRejected."""
    given = mapping(parse_json(raw, _WHERE), _WHERE)
    for key in given:
        if key in _CODE_KEYS or key.startswith(("_attn_implementation", "_experts_", "attn_implementation")):
            reject(
                "remote_code",
                f"config.json has {shown(key)}, which makes transformers load code that is not its own.",
                "Remove the key if the model is one of transformers' own architectures; otherwise export the live "
                "model with torch.export and upload the .pt2.",
            )
    if given.get("quantization_config") is not None:
        reject(
            "quantized_model",
            "config.json has quantization_config: the weights are already quantized and cannot be trained or measured.",
            "Upload the original float weights.",
        )
    model_type = text(given.get("model_type"), f"{_WHERE}: model_type", 100)
    family = FAMILIES.get(model_type)
    if family is None:
        near = difflib.get_close_matches(model_type, FAMILIES, 1)
        reject(
            "unsupported_architecture",
            f"config.json says model_type {shown(model_type)}{f' (did you mean {near[0]}?)' if near else ''}; Pare "
            f"builds {', '.join(sorted(FAMILIES))}.",
            "Export the live model with torch.export and upload the .pt2.",
        )
    architecture = _read_architecture(given.get("architectures"), model_type, family)
    values = _read_values(given, model_type, family)
    if architecture.endswith("Classification"):
        values["num_labels"] = _count_labels(given)
    return ModelConfig(family, model_type, architecture, values)


def _read_architecture(given: Any, model_type: str, family: Family) -> str:
    names = [
        text(name, f"{_WHERE}: architectures", 100) for name in items(given if given is not None else [], _WHERE, 8)
    ]
    if len(names) != 1 or names[0] not in family.heads:
        reject(
            "unsupported_architecture",
            f"config.json names the architectures {shown(names)}; for {model_type} Pare builds one of "
            f"{', '.join(family.heads)}.",
            "Set `architectures` to the class that wrote the weights, or export the live model with torch.export.",
        )
    return names[0]


def _read_values(given: dict[str, Any], model_type: str, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in family.fields:
            values[key] = family.fields[key](value, f"{_WHERE}: {key}")
        elif key not in IGNORED:
            near = difflib.get_close_matches(key, family.fields, 1)
            reject(
                "unknown_config_key",
                f"config.json has {shown(key)}, of which Pare does not know what it does to a {model_type} model"
                f"{f' (did you mean {near[0]}?)' if near else ''}.",
                "Remove the key if the model is the same without it; otherwise upload a .pt2 of the live model.",
            )
    if given.get("is_encoder_decoder") not in (None, False):
        reject("unsupported_config", "config.json says is_encoder_decoder; Pare builds encoders and decoders alone.")
    padding = given.get("pad_token_id")
    if padding is not None and "vocab_size" in values:
        values["pad_token_id"] = integer(padding, f"{_WHERE}: pad_token_id", -1, values["vocab_size"] - 1)
    for width, heads in (("hidden_size", "num_attention_heads"), ("dim", "n_heads"), ("n_embd", "n_head")):
        if width in values and heads in values and "head_dim" not in values and values[width] % values[heads]:
            reject("bad_structure", f"{_WHERE}: {width} {values[width]} is no multiple of {heads} {values[heads]}.")
    return values


def _count_labels(given: dict[str, Any]) -> int:
    labels = given.get("id2label")
    count = given.get("num_labels", 2) if labels is None else len(mapping(labels, f"{_WHERE}: id2label"))
    return integer(count, f"{_WHERE}: the number of labels", 1, _MAX_LABELS)

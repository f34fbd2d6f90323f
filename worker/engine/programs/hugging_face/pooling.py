"""What sentence-transformers puts behind the transformer: pooling over the tokens, and a norm of one."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.programs.json_reader import boolean, items, mapping, parse_json, text
from worker.engine.programs.rejections import reject, shown

_FIX = "Export the live model with torch.export and upload the .pt2, or leave modules.json out to get token outputs."


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one sentence vector."""

    mode: Literal["mean", "cls", "max"]
    normalize: bool


def read_pooling(modules: bytes, layer: bytes | None) -> Pooling | None:
    """Return what modules.json and 1_Pooling/config.json describe; None where the transformer stands alone."""
    parts = []
    for entry in items(parse_json(modules, "modules.json"), "modules.json", 16):
        kind = text(mapping(entry, "modules.json").get("type"), "modules.json: type")
        parts.append(kind.rpartition(".")[2])
    if parts == ["Transformer"]:
        return None
    if parts not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        reject(
            "unsupported_modules",
            f"modules.json lists {shown(parts)}; Pare builds Transformer, Pooling and Normalize, in this order.",
            _FIX,
        )
    if layer is None:
        reject("config_missing", "modules.json lists Pooling, but the zip has no 1_Pooling/config.json.", _FIX)
    return Pooling(
        _read_mode(mapping(parse_json(layer, "1_Pooling/config.json"), "1_Pooling/config.json")), "Normalize" in parts
    )


def _read_mode(given: dict[str, Any]) -> Literal["mean", "cls", "max"]:
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, value in given.items() if key.startswith(prefix) and boolean(value, key)]
    if isinstance(given.get("pooling_mode"), str):
        modes = [given["pooling_mode"]]
    known: dict[str, Literal["mean", "cls", "max"]] = {
        "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "max_tokens": "max", "max": "max",
    }  # fmt: skip
    if len(modes) != 1 or modes[0] not in known:
        reject(
            "unsupported_modules",
            f"1_Pooling/config.json asks for {shown(modes)}; one of mean, cls, max is built.",
            _FIX,
        )
    return known[modes[0]]


def add_pooling(model: nn.Module, pooling: Pooling) -> None:
    """Let the model return `sentence_embedding` (batch, width) ; names stay as they are."""
    base: Any = type(model)

    class Pooled(base):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            tokens = base.forward(self, input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return {"sentence_embedding": pool(tokens, attention_mask, pooling)}

    model.__class__ = Pooled


def pool(tokens: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per sentence from (batch, length, width), leaving out what the mask leaves out."""
    mask = attention_mask.unsqueeze(-1)
    if pooling.mode == "mean":
        weights = mask.to(tokens.dtype)
        vectors = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif pooling.mode == "max":
        vectors = tokens.masked_fill(mask == 0, torch.finfo(tokens.dtype).min).amax(1)
    else:
        vectors = tokens[:, 0]
    return functional.normalize(vectors, dim=1) if pooling.normalize else vectors

"""Transformers of the catalogue: ViT, BERT and GPT."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from worker.engine.catalogue.entry import Entry, Shapes, Values, count, read_sizes
from worker.engine.catalogue.images import image_inputs

_EXAMPLE_LENGTH = 16


def _heads(width: int | float) -> int:
    return max(1, int(width) // 64)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """Return (batch, heads, length, width / heads) from (batch, length, width)."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """Self-attention with one joint projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended vectors (batch, length, width)."""
        query, key, value = (_split(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        attended: Tensor = self.proj(_merge(functional.scaled_dot_product_attention(query, key, value)))
        return attended


class VisionMlp(nn.Module):
    """Two layers around a GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed vectors."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class VisionBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, 1e-6), VisionAttention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width, 1e-6), VisionMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's vectors."""
        x = x + self.attn(self.norm1(x))
        hidden: Tensor = self.mlp(self.norm2(x))
        return x + hidden


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks."""

    def __init__(self, values: Values, hidden: int) -> None:
        super().__init__()
        width, patch = int(values["width"]), int(values["patch"])
        length = (int(values["image_size"]) // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(int(values["channels"]), width, patch, patch)})
        self.blocks = nn.Sequential(
            *(VisionBlock(width, int(values["heads"]), hidden) for _ in range(int(values["depth"])))
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, int(values["num_classes"]))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, classes)."""
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return {"logits": self.head(self.norm(self.blocks(x))[:, 0])}


_TORCHVISION_VIT = (
    (r"conv_proj\.", "patch_embed.proj."),
    (r"class_token$", "cls_token"),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
)


def _rename_vit(name: str) -> str:
    for pattern, replacement in _TORCHVISION_VIT:
        renamed, hits = re.subn(f"^{pattern}", replacement, name)
        if hits:
            return renamed
    return name


def _infer_vit(shapes: Shapes) -> Values:
    values = read_sizes(
        shapes,
        {
            "num_classes": ("head.weight", 0),
            "channels": ("patch_embed.proj.weight", 1),
            "patch": ("patch_embed.proj.weight", 2),
            "width": ("patch_embed.proj.weight", 0),
        },
    )
    values["depth"] = count(shapes, "blocks.")
    length = read_sizes(shapes, {"length": ("pos_embed", 1)}).get("length", 0)
    if length > 1 and "patch" in values:
        values["image_size"] = math.isqrt(int(length) - 1) * int(values["patch"])
    if "width" in values:
        values["heads"] = _heads(values["width"])
    return values


def vit() -> Entry:
    """Return the Vision Transformer."""

    def build(values: Values, shapes: Shapes) -> nn.Module:
        hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * int(values["width"]),))[0]
        return VisionTransformer(values, hidden)

    return Entry(_infer_vit, build, image_inputs, _rename_vit)


def _tree(names: dict[str, nn.Module]) -> nn.Module:
    """Return modules nested as their dotted names say."""
    root = nn.Module()
    for path, module in names.items():
        *parents, last = path.split(".")
        owner = root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, module)
    return root


class BertLayer(nn.Module):
    """A post-norm block, under the names of transformers."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        tree = _tree(
            {
                "attention.self.query": nn.Linear(width, width),
                "attention.self.key": nn.Linear(width, width),
                "attention.self.value": nn.Linear(width, width),
                "attention.output.dense": nn.Linear(width, width),
                "attention.output.LayerNorm": nn.LayerNorm(width, 1e-12),
                "intermediate.dense": nn.Linear(width, hidden),
                "output.dense": nn.Linear(hidden, width),
                "output.LayerNorm": nn.LayerNorm(width, 1e-12),
            }
        )
        for name, child in tree.named_children():
            self.add_module(name, child)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the block's vectors; `mask` (batch, 1, 1, length) is False where a token is padding."""
        attention: Any = self.attention
        inner, output, intermediate, last = attention.self, attention.output, self.intermediate, self.output
        query, key, value = (_split(part(x), self.num_heads) for part in (inner.query, inner.key, inner.value))
        attended = _merge(functional.scaled_dot_product_attention(query, key, value, mask))
        x = output.LayerNorm(x + self.dropout(output.dense(attended)))
        hidden = functional.gelu(intermediate.dense(x))  # type: ignore[operator, union-attr]
        return last.LayerNorm(x + self.dropout(last.dense(hidden)))  # type: ignore[operator, union-attr, no-any-return]


class Bert(nn.Module):
    """A BERT encoder with an optional pooler and classifier."""

    def __init__(self, values: Values, shapes: Shapes) -> None:
        super().__init__()
        width, hidden = int(values["width"]), shapes.get("encoder.layer.0.intermediate.dense.weight", (0,))[0]
        num_segments = shapes.get("embeddings.token_type_embeddings.weight", (2,))[0]
        self.embeddings = _tree(
            {
                "word_embeddings": nn.Embedding(int(values["vocabulary"]), width),
                "position_embeddings": nn.Embedding(int(values["context"]), width),
                "token_type_embeddings": nn.Embedding(num_segments, width),
                "LayerNorm": nn.LayerNorm(width, 1e-12),
            }
        )
        layers = [BertLayer(width, int(values["heads"]), hidden or 4 * width) for _ in range(int(values["depth"]))]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        pooled = "pooler.dense.weight" in shapes
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)}) if pooled else None
        num_classes = int(values["num_classes"])
        self.classifier = nn.Linear(width, num_classes) if num_classes else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, classes), or last_hidden_state (batch, length, width) and pooler_output."""
        table: Any = self.embeddings
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        segments = torch.zeros_like(input_ids)
        x = table.word_embeddings(input_ids) + table.position_embeddings(places) + table.token_type_embeddings(segments)
        x = self.dropout(table.LayerNorm(x))
        mask = (attention_mask != 0)[:, None, None, :]
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, mask)
        pooled = None if self.pooler is None else torch.tanh(self.pooler["dense"](x[:, 0]))
        if self.classifier is not None:
            return {"logits": self.classifier(self.dropout(x[:, 0] if pooled is None else pooled))}
        outputs = {"last_hidden_state": x}
        return outputs if pooled is None else {**outputs, "pooler_output": pooled}


def _infer_bert(shapes: Shapes) -> Values:
    values = read_sizes(
        shapes,
        {
            "vocabulary": ("embeddings.word_embeddings.weight", 0),
            "width": ("embeddings.word_embeddings.weight", 1),
            "context": ("embeddings.position_embeddings.weight", 0),
        },
    )
    values["depth"] = count(shapes, "encoder.layer.")
    values["num_classes"] = shapes.get("classifier.weight", (0,))[0]
    if "width" in values:
        values["heads"] = _heads(values["width"])
    return values


def _token_inputs(values: Values, *names: str) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    context = int(values["context"])
    length = min(_EXAMPLE_LENGTH, context)
    inputs = {name: torch.ones(2, length, dtype=torch.long) for name in names}
    dim = Dim("length", min=2, max=context) if context > 2 else None
    return inputs, {name: {1: dim} for name in names} if dim is not None else {}


def bert() -> Entry:
    """Return BERT."""
    return Entry(
        _infer_bert,
        Bert,
        lambda values: _token_inputs(values, "input_ids", "attention_mask"),
        lambda name: re.sub(
            r"LayerNorm\.gamma$",
            "LayerNorm.weight",
            re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name.removeprefix("bert.")),
        ),
        ("embeddings.position_ids",),
    )


class GptBlock(nn.Module):
    """A pre-norm causal block, under the names of nanoGPT."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, hidden, bias=bias), "c_proj": nn.Linear(hidden, width, bias=bias)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's vectors (batch, length, width)."""
        parts = self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        query, key, value = (_split(part, self.num_heads) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](_merge(attended))
        hidden: Tensor = self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return x + hidden


class Gpt(nn.Module):
    """A decoder whose output layer is its token embedding."""

    def __init__(self, values: Values, shapes: Shapes) -> None:
        super().__init__()
        width, vocabulary = int(values["width"]), int(values["vocabulary"])
        hidden = shapes.get("transformer.h.0.mlp.c_fc.weight", (4 * width,))[0]
        bias = "transformer.ln_f.bias" in shapes
        blocks = [GptBlock(width, int(values["heads"]), hidden, bias=bias) for _ in range(int(values["depth"]))]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(int(values["context"]), width),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, length, vocabulary)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](places)
        blocks: Any = self.transformer["h"]
        for block in blocks:
            x = block(x)
        return {"logits": self.lm_head(self.transformer["ln_f"](x))}


def _infer_gpt(shapes: Shapes) -> Values:
    values = read_sizes(
        shapes,
        {
            "vocabulary": ("transformer.wte.weight", 0),
            "width": ("transformer.wte.weight", 1),
            "context": ("transformer.wpe.weight", 0),
        },
    )
    values["depth"] = count(shapes, "transformer.h.")
    if "width" in values:
        values["heads"] = _heads(values["width"])
    return values


def gpt() -> Entry:
    """Return GPT."""
    return Entry(
        _infer_gpt,
        Gpt,
        lambda values: _token_inputs(values, "input_ids"),
        lambda name: name.removeprefix("_orig_mod."),
        (".attn.bias",),
    )

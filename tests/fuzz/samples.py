"""Small valid files of every format that intake takes: what the hostile ones are made from."""

import io
import json
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from tests.engine.programs.onnx_files import make_onnx_file
from tests.fuzz.watched import Upload
from worker.engine.catalogue.entry import Values
from worker.engine.catalogue.registry import CATALOGUE

FORMATS = ("pt2", "safetensors", "onnx", "hf", "npz", "tensors", "parquet", "images")
"""`tensors` is a dataset in safetensors."""


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.table: Tensor
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.conv(x))).mean([2, 3]) + self.table
        return {"logits": self.fc(y.reshape(y.shape[0], 4)), "y": torch.div(y, 2.0, rounding_mode="floor")}


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.rnn = nn.Embedding(11, 8), nn.LayerNorm(8), nn.GRU(8, 4, batch_first=True)
        self.head = nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.embedding(ids))
        with torch.no_grad():
            places = torch.arange(ids.shape[1]) % 3
        mixed = nn.functional.scaled_dot_product_attention(x, x, x) + places.unsqueeze(1)
        left, right = self.rnn(mixed)[0].split([1, 3], dim=2)
        return self.head(torch.cat([left, right], 2)), left.sum((1, 2))


class _Attention(nn.Module):
    """What intake writes anew: heads in the batch, a mask for each of them, a projection that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x, src_key_padding_mask=x[:, :, 0] > 9)
        found: Tensor = self.cross(y, x, x)[0]
        return found


@cache
def make_samples(format: str) -> tuple[Upload, ...]:
    """Return valid files of a format."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        # What torch's own exporters deprecate or suspect is not what is tested.
        warnings.simplefilter("ignore")
        return tuple(_MAKERS[format](Path(place)))


def _pt2(place: Path) -> list[Upload]:
    shapes: list[Any] = [({0: Dim("n"), 2: Dim("h", min=5, max=64)},), ({0: Dim("n")},), ({0: Dim("n")},)]
    given: list[tuple[nn.Module, Tensor]] = [
        (_Convolutions(), torch.randn(3, 1, 9, 9)),
        (_Tokens(), torch.ones(3, 5, dtype=torch.long)),
        (_Attention(), torch.randn(3, 5, 8)),
    ]
    found = []
    for (model, example), dynamic in zip(given, shapes, strict=True):
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=dynamic)
        torch.export.save(exported, place / "model.pt2")
        found.append(Upload("model", "pt2", (place / "model.pt2").read_bytes()))
    return found


def _safetensors(place: Path) -> list[Upload]:
    del place
    found = []
    small: Values = {"num_classes": 2, "channels": 1, "image_size": 8}
    for name, values in (
        ("resnet20", small),
        ("gpt", _TEXT),
        ("bert", {**_TEXT, "num_classes": 2}),
        ("vit", {**small, "patch": 4, "width": 8, "depth": 1, "heads": 1}),
    ):
        state = CATALOGUE[name].build(values, {}).state_dict()
        tensors = {key: value.clone() for key, value in state.items() if key != "lm_head.weight"}
        found.append(Upload("model", "safetensors", safetensors.torch.save(tensors), f"{name}:{_OPTIONS[name]}"))
    return found


_TEXT: Values = {"vocabulary": 7, "context": 8, "width": 8, "depth": 1, "heads": 1}
_OPTIONS = {"resnet20": "image_size=8", "gpt": "heads=1", "bert": "heads=1", "vit": "heads=1"}


def _onnx(place: Path) -> list[Upload]:
    generator = np.random.default_rng(0)
    tensors = {
        "fc.weight": generator.standard_normal((6, 4)).astype(np.float32), "fc.bias": np.ones(4, np.float32),
        "shape": np.array([-1, 2, 2]),
    }  # fmt: skip
    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "fc.weight"], ["p"], name="/fc/MatMul"),
        node("Add", ["p", "fc.bias"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Reshape", ["r", "shape"], ["y"]),
    ]
    plain = make_onnx_file(place / "plain.onnx", nodes, {"x": ("n", 6)}, tensors).read_bytes()
    batch = Dim("batch", min=1, max=64)
    torch.onnx.export(
        _Convolutions().eval(), (torch.randn(3, 1, 9, 9),), place / "model.onnx", dynamo=True, external_data=False,
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    return [Upload("model", "onnx", plain), Upload("model", "onnx", (place / "model.onnx").read_bytes())]


def _hf(place: Path) -> list[Upload]:
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tiny: dict[str, Any] = {
        "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16,
    }  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "b"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made: list[tuple[Any, dict[str, bytes]]] = [
        (transformers.BertForSequenceClassification(transformers.BertConfig(**tiny)),
         {"tokenizer.json": tokenizer.to_str().encode()}),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny)), {}),
    ]  # fmt: skip
    found = []
    for model, others in made:
        model.eval().save_pretrained(place / "folder")
        members = {path.name: path.read_bytes() for path in sorted((place / "folder").iterdir())}
        found.append(Upload("model", "hf", zip_members({**members, **others}, zipfile.ZIP_DEFLATED)))
        for path in (place / "folder").iterdir():
            path.unlink()
    return found


def _table() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((5, 2, 3)).astype(np.float32),
        "label": np.arange(5, dtype=np.int64),
        "turned": np.asfortranarray(generator.integers(0, 9, (5, 4)).astype(np.uint8)),
        "flag": np.array([True, False, True, False, True]),
    }


def _npz(place: Path) -> list[Upload]:
    del place
    stored, packed = io.BytesIO(), io.BytesIO()
    np.savez(stored, **_table())
    np.savez_compressed(packed, **_table())
    return [Upload("dataset", "npz", each.getvalue()) for each in (stored, packed)]


def _tensors(place: Path) -> list[Upload]:
    del place
    table = {name: np.ascontiguousarray(array) for name, array in _table().items()}
    return [Upload("dataset", "safetensors", safetensors.numpy.save(table, {"made": "here"}))]


def _parquet(place: Path) -> list[Upload]:
    del place
    columns = {
        "x": pa.array([[float(row), 2.0] for row in range(40)], pa.list_(pa.float32())),
        "fixed": pa.array([[1, row] for row in range(40)], pa.list_(pa.int16(), 2)),
        "text": pa.array([f"text {row % 3}" for row in range(40)]),
        "label": pa.array(range(40), pa.int64()),
        "flag": pa.array([row % 2 == 0 for row in range(40)]),
    }
    found = []
    for options in ({"compression": "snappy"}, {"compression": "zstd", "use_dictionary": False, "row_group_size": 16},
                    {"compression": "none", "data_page_version": "2.0", "write_page_index": True,
                     "write_page_checksum": True}):  # fmt: skip
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, **options)
        found.append(Upload("dataset", "parquet", file.getvalue()))
    return found


def _images(place: Path) -> list[Upload]:
    del place
    generator = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}), ("PNG", {"optimize": True}), ("JPEG", {"progressive": True}), ("JPEG", {"quality": 60}),
        ("WEBP", {"lossless": True}), ("WEBP", {}), ("BMP", {}),
    ]  # fmt: skip
    for index, (kind, options) in enumerate(kinds):
        image = Image.fromarray(generator.integers(0, 255, (9, 7, 3), dtype=np.uint8))
        file = io.BytesIO()
        (image.convert("P") if index == 1 else image).save(file, kind, **options)
        members[f"{'train' if index % 2 else 'test'}/{'cat' if index < 4 else 'dog'}/{index}.img"] = file.getvalue()
    return [Upload("dataset", "images", zip_members(members, method)) for method in (0, zipfile.ZIP_DEFLATED)]


def zip_members(members: dict[str, bytes], method: int) -> bytes:
    """Return a zip of members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compress_type=method)
    return file.getvalue()


def read_zip(content: bytes) -> dict[str, bytes]:
    """Return the members of a zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    """Return a file with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


_MAKERS = {
    "pt2": _pt2, "safetensors": _safetensors, "onnx": _onnx, "hf": _hf, "npz": _npz, "tensors": _tensors,
    "parquet": _parquet, "images": _images,
}  # fmt: skip

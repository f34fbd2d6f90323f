"""Zips of images from strangers: one folder per class; every image is decoded as Pillow decodes it, or named."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.recipes.data import Data
from app.recipes.facts import ColumnFacts, TensorFacts
from worker.engine.errors import DatasetRejected, RecipeRefused
from worker.engine.programs.program import Signature
from worker.engine.training.datasets import check_dataset
from worker.engine.training.examples import BoundExamples, open_examples

ID = "dst_" + "a" * 26


def picture(
    seed: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB", format: str = "PNG", **options: Any
) -> bytes:
    """Return a file with a random picture of (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else options
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write(directory: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = directory / "data.zip"
    path.write_bytes(zipped(members, method))
    return path


def bind(path: Path, directory: Path, height: int, width: int, binding: dict[str, Any], **data: Any) -> BoundExamples:
    bound = {"x": {"column": "image", "layout": "nhwc_to_nchw", **binding}}
    options = {"label_column": "label", "task": "classification", **data}
    spec = Data.model_validate({"dataset_id": ID, "inputs": bound, **options})
    inputs = (TensorFacts(name="x", dtype="float32", shape=("batch", 3, height, width)),)
    outputs = (TensorFacts(name="logits", dtype="float32", shape=("batch", 2)),)
    return open_examples(spec, {ID: (path, "images")}, Signature(inputs, outputs, None), 0, directory)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_folders_are_classes_and_pixels_are_kept(tmp_path: Path) -> None:
    formats = ["PNG", "BMP", "WEBP", "JPEG"]
    pictures = {
        f"data/{kind}/{seed}.{format.lower()}": picture(seed, format=format)
        for kind in ("dog", "cat")
        for seed, format in enumerate(formats)
    }
    path = write(tmp_path, {**pictures, "data/cat/.DS_Store": b"?", "__MACOSX/data/._x": b"?", "data/": b""})
    facts = check_dataset(path, "images")
    assert facts.num_rows == 8
    assert facts.classes == ("cat", "dog")
    assert facts.columns == (
        ColumnFacts(name="image", dtype="uint8", shape=(4, 6, 3)),
        ColumnFacts(name="label", dtype="int64", shape=()),
    )
    examples = bind(path, tmp_path, 4, 6, {"scale": 1 / 255})
    wanted = {(name.split("/")[1] == "dog", decode(data).tobytes()) for name, data in pictures.items()}
    found = set()
    for batches in (examples.training_batches(3, seed=0), examples.evaluation_batches(3)):
        for (x,), labels in batches:
            assert labels is not None
            pixels = (x.numpy() * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
            found |= {(bool(label), row.tobytes()) for row, label in zip(pixels, labels.tolist(), strict=True)}
    assert found == wanted
    assert [file.name for file in tmp_path.glob("*.bin")].count("data.zip.images.4.6.3.bin") == 1


def test_gray_pictures_have_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    gray = {"a/1.png": picture(1, mode="L"), "b/2.png": picture(2, mode="1")}
    assert check_dataset(write(tmp_path, gray), "images").columns[0].shape == (4, 6, 1)
    mixed = {**gray, "b/3.png": picture(3, mode="RGBA"), "b/4.png": picture(4, mode="P")}
    assert check_dataset(write(tmp_path, mixed), "images").columns[0].shape == (4, 6, 3)


def test_train_and_test_folders_are_a_column(tmp_path: Path) -> None:
    members = {
        f"{split}/{kind}/{number}.png": picture(number)
        for split, count in (("train", 3), ("test", 2))
        for kind in ("a", "b")
        for number in range(count)
    }
    path = write(tmp_path, members)
    facts = check_dataset(path, "images")
    assert facts.columns[2] == ColumnFacts(name="split", dtype="string", shape=())
    assert facts.classes == ("a", "b")
    examples = bind(path, tmp_path, 4, 6, {}, split_column="split")
    assert (examples.num_training, examples.num_evaluation) == (6, 4)
    labels = torch_labels(examples)
    assert labels == [0, 0, 1, 1]


def torch_labels(examples: BoundExamples) -> list[int]:
    return sorted(
        label for _, labels in examples.evaluation_batches(9) if labels is not None for label in labels.tolist()
    )


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    tall = picture(1, size=(6, 12))
    path = write(tmp_path, {"a/1.png": picture(0, size=(12, 6)), "b/2.png": tall})
    assert check_dataset(path, "images").columns[0].shape == ("height", "width", 3)
    with pytest.raises(RecipeRefused, match="differ in size") as caught:
        bind(path, tmp_path, 6, 6, {})
    assert caught.value.code == "images_differ_in_size"

    examples = bind(path, tmp_path, 6, 6, {"resize": [6, 6]})
    batches = [*examples.training_batches(2, seed=0), *examples.evaluation_batches(2)]
    rows = {int(label): x for (xs,), ys in batches if ys is not None for x, label in zip(xs, ys, strict=True)}
    # The shorter side fits already, so the middle is cut out as it is.
    expected = decode(tall)[3:9].transpose(2, 0, 1)
    np.testing.assert_array_equal(rows[1].numpy().astype(np.uint8), expected)
    halved = bind(path, tmp_path, 3, 3, {"resize": [3, 3]})
    assert next(iter(halved.training_batches(1, seed=0)))[0][0].shape == (1, 3, 3, 3)
    with pytest.raises(RecipeRefused, match="for images"):
        bind(path, tmp_path, 6, 6, {"resize": [6, 6], "column": "label"})


def link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("a/1.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def declared(width: int, height: int) -> bytes:
    """Return a PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 255)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def streamed(members: dict[str, bytes]) -> bytes:
    """Return what a writer makes that cannot go back: sizes stand behind the members."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return pipe.content


def test_a_zip_that_was_streamed_and_a_progressive_jpeg_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(streamed({"a/1.png": picture(), "b/1.jpg": scans(0)}))
    assert check_dataset(path, "images").num_rows == 2


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def lying() -> bytes:
    raw = bytearray(zipped({"a/1.bmp": bytes(100_000)}, zipfile.ZIP_DEFLATED))
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<L", 10)
    return bytes(raw)


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so many times: a decoder goes over all pixels in each."""
    raw = picture(format="JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * count + raw[-2:]


def run_lengths() -> bytes:
    """Return a bitmap of runs, each of which goes nowhere."""
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 1078) + struct.pack("<Iii2H6I", 40, 9, 9, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + bytes(1024) + b"\0\2\0\0" * 1000


def moved(content: bytes, before: bytes) -> bytes:
    """Return a zip behind other bytes, with offsets that count them."""
    raw, entry = bytearray(before + content), len(before) + content.index(b"PK\x01\x02")
    end = len(raw) - 22
    struct.pack_into("<L", raw, end + 16, entry)
    while raw[entry : entry + 4] == b"PK\x01\x02":
        struct.pack_into("<L", raw, entry + 42, struct.unpack_from("<L", raw, entry + 42)[0] + len(before))
        entry += 46 + sum(struct.unpack_from("<3H", raw, entry + 28))
    return bytes(raw)


GOOD = {"a/1.png": picture()}
CASES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty file": (lambda: b"", "dataset_not_zip", "0 bytes"),
    "not a zip": (lambda: b"hello" * 100, "dataset_not_zip", "end-of-directory"),
    "an empty zip": (lambda: zipped({}), "dataset_empty", "no images"),
    "only folders": (lambda: zipped({"a/": b""}), "dataset_empty", "no images"),
    "a way out": (lambda: zipped({**GOOD, "a/../../2.png": picture()}), "dataset_bad_name", "a/../../2.png"),
    "an absolute path": (lambda: zipped({"/a/1.png": picture()}), "dataset_bad_name", "/a/1.png"),
    "a drive": (lambda: zipped({"C:/a/1.png": picture()}), "dataset_bad_name", "C:"),
    "a backslash": (lambda: zipped({"a\\..\\1.png": picture()}), "dataset_bad_name", "a"),
    "a control character": (lambda: zipped({"a/\n.png": picture()}), "dataset_bad_name", "a/"),
    "a link": (link, "dataset_not_zip", "link"),
    "the same name twice": (
        lambda: zipped({**GOOD, "a/2.png": picture()}).replace(b"a/2.png", b"a/1.png"), "dataset_duplicate_image",
        "a/1.png",
    ),
    "a zip in the zip": (lambda: zipped({**GOOD, "a/2.zip": zipped(GOOD)}), "dataset_bad_image", "a/2.zip"),
    "a text": (lambda: zipped({**GOOD, "a/readme.txt": b"hello"}), "dataset_bad_image", "a/readme.txt"),
    "a program as a png": (lambda: zipped({**GOOD, "a/2.png": b"#!/bin/sh"}), "dataset_bad_image", "a/2.png"),
    "a GIF": (lambda: zipped({**GOOD, "a/2.gif": picture(format="GIF", mode="P")}), "dataset_bad_image", "a/2.gif"),
    "a truncated image": (lambda: zipped({**GOOD, "a/2.png": picture()[:-40]}), "dataset_bad_image", "a/2.png"),
    "a truncated JPEG": (
        lambda: zipped({**GOOD, "a/2.jpg": picture(size=(64, 64), format="JPEG")[:-900]}), "dataset_bad_image",
        "a/2.jpg",
    ),
    "an animation": (lambda: zipped({"a/1.png": animated()}), "dataset_bad_image", "animated"),
    "sixteen bits": (lambda: zipped({"a/1.png": deep()}), "dataset_bad_image", "mode I;16"),
    "a bomb": (lambda: zipped({"a/1.png": declared(16000, 16000)}), "dataset_image_too_large", "a/1.png"),
    "a smaller bomb": (
        lambda: zipped({"a/1.png": declared(8000, 8000)}), "dataset_image_too_large", "8000 x 8000",
    ),
    "a wide bomb": (lambda: zipped({"a/1.png": declared(60000, 1)}), "dataset_image_too_large", "60000 x 1"),
    "many bombs": (
        lambda: zipped({f"a/{i}.png": declared(5000, 5000) for i in range(12)}), "dataset_too_large_unpacked", "times",
    ),
    "a deflate bomb": (
        lambda: zipped({"a/1.png": bytes(33 * 2**20)}, zipfile.ZIP_DEFLATED), "dataset_image_too_large", "bytes",
    ),
    "many small deflate bombs": (
        lambda: zipped({f"a/{i}.png": bytes(30 * 2**20) for i in range(9)}, zipfile.ZIP_DEFLATED),
        "dataset_too_large_unpacked", "times",
    ),
    "scans without end": (lambda: zipped({"a/1.jpg": scans(200)}), "dataset_bad_image", "scans"),
    "runs without end": (lambda: zipped({"a/1.bmp": run_lengths()}), "dataset_bad_image", "run-length"),
    "another file before it": (lambda: moved(zipped(GOOD), b"%PDF-1.7\n"), "dataset_not_zip", "before the first"),
    "another file between": (
        lambda: moved(zipped({"a/1.png": picture()}), b"").replace(b"PK\x01\x02", b"hidden\0\0PK\x01\x02", 1)[:-6]
        + struct.pack("<LH", zipped(GOOD).index(b"PK\x01\x02") + 8, 0), "dataset_not_zip", "unexpected bytes",
    ),
    "more than declared": (lying, "dataset_corrupt", "a/1.bmp"),
    "no folder": (lambda: zipped({"1.png": picture()}), "dataset_bad_folders", "1.png"),
    "a folder in a class": (lambda: zipped({**GOOD, "a/b/1.png": picture()}), "dataset_bad_folders", "a/b/1.png"),
    "folders too deep": (
        lambda: zipped({"a/b/c/1.png": picture(), "d/b/c/1.png": picture()}), "dataset_bad_folders", "a/b/c",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_zip_is_refused_with_the_name(name: str, tmp_path: Path) -> None:
    make, code, words = CASES[name]
    path = tmp_path / "data.zip"
    path.write_bytes(make())
    with pytest.raises(DatasetRejected) as caught:
        check_dataset(path, "images")
    assert caught.value.code == code, caught.value.detail
    assert words in caught.value.detail
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.zip"]

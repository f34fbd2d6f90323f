"""Reading zips of images from strangers: one folder per class, or train/ and test/ with one folder per class in each.

Nothing is unpacked to disk but pixels: members are read one by one into memory, decoded by Pillow, and the pixels are
written to one file that is mapped. Names of members are never used as paths.
"""

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from worker.engine.errors import DatasetRejected, RecipeRefused
from worker.engine.training.columns import Column, check_unpacked_size, checked_size, scratch_file, write_once
from worker.engine.training.rows import Rows
from worker.engine.training.stored import Part, unpack
from worker.engine.training.zip_directory import ZipKind, read_parts

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_IMAGES = 500_000
MAX_IMAGE_BYTES = 32 * 1024**2
MAX_PIXELS = 32 * 1024**2
MAX_SIDE = 16384
MAX_CLASSES = 10_000
MAX_SCANS = 100
"""Of a progressive JPEG. Cameras and libraries write about ten."""
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}
"""Names of top folders that hold parts of the data, not classes (in lower case)."""
BMP_RUNS = (1, 2)
"""Pillow decodes these in Python, step by step, and a step may be for nothing."""
GRAY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

ZIP = ZipKind(
    expected="a .zip file with one folder of images per class",
    code="dataset_not_zip",
    members="files",
    max_members=MAX_IMAGES,
    max_directory_bytes=128 * 1024**2,
    too_many_code="dataset_too_many_images",
    too_many_fix="Upload a part of the images.",
)
_LEFT_OUT = re.compile(r"(.*/)?(\.DS_Store|Thumbs\.db|desktop\.ini)|__MACOSX/.*|.*/")
"""What archivers add, and folders."""


class Member(NamedTuple):
    """One image of the zip."""

    part: Part
    split: str
    label: str


@dataclass(frozen=True)
class ImageColumn(Column):
    """The pixels: rows of [height, width, channels], uint8."""

    members: tuple[Member, ...]
    resize: tuple[int, int] | None = None

    def check(self, path: Path) -> None:
        """Decode every image wholly."""
        for _ in _open_images(path, self.members, decode=True):
            pass

    def open_rows(self, path: Path, directory: Path) -> Rows:
        """Read the pixels, decoded once, image by image."""
        shape = tuple(size for size in self.shape if isinstance(size, int))
        assert len(shape) == 4, "images that differ in size are resized"
        file = scratch_file(path, directory, "images", *shape[1:])
        write_once(file, (self._pixels(image) for image in _open_images(path, self.members, decode=True)))
        return Rows(file, np.dtype(np.uint8), shape)

    def resized(self, size: tuple[int, int]) -> "ImageColumn":
        """Return the same images scaled until they just cover `size` (height, width), the middle cut out."""
        shape = (self.num_rows, *size, self.shape[3])
        checked_size(self.name, np.dtype(np.uint8), tuple(int(axis) for axis in shape))
        return ImageColumn(self.name, self.dtype, shape, self.members, size)

    def _pixels(self, image: Image.Image) -> bytes:
        image = image.convert("L" if self.shape[3] == 1 else "RGB")
        return (image if self.resize is None else _cover(image, *self.resize)).tobytes()


@dataclass(frozen=True)
class LabelColumn(Column):
    """The class of every image, as a number."""

    names: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The folders' names, sorted."""
        return self.names

    def check(self, path: Path) -> None:
        """Nothing: it is known from the names of the folders."""

    def open_rows(self, path: Path, directory: Path) -> Rows:
        """Read the numbers."""
        numbers = {name: number for number, name in enumerate(self.names)}
        file = scratch_file(path, directory, "labels")
        write_once(file, [np.array([numbers[member.label] for member in self.members], np.int64).tobytes()])
        return Rows(file, np.dtype(np.int64), (self.num_rows,))


@dataclass(frozen=True)
class SplitColumn(Column):
    """The top folder of every image."""

    members: tuple[Member, ...]

    def check(self, path: Path) -> None:
        """Nothing: it is known from the names of the folders."""

    def open_rows(self, path: Path, directory: Path) -> Rows:  # noqa: ARG002
        """There are no numbers."""
        raise AssertionError("the split is text")

    def read_texts(self, path: Path) -> Iterator[list[str]]:  # noqa: ARG002
        """Yield all at once; they are few and short."""
        yield [member.split for member in self.members]


def read_images(path: Path) -> list[Column]:
    """Return the columns `image`, `label` and, with train/ and test/ folders, `split`, after reading every header."""
    with path.open("rb") as file:
        parts = read_parts(ZIP, file)
        file_bytes = file.seek(0, 2)
    members = tuple(sorted(_place(parts), key=lambda member: (member.split, member.label, member.part.name)))
    # An image is compressed already: what deflates well is no image, and reading it takes long.
    check_unpacked_size(sum(member.part.size for member in members), file_bytes, "Upload plain image files.")
    names = tuple(sorted({member.label for member in members}))
    if len(names) > MAX_CLASSES:
        raise DatasetRejected(
            f"the zip has {len(names)} folders of images; at most {MAX_CLASSES} classes are accepted",
            code="dataset_too_many_classes",
            fix="Put the images of one class into one folder.",
        )
    sizes, gray, pixels = set(), True, 0
    for image in _open_images(path, members, decode=False):
        sizes.add((image.height, image.width))
        gray = gray and image.mode in GRAY
        pixels += image.height * image.width
    channels = 1 if gray else 3
    check_unpacked_size(pixels * channels, file_bytes, "Upload smaller images.")
    size: tuple[int | str, int | str] = next(iter(sizes)) if len(sizes) == 1 else ("height", "width")
    num_rows = len(members)
    if all(isinstance(axis, int) for axis in size):
        checked_size("image", np.dtype(np.uint8), (num_rows, *(int(axis) for axis in size), channels))
    columns: list[Column] = [
        ImageColumn("image", np.dtype(np.uint8), (num_rows, *size, channels), members),
        LabelColumn("label", np.dtype(np.int64), (num_rows,), names, members),
    ]
    if members[0].split:
        columns.append(SplitColumn("split", None, (num_rows,), members))
    return columns


def _place(parts: list[Part]) -> list[Member]:
    """Find the class and the split of every member from the folders it lies in."""
    paths: list[tuple[Part, list[str]]] = []
    seen: set[str] = set()
    for part in parts:
        name = part.name
        folders = name.removesuffix("/").split("/")
        if not name.isprintable() or "\\" in name or ":" in name or any(word in ("", ".", "..") for word in folders):
            raise DatasetRejected(
                f"the zip has a member {name[:200]!r}, which is no plain relative path", code="dataset_bad_name"
            )
        if max(map(len, folders)) > 200:
            raise DatasetRejected(f"the name {name[:80]!r}... is longer than 200 characters", code="dataset_bad_name")
        if name in seen:
            raise DatasetRejected(f"the zip has two members {name[:200]!r}", code="dataset_duplicate_image")
        seen.add(name)
        if not _LEFT_OUT.fullmatch(name):
            paths.append((part, folders))
    if not paths:
        raise DatasetRejected("the zip holds no images", code="dataset_empty")
    depth = len(paths[0][1])
    if depth > 2 and paths[0][1][0].lower() not in SPLITS and len({folders[0] for _, folders in paths}) == 1:
        paths = [(part, folders[1:]) for part, folders in paths]  # one folder around everything
        depth -= 1
    for part, folders in paths:
        splits = len(folders) == 3 and folders[0].lower() in SPLITS
        if len(folders) != depth or not (len(folders) == 2 or splits):
            raise DatasetRejected(
                f"{part.name[:200]!r} lies neither in CLASS/ nor in SPLIT/CLASS/ like the others",
                code="dataset_bad_folders",
                fix="Put every image into one folder per class, either all directly, or all below train/ and test/.",
            )
    return [Member(part, folders[0] if depth == 3 else "", folders[-2]) for part, folders in paths]


def _open_images(path: Path, members: tuple[Member, ...], *, decode: bool) -> Iterator[Image.Image]:
    """Yield the images one by one: their headers only, or decoded."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for member in members:
            yield _open_image(file, member.part, decode)


def _open_image(file: BinaryIO, part: Part, decode: bool) -> Image.Image:
    shown = part.name[-200:]
    if part.size > MAX_IMAGE_BYTES:
        raise DatasetRejected(
            f"{shown!r} has {part.size} bytes; at most {MAX_IMAGE_BYTES} are accepted",
            code="dataset_image_too_large",
            fix="Scale the image down.",
        )
    data = b"".join(unpack(file, part))
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:
        raise _bad_image(shown, f"it has more than {MAX_SCANS} scans, each of which is decoded over all pixels")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DatasetRejected(
            f"{shown!r} is too large: {error}"[:400], code="dataset_image_too_large", fix="Scale the image down."
        ) from error
    except Exception as error:  # Pillow raises whatever its decoders meet
        raise _bad_image(shown, f"it is no {', '.join(FORMATS)} image") from error
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS or min(image.size) < 1:
        raise DatasetRejected(
            f"{shown!r} has {image.width} x {image.height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all",
            code="dataset_image_too_large",
            fix="Scale the image down.",
        )
    if image.mode not in GRAY | COLOUR:
        raise _bad_image(shown, f"pixels of mode {image.mode} are no 8-bit gray or colour")
    if image.info.get("compression") in BMP_RUNS:
        raise _bad_image(shown, "its pixels are run-length encoded")
    if image.format != "JPEG" and getattr(image, "n_frames", 1) > 1:
        raise _bad_image(shown, "it is animated")
    if decode:
        try:
            image.load()
        except Exception as error:
            raise _bad_image(shown, f"it is truncated or damaged ({str(error)[:100]})") from error
    return image


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    large = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if large[0] * large[1] > MAX_PIXELS:
        raise RecipeRefused(
            f"an image of {image.width} x {image.height} pixels, scaled to cover {width} x {height}, would have "
            f"{large[0]} x {large[1]}; at most {MAX_PIXELS} pixels",
            code="resize_too_large",
            fix="Leave out images that are so narrow, or choose a smaller resize.",
        )
    image = image.resize(large, Image.Resampling.BILINEAR)
    left, top = (large[0] - width) // 2, (large[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _bad_image(name: str, what: str) -> DatasetRejected:
    return DatasetRejected(
        f"{name!r} is not an image that can be read: {what}",
        code="dataset_bad_image",
        fix="Remove or repair the file; accepted are PNG, JPEG, WebP and BMP.",
    )

"""Architectures of the catalogue: the programs that a plain state dict can be given, with parameters and bounds."""

import difflib
import re
from dataclasses import dataclass

_TEXT = re.compile(r"[a-z0-9_]{1,40}(:[a-z0-9_=.,]{1,300})?")
MAX_TEXT = 300


@dataclass(frozen=True)
class Parameter:
    """One parameter of an architecture."""

    description: str
    default: int | float | None
    """None: read from the weights."""
    low: float = 1
    high: float = 65_536

    @property
    def kind(self) -> str:
        """The JSON type of its values."""
        return "number" if isinstance(self.default, float) else "integer"


@dataclass(frozen=True)
class Architecture:
    """A program of the catalogue."""

    name: str
    summary: str
    names: str
    """Whose parameter names it uses."""
    parameters: dict[str, Parameter]


class UnknownArchitecture(ValueError):
    """The text names no architecture, or gives it parameters that it does not take."""


_CLASSES = Parameter("Number of classes; read from the last layer's weights.", None, 1, 1_000_000)
_CHANNELS = Parameter("Channels of the images; read from the first layer's weights.", None, 1, 64)


def _image_size(default: int) -> Parameter:
    return Parameter("Height and width of the images in pixels.", default, 8, 2048)


def _images(default: int) -> dict[str, Parameter]:
    return {"num_classes": _CLASSES, "channels": _CHANNELS, "image_size": _image_size(default)}


_HEADS = Parameter(
    "Attention heads. Nothing in the weights tells; without it, one for every 64 of the width.", None, 1, 1024
)
_WIDTH = Parameter("Size of the vectors between the blocks; read from the weights.", None, 1, 16_384)
_DEPTH = Parameter("Number of blocks; read from the weights.", None, 1, 256)
_VOCABULARY = Parameter("Number of tokens; read from the weights.", None, 1, 2_000_000)
_CONTEXT = Parameter("Longest sequence in tokens; read from the position embeddings.", None, 1, 1_000_000)


def _cifar(depth: int) -> Architecture:
    return Architecture(
        f"resnet{depth}",
        f"ResNet-{depth} for small images (He et al. 2015, section 4.2): 3x3 stem, widths 16, 32, 64.",
        "akamaster/pytorch_resnet_cifar10 and chenyaofo/pytorch-cifar-models. Shortcuts without weights (option A) or "
        "projections (option B), whichever the weights have",
        _images(32),
    )


def _imagenet(depth: int) -> Architecture:
    return Architecture(
        f"resnet{depth}",
        f"ResNet-{depth} for large images (He et al. 2015): 7x7 stem, max pooling.",
        f"torchvision resnet{depth}",
        _images(224),
    )


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        *(_cifar(depth) for depth in (20, 32, 44, 56, 110)),
        *(_imagenet(depth) for depth in (18, 34, 50, 101, 152)),
        Architecture(
            "mobilenet_v2",
            "MobileNetV2 (Sandler et al. 2018).",
            "torchvision mobilenet_v2",
            {
                **_images(224),
                "width": Parameter("Width multiplier; channels are rounded to multiples of 8.", 1.0, 0.1, 4),
            },
        ),
        Architecture(
            "vit",
            "Vision Transformer (Dosovitskiy et al. 2020) with a class token.",
            "timm VisionTransformer (vit_*, deit_*) and torchvision vit_b_16, vit_b_32, vit_l_16, ...",
            {
                "num_classes": _CLASSES,
                "channels": _CHANNELS,
                "image_size": Parameter("Height and width; read from the position embeddings.", None, 8, 2048),
                "patch": Parameter("Height and width of a patch; read from the weights.", None, 1, 256),
                "width": _WIDTH,
                "depth": _DEPTH,
                "heads": _HEADS,
            },
        ),
        Architecture(
            "bert",
            "BERT encoder (Devlin et al. 2018), with a classifier where the weights have one.",
            "transformers BertModel and BertForSequenceClassification",
            {
                "num_classes": Parameter(
                    "Classes of the classifier; read from the weights, 0: none.", None, 0, 1_000_000
                ),
                "vocabulary": _VOCABULARY,
                "context": _CONTEXT,
                "width": _WIDTH,
                "depth": _DEPTH,
                "heads": _HEADS,
            },
        ),
        Architecture(
            "gpt",
            "GPT decoder with learned positions and a tied output layer (Radford et al. 2019).",
            "karpathy/nanoGPT",
            {"vocabulary": _VOCABULARY, "context": _CONTEXT, "width": _WIDTH, "depth": _DEPTH, "heads": _HEADS},
        ),
    )
}
"""Name -> architecture."""


def parse_architecture(text: str) -> tuple[Architecture, dict[str, int | float]]:
    """Return the architecture and the parameters that a text like "vit:heads=6,image_size=32" names.

    Raises UnknownArchitecture, which says what is wrong and what there is instead.
    """
    if len(text) > MAX_TEXT or not _TEXT.fullmatch(text):
        raise UnknownArchitecture(
            f"{text[:60]!r} is not an architecture: write a name, or name:parameter=number,parameter=number"
        )
    name, _, tail = text.partition(":")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnknownArchitecture(
            f"there is no architecture {name!r}{_suggest(name, ARCHITECTURES)}; known are {', '.join(ARCHITECTURES)}"
        )
    values: dict[str, int | float] = {}
    for part in tail.split(",") if tail else ():
        key, equals, value = part.partition("=")
        parameter = architecture.parameters.get(key)
        if parameter is None or not equals:
            raise UnknownArchitecture(
                f"{name} has no parameter {key!r}{_suggest(key, architecture.parameters)}; "
                f"it takes {', '.join(architecture.parameters)}"
            )
        if key in values:
            raise UnknownArchitecture(f"{name}: {key} is given twice")
        values[key] = _read(name, key, value, parameter)
    return architecture, values


def _read(name: str, key: str, value: str, parameter: Parameter) -> int | float:
    pattern = r"[0-9]{1,9}(\.[0-9]{1,6})?" if parameter.kind == "number" else r"[0-9]{1,9}"
    number = float(value) if re.fullmatch(pattern, value) else None
    if number is None or not parameter.low <= number <= parameter.high:
        raise UnknownArchitecture(
            f"{name}: {key}={value} is not {'a number' if parameter.kind == 'number' else 'an integer'} "
            f"from {parameter.low:g} to {parameter.high:g}"
        )
    return number if parameter.kind == "number" else int(number)


def _suggest(word: str, known: dict[str, Architecture] | dict[str, Parameter]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""

"""Convolutional networks of the catalogue: ResNets for small and large images, MobileNetV2."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.catalogue.entry import Entry, Shapes, Values, read_sizes


def image_inputs(values: Values) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Return an example batch of images, (2, channels, image_size, image_size)."""
    side = int(values["image_size"])
    return {"image": torch.zeros(2, int(values["channels"]), side, side)}, {}


class PaddedShortcut(nn.Module):
    """Shortcut without weights (option A): every second pixel, new channels filled with zeros."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.before, self.after = (num_out - num_in) // 2, num_out - num_in - (num_out - num_in) // 2

    def forward(self, image: Tensor) -> Tensor:
        """Return (batch, num_out, height / 2, width / 2)."""
        return functional.pad(image[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def _projection(num_in: int, num_out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, num_in: int, width: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(num_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's images."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the middle, as in torchvision."""

    expansion = 4

    def __init__(self, num_in: int, width: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's images."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


def _stage(block: type[Any], num_in: int, width: int, depth: int, stride: int, *, padded: bool) -> nn.Sequential:
    blocks = []
    for index in range(depth):
        step = stride if index == 0 else 1
        num_out = width * block.expansion
        shortcut: nn.Module | None = None
        if step != 1 or num_in != num_out:
            shortcut = PaddedShortcut(num_in, num_out) if padded else _projection(num_in, num_out, step)
        blocks.append(block(num_in, width, step, shortcut))
        num_in = num_out
    return nn.Sequential(*blocks)


class SmallResNet(nn.Module):
    """ResNet for 32x32 images: depth = 6n + 2."""

    def __init__(self, depth: int, num_classes: int, channels: int, *, padded: bool) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(BasicBlock, 16, 16, blocks, 1, padded=padded)
        self.layer2 = _stage(BasicBlock, 16, 32, blocks, 2, padded=padded)
        self.layer3 = _stage(BasicBlock, 32, 64, blocks, 2, padded=padded)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return {"logits": self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))}


class LargeResNet(nn.Module):
    """ResNet for 224x224 images."""

    def __init__(self, block: type[Any], depths: tuple[int, ...], num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        num_in = 64
        stages = []
        for index, depth in enumerate(depths):
            width = 64 * 2**index
            stages.append(_stage(block, num_in, width, depth, 1 if index == 0 else 2, padded=False))
            num_in = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return {"logits": self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))}


def _infer_resnet(shapes: Shapes) -> Values:
    return read_sizes(shapes, {"num_classes": ("fc.weight", 0), "channels": ("conv1.weight", 1)})


def _rename_resnet(name: str) -> str:
    # akamaster calls the classifier linear and the projection shortcut.
    return name.replace("linear.", "fc.") if name.startswith("linear.") else name.replace(".shortcut.", ".downsample.")


def small_resnet(depth: int) -> Entry:
    """Return ResNet-20, 32, 44, 56 or 110 for small images."""

    def build(values: Values, shapes: Shapes) -> nn.Module:
        padded = not any(".downsample." in name for name in shapes)
        return SmallResNet(depth, int(values["num_classes"]), int(values["channels"]), padded=padded)

    return Entry(_infer_resnet, build, image_inputs, _rename_resnet)


_LARGE: dict[int, tuple[type[Any], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)), 152: (Bottleneck, (3, 8, 36, 3)),
}  # fmt: skip


def large_resnet(depth: int) -> Entry:
    """Return ResNet-18, 34, 50, 101 or 152 for large images."""

    def build(values: Values, _shapes: Shapes) -> nn.Module:
        return LargeResNet(*_LARGE[depth], int(values["num_classes"]), int(values["channels"]))

    return Entry(_infer_resnet, build, image_inputs)


def _round(channels: float) -> int:
    # To a multiple of 8, never losing more than a tenth.
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _convolution(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter each channel with 3x3, project with 1x1."""

    def __init__(self, num_in: int, num_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = num_in * expand
        self.residual = stride == 1 and num_in == num_out
        first = [_convolution(num_in, hidden, 1)] if expand != 1 else []
        self.conv = nn.Sequential(
            *first,
            _convolution(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, num_out, 1, bias=False),
            nn.BatchNorm2d(num_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's images."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 with a width multiplier."""

    def __init__(self, num_classes: int, channels: int, width: float) -> None:
        super().__init__()
        num_in, last = _round(32 * width), _round(1280 * max(1.0, width))
        layers: list[nn.Module] = [_convolution(channels, num_in, 3, 2)]
        for expand, size, repeats, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(repeats):
                layers.append(InvertedResidual(num_in, _round(size * width), stride if index == 0 else 1, expand))
                num_in = _round(size * width)
        self.features = nn.Sequential(*layers, _convolution(num_in, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, classes)."""
        x = functional.adaptive_avg_pool2d(self.features(image), 1).flatten(1)
        return {"logits": self.classifier(x)}


def mobilenet_v2() -> Entry:
    """Return MobileNetV2."""
    places = {"num_classes": ("classifier.1.weight", 0), "channels": ("features.0.0.weight", 1)}

    def build(values: Values, _shapes: Shapes) -> nn.Module:
        return MobileNetV2(int(values["num_classes"]), int(values["channels"]), float(values["width"]))

    return Entry(lambda shapes: read_sizes(shapes, places), build, image_inputs)

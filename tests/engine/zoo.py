"""Small models of every family Pare must handle, with seeded random weights, and their exported files."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

torch.set_num_threads(1)
torch.backends.mha.set_fastpath_enabled(False)  # other kernels, other last digits


class Cnn(nn.Module):
    """A plain CNN with a buffer, batch norm and dropout."""

    mean: Tensor

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.2)
        self.fc1 = nn.Linear(8 * width, 32)
        self.fc2 = nn.Linear(32, num_classes)
        self.register_buffer("mean", torch.tensor(0.1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image - self.mean)
        x = x.view(x.size(0), -1)
        return self.fc2(functional.relu(self.fc1(self.dropout(x))))


class Mlp(nn.Module):
    """Linear layers, layer norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class BasicBlock(nn.Module):
    """Two convolutions with a parameter-free shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return functional.relu(out)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths, blocks, num_in = (16, 32, 64), [], 16
        for stage, width in enumerate(widths):
            for index in range(3):
                blocks.append(BasicBlock(num_in, width, 2 if stage and not index else 1))
                num_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        x = functional.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self, num_in: int, num_out: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden = num_in * expand
        self.residual = stride == 1 and num_in == num_out
        self.conv = nn.Sequential(
            nn.Conv2d(num_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True), nn.Conv2d(hidden, num_out, 1, bias=False), nn.BatchNorm2d(num_out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """Depthwise separable convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 1), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean([2, 3]))


class UNet(nn.Module):
    """Down, up, skip connections; transposed convolution and interpolation."""

    def __init__(self) -> None:
        super().__init__()

        def double(num_in: int, num_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(num_in, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.LeakyReLU(0.1),
                nn.Conv2d(num_out, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(),
            )  # fmt: skip

        self.down1, self.down2, self.middle = double(1, 8), double(8, 16), double(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge2, self.merge1 = double(32, 16), double(24, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        middle = self.middle(functional.max_pool2d(two, 2))
        y = self.merge2(torch.cat([self.up2(middle), two], 1))
        y = functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(self.merge1(torch.cat([y, one], 1)))


class Recurrent(nn.Module):
    """A sequence classifier: embedding, LSTM or GRU, last state."""

    def __init__(self, kind: str, *, bidirectional: bool = False, num_layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12, padding_idx=0)
        make = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.rnn = make(12, 16, num_layers=num_layers, batch_first=True, bidirectional=bidirectional,
                        dropout=0.1 if num_layers > 1 else 0.0)  # fmt: skip
        self.head = nn.Linear(32 if bidirectional else 16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embedding(tokens))
        return self.head(out[:, -1])


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection."""

    def __init__(self, width: int, num_heads: int, *, causal: bool, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.causal, self.dropout = num_heads, causal, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, num_heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Gpt(nn.Module):
    """A decoder with tied input and output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(64, 32), nn.Embedding(32, 32)
        self.blocks = nn.ModuleList([Block(32, 4, causal=True), Block(32, 4, causal=True)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """torch's own transformer, its encoder and its decoder: nn.MultiheadAttention holds the weights of its first
    projection itself, and cuts them where queries and keys are of two origins."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return self.head(self.decoder(x, self.blocks(x)).mean(1))


class TwoTower(nn.Module):
    """Several inputs and outputs, named; a shared layer called twice; a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, first: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Any]:
        a, b = torch.tanh(self.shared(first)), torch.tanh(self.shared(pair[0]))
        return {"score": self.left(a * b) * scale, "parts": (self.right(a), pair[1] + 1)}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to make it and its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    keywords: Callable[[int], dict[str, Any]] = field(default=lambda _batch: {})
    dynamic: Callable[[Any], Any] = field(default=lambda batch: ({0: batch},))
    """Batch dimension -> dynamic_shapes."""


def _images(channels: int, size: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _tokens(vocabulary: int, length: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randint(1, vocabulary, (batch, length)),)


ZOO: dict[str, Entry] = {
    "mlp": Entry(Mlp, lambda batch: (torch.randn(batch, 16),)),
    "cnn": Entry(Cnn, _images(1, 8)),
    "resnet20": Entry(ResNet20, _images(3, 32)),
    "mobilenet": Entry(MobileNet, _images(3, 16)),
    "unet": Entry(UNet, _images(1, 16)),
    "lstm": Entry(lambda: Recurrent("lstm"), _tokens(50, 7)),
    "lstm_deep": Entry(lambda: Recurrent("lstm", bidirectional=True, num_layers=2), _tokens(50, 7)),
    "gru": Entry(lambda: Recurrent("gru"), _tokens(50, 7)),
    "gru_deep": Entry(lambda: Recurrent("gru", bidirectional=True, num_layers=2), _tokens(50, 7)),
    "vit": Entry(VisionTransformer, _images(3, 16)),
    "gpt": Entry(Gpt, _tokens(64, 9)),
    "encoder_decoder": Entry(EncoderDecoder, _tokens(50, 7)),
    "two_tower": Entry(
        TwoTower,
        lambda batch: (torch.randn(batch, 8), (torch.randn(batch, 8), torch.randn(batch, 2))),
        lambda batch: {"scale": torch.randn(batch, 1)},
        lambda batch: {"first": {0: batch}, "pair": ({0: batch}, {0: batch}), "scale": {0: batch}},
    ),
}


def make_model(name: str, *, seed: int = 0) -> nn.Module:
    """Return a model of the zoo with seeded weights and non-trivial running statistics, in eval mode."""
    torch.manual_seed(seed)
    entry = ZOO[name]
    model = entry.make().train()
    with torch.no_grad():
        model(*entry.inputs(8), **entry.keywords(8))
    return model.eval()


def export_model(
    name: str, path: Path, *, dynamic: bool = True, training: bool = False, batch_size: int = 4, seed: int = 0
) -> nn.Module:
    """Export a model of the zoo to `path` and return it, in eval mode."""
    model = make_model(name, seed=seed).train(training)
    entry = ZOO[name]
    shapes = entry.dynamic(Dim("rows", min=1, max=4096)) if dynamic else None
    with warnings.catch_warnings():
        # torch's exporter complains about the second list of weights that nn.LSTM and nn.GRU keep.
        warnings.filterwarnings("ignore", message="The tensor attributes .* were assigned during export")
        program = torch.export.export(
            model, entry.inputs(batch_size), entry.keywords(batch_size), dynamic_shapes=shapes
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, os.fspath(path))
    return model.eval()

"""The demonstration's data and model: handwritten digits and a small convolutional network trained on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

EPOCHS = 4
BATCH_SIZE = 64
NUM_THREADS = 2


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) from 0 to 1 with their digits; the held-out ones are never trained on."""

    training_images: Tensor
    training_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def save_held_out(self, path: Path) -> Path:
        """Write the held-out part for a program that knows nothing of Pare."""
        numpy.savez(path, images=self.held_out_images.numpy(), labels=self.held_out_labels.numpy())
        return path


class DigitsCNN(nn.Module):
    """Four convolutions with batch norm, one pooling, one linear layer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            *_convolution(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return ten scores for each image."""
        scores: Tensor = self.classifier(self.features(image))
        return scores


def load_digits_split() -> Digits:
    """Return the 1797 digits that come with scikit-learn: three quarters to train on, one quarter held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    scaled = (images.reshape(-1, 1, 8, 8) / 16.0).astype(numpy.float32)
    parts: list[Any] = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return Digits(*(torch.from_numpy(numpy.ascontiguousarray(parts[index])) for index in (0, 2, 1, 3)))


def train_cnn(digits: Digits, on_epoch: Callable[[int, int, float], None], seed: int = 0) -> DigitsCNN:
    """Train the network on the training part."""
    torch.manual_seed(seed)
    torch.set_num_threads(NUM_THREADS)
    model = DigitsCNN()
    steps = -(-len(digits.training_labels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=EPOCHS * steps)
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for batch in torch.randperm(len(digits.training_labels)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(digits.training_images[batch]), digits.training_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        on_epoch(epoch, EPOCHS, total / steps)
    return model.eval()


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

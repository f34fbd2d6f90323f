"""A small CNN and a small transformer, trained for a moment on scikit-learn's handwritten digits, and their data."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tests.engine.process import digest

DATASET_ID = "dst_" + "d" * 26


class Convolutions(nn.Module):
    """Two convolutions with batch norm, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.hidden = nn.Linear(64 * 4, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.max_pool2d(self.first(image), 2)
        x = functional.max_pool2d(self.second(x), 2)
        logits: Tensor = self.classifier(functional.relu(self.hidden(x.flatten(1))))
        return logits


class Rows(nn.Module):
    """A transformer of one block that reads a digit as eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image.flatten(1, 2))
        y = self.norm(x)
        query, key, value = (
            part(y).unflatten(-1, (2, 16)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + attended.transpose(1, 2).flatten(2)
        x = x + self.down(functional.gelu(self.up(x)))
        logits: Tensor = self.classifier(x.mean(1))
        return logits


@dataclass(frozen=True)
class Uploads:
    """What a user would upload, and how a plan names it."""

    model: Path
    data: Path

    @property
    def files(self) -> dict[str, Path]:
        """Name in DIR/in -> file."""
        return {"model.pt2": self.model, "data.npz": self.data}

    def fields(self, steps: list[dict[str, Any]], *, with_data: bool = True, **recipe: Any) -> dict[str, Any]:
        """Return the fields of an `optimize` plan."""
        bound = {
            "dataset_id": DATASET_ID,
            "inputs": {"image": {"column": "image", "scale": 1 / 16}},
            "label_column": "label",
            "task": "classification",
        }
        data = {"id": DATASET_ID, "file": "data.npz", "format": "npz", "sha256": digest(self.data)}
        return {
            "model": {"file": "model.pt2", "format": "pt2", "sha256": digest(self.model)},
            "datasets": [data] if with_data else [],
            "recipe": {"steps": steps, **({"data": bound} if with_data else {}), **recipe},
            "isolation": ["none"],
        }


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images (1797, 1, 8, 8), 0 to 16, and their labels, from scikit-learn's file: to import scikit-learn
    takes a second, and SciPy, which a machine with a GPU may not have."""
    found = find_spec("sklearn")
    assert found is not None, "scikit-learn is not installed"
    assert found.submodule_search_locations is not None
    table = np.loadtxt(
        Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.uint8
    )
    return table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)


def make_uploads(module: nn.Module, directory: Path, *, epochs: int = 3, fixed_batch: int | None = None) -> Uploads:
    """Train the module, export it, and write the data as .npz."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = read_digits()
    data = directory / "data.npz"
    np.savez(data, image=images, label=labels)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    module.eval()
    shapes = None if fixed_batch else ({0: torch.export.Dim("batch")},)
    model = directory / "model.pt2"
    torch.export.save(torch.export.export(module, (x[: fixed_batch or 2],), dynamic_shapes=shapes), model)
    return Uploads(model, data)

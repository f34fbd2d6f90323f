"""Makes the files that examples/curl.sh uploads: model.pt2, data.npz and held_out.npz in DIRECTORY.

Any program that calls torch.export.save and numpy.savez does.
"""

import sys
from pathlib import Path

import numpy
import torch
from sklearn.datasets import load_digits
from torch import nn

directory = Path(sys.argv[1])
directory.mkdir(parents=True, exist_ok=True)
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
numpy.savez(directory / "data.npz", pixels=images[:1400], label=labels[:1400])
numpy.savez(directory / "held_out.npz", pixels=images[1400:], label=labels[1400:])

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
optimizer = torch.optim.AdamW(module.parameters())
for _ in range(40):
    loss = nn.functional.cross_entropy(module(torch.from_numpy(images[:1400])), torch.from_numpy(labels[:1400]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

batch = torch.export.Dim("batch")
program = torch.export.export(module.eval(), (torch.rand(2, 64),), dynamic_shapes=({0: batch},))
torch.export.save(program, directory / "model.pt2")

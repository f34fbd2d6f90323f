"""Your own nn.Module made smaller and faster, in under ten lines. Needs a running service: `make serve`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pare

# Stands for what you already have: a trained module and its data.
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
optimizer = torch.optim.AdamW(module.parameters())
for _ in range(40):
    loss = nn.functional.cross_entropy(module(torch.from_numpy(images[:1400])), torch.from_numpy(labels[:1400]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# The part with Pare.
result = pare.Client().optimize(
    module,
    torch.rand(1, 64),
    data={"pixels": images[:1400], "label": labels[:1400]},
    evaluation_data={"pixels": images[1400:], "label": labels[1400:]},
    task="classification",
    recipe=["prune_structured", "finetune", "quantize_int8"],
)
print(result.table())
predict = result.load()
print(predict({"input": images[1400:1410]})["output_0"].argmax(axis=1), "should be", labels[1400:1410])

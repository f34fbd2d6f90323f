"""Models with what few models have, and plans stumble over."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Odd(nn.Module):
    """Nearly all of it in one: a scalar and a single slope amid a feed-forward layer, an int16 buffer, a layer in
    double precision, a tensor that is written piece by piece, first and last an output that the loss does not look at.
    """

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 8), nn.Linear(16, 3)
        self.early, self.late = nn.Linear(16, 5), nn.Linear(8, 5)
        self.up, self.bend, self.down = nn.Linear(8, 12), nn.PReLU(), nn.Linear(12, 8)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.exact = nn.Linear(8, 8).double()
        self.register_buffer("places", torch.arange(8, dtype=torch.int16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        early, table = self.early(x), torch.zeros(x.shape[0], 16)
        y = torch.relu(self.enter(x))
        table[:, :8] = y
        y = y + self.down(self.bend(self.up(y)) * self.gain) + self.places * 0.1
        table[:, 8:] = self.exact(y.double()).float()
        return self.leave(table), early, self.late(y)


class NormedHeads(nn.Module):
    """Attention with fewer keys than queries, whose heads are normalized with weights that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(20, 16), nn.RMSNorm(16), nn.Linear(16, 3)
        self.query, self.key, self.value = (nn.Linear(16, size, bias=False) for size in (16, 8, 8))
        self.query_norm, self.key_norm, self.out = nn.RMSNorm(4), nn.RMSNorm(4), nn.Linear(16, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens))
        rows, length, _ = x.shape
        q, k, v = (each(x).view(rows, length, -1, 4) for each in (self.query, self.key, self.value))
        q, k, v = (each.transpose(1, 2) for each in (self.query_norm(q), self.key_norm(k), v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, 16))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Centered(nn.Module):
    """Hidden channels that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        result: Tensor = self.down(y - y.mean(-1, keepdim=True))
        return result


class Joined(nn.Module):
    """Hidden channels that are read together with others, which no rank has a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.cat([torch.relu(self.up(x)), x], 1))
        return result


class Pictures(nn.Module):
    """An instance norm that keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.second, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(torch.relu(self.norm(self.first(image)))).mean((2, 3)))
        return logits


class Siamese(nn.Module):
    """Layers called twice, a batch norm among them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)
        self.join, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        both = [torch.relu(self.norm(self.shared(each))) for each in (one, other)]
        logits: Tensor = self.head(torch.relu(self.join(torch.cat(both, 1))))
        return logits

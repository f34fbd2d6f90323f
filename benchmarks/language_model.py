"""A small causal language model, trained here on real text: what the benchmarks compress where perplexity is measured.

    python benchmarks/language_model.py [--directory DIR] [--threads 2]

trains it once (some minutes on two cores), keeps it in DIR and prints its perplexity. Other benchmarks call
`load_or_train`.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from math import exp
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.corpus import read_text

VOCABULARY = 1024
CONTEXT = 128
WIDTH = 256
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_STEPS = 900
BATCH = 16
PEAK_RATE = 2e-3
SEED = 0


class Block(nn.Module):
    """Attention and a feed-forward part, both on the normalized stream (pre-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)
        self.feed_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return (batch, tokens, width)."""
        batch, length, _ = x.shape
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).view(batch, length, NUM_HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.feed_norm(x))))


class LanguageModel(nn.Module):
    """A GPT of 3.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Take tokens (batch, length), return logits (batch, length, vocabulary)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class TrainedModel:
    """Where everything lies: upload `model` and `training`, or open them in the engine."""

    model: Path
    """A .pt2: tokens (batch, 128) int64 -> logits (batch, 128, 1024)."""
    training: Path
    """An .npz with the column `tokens`, (rows, 128) int64."""
    held_out: Path
    """The same, of other docstrings."""
    tokenizer: Path


def load_or_train(directory: Path | None = None, *, num_threads: int = 2) -> TrainedModel:
    """Return the model, which is trained by the first call and kept in `directory` (default: the temporary folder)."""
    directory = directory or Path(tempfile.gettempdir()) / "pare-language-model"
    directory.mkdir(parents=True, exist_ok=True)
    trained = TrainedModel(
        *(directory / name for name in ("model.pt2", "training.npz", "held_out.npz", "tokenizer.json"))
    )
    if not trained.model.exists():
        _train(trained, num_threads)
    return trained


def measure_perplexity(module: nn.Module, path: Path, max_rows: int = 500) -> float:
    """Return exp of the mean loss per next token over at most `max_rows` rows of a file with `tokens`."""
    rows = np.load(path)["tokens"][:max_rows]
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 50):
            tokens = torch.from_numpy(rows[start : start + 50])
            output = module(tokens)
            logits = output if isinstance(output, Tensor) else output[0]
            total += float(_loss(logits, tokens)) * len(tokens)
    return exp(total / len(rows))


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _train(trained: TrainedModel, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.manual_seed(SEED)
    texts = read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts[:1], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(trained.tokenizer))
    streams = [np.asarray(tokenizer.encode(text).ids, dtype=np.int64) for text in texts]
    for path, stream in zip((trained.training, trained.held_out), streams, strict=True):
        np.savez(path, tokens=stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))

    module, text = LanguageModel(), torch.from_numpy(streams[0])
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=NUM_STEPS, pct_start=0.1)
    started_at = time.monotonic()
    for step in range(NUM_STEPS):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        tokens = torch.stack([text[start : start + CONTEXT] for start in starts])
        loss = _loss(module(tokens), tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 100 == 99:
            seconds = time.monotonic() - started_at
            print(f"step {step + 1} of {NUM_STEPS}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    module.eval()
    example = torch.from_numpy(np.load(trained.held_out)["tokens"][:2])
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        partial = trained.model.with_suffix(".part.pt2")
        torch.export.save(exported, partial)
    partial.replace(trained.model)


def main() -> None:
    """Train, unless that was done, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    trained = load_or_train(arguments.directory, num_threads=arguments.threads)
    module = torch.export.load(trained.model).module()
    count = sum(each.numel() for each in module.parameters())
    for name, path in (("training", trained.training), ("held-out", trained.held_out)):
        print(f"{count:,} parameters, perplexity per token on {name} text: {measure_perplexity(module, path):.3f}")


if __name__ == "__main__":
    main()

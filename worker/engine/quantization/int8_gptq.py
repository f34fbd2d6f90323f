"""8-bit weights rounded by GPTQ: the columns still to come make good the error of each column that was rounded.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022), on the grid
that integer arithmetic needs: symmetric, one scale per output channel or one for all.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from worker.engine.measure.activations import Gram
from worker.engine.measure.walk import Walk
from worker.engine.programs.program import Program
from worker.engine.quantization.gptq import factorize, output_error
from worker.engine.quantization.int8_grid import Floats, largest_code

BLOCK = 128
"""Columns whose errors reach the rest of the matrix together."""
DAMPING = 0.01
"""Share of the mean diagonal added to the Hessian."""


def round_by_gptq(
    weight: Tensor, gram: Tensor, bits: int, *, per_channel: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes (rows, features) and scales (rows, 1), `weight ~ codes * scales`.

    `gram` is the sum of X^T X over the layer's inputs, (features, features); `mask` is False where a weight must stay
    zero. Where rounding to nearest has the smaller output error on these inputs, that is returned.
    """
    limit = largest_code(bits)
    left = weight.detach().float().clone()
    largest = left.abs().amax(1, keepdim=True) if per_channel else left.abs().max().expand(len(left), 1)
    scales = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    nearest = (left / scales).round().clamp(-limit, limit)
    if not bool(gram.any()):
        return nearest, scales
    original, factor = left.clone(), factorize(gram.unsqueeze(0), DAMPING)[0]
    codes = torch.empty_like(left)
    num_features = left.shape[1]
    for start in range(0, num_features, BLOCK):
        stop = min(start + BLOCK, num_features)
        block, local = left[:, start:stop], factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            values = block[:, column : column + 1]
            code = (values / scales).round().clamp(-limit, limit)
            if mask is not None:
                code = code * mask[:, start + column : start + column + 1]
            codes[:, start + column] = code[:, 0]
            error = (values - code * scales) / local[column, column]
            errors[:, column] = error[:, 0]
            block[:, column + 1 :] -= error * local[column, None, column + 1 :]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    before, after = (output_error(original - each * scales, gram.unsqueeze(0)) for each in (nearest, codes))
    return (codes if after <= before else nearest), scales


def round_linear_layers(
    program: Program,
    batches: Iterable[tuple[Tensor, ...]],
    skip: Collection[str],
    bits: int,
    *,
    per_channel: bool,
    report: Callable[[float, str], None] = lambda *_: None,
) -> dict[str, Floats]:
    """Put the weights of linear layers onto their 8-bit (or 7-bit) grids, in place, and return their scales by layer.

    Each layer sees what the already rounded layers before it make of the batches. A weight with several owners (a tied
    embedding) is left alone.
    """
    owners = Counter(id(each) for _, each in program.module.named_parameters(remove_duplicate=False))
    layers = {
        name: layer
        for name, layer in program.module.named_modules()
        if isinstance(layer, nn.Linear) and name not in skip and owners[id(layer.weight)] == 1
    }
    found: dict[str, Floats] = {}

    def visit(grams: dict[str, Gram]) -> None:
        for name, gram in grams.items():
            weight = layers[name].weight
            codes, scales = round_by_gptq(
                weight, gram.matrix[0], bits, per_channel=per_channel, mask=program.masks.get(f"{name}.weight")
            )
            with torch.no_grad():
                weight.copy_(codes * scales)
            found[name] = scales[:, 0].cpu().numpy()

    Walk(program, list(batches), list(layers), Gram).run(visit, report)
    return found

"""The precisions a layer's weights may stand in, what each makes of them, and the bytes that takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from app.recipes.quantization import Precision
from worker.engine.measure.activations import Gram, can_collect, collect, row_shape
from worker.engine.packing.encodings import Codebook, Encoding, Floating, Grouped, bring_to_cpu
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program
from worker.engine.quantization.gptq import round_by_gptq
from worker.engine.quantization.hqq import round_by_hqq
from worker.engine.quantization.rounding import round_to_float, round_to_groups
from worker.engine.quantization.weights import find_weights, refuse_nothing

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4", "int3", "int2")
"""From the finest to the coarsest."""
BITS: dict[Precision, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
Method = Literal["rtn", "gptq", "hqq"]
DAMPING = 0.01
MAX_STATISTICS_BYTES = 2**28
"""Of input statistics kept at a time; more layers than fit are fed in several passes."""


@dataclass(frozen=True)
class CodableLayer:
    """A layer whose weight matrices get one precision together."""

    name: str
    """The first of those that share the weights."""
    names: tuple[str, ...]
    """All of them."""
    parameters: tuple[str, ...]
    """Names of its weight matrices."""


@dataclass(frozen=True)
class Choice:
    """One precision of one layer."""

    precision: Precision
    encodings: Mapping[str, Encoding]
    """By parameter; empty where the weights stay as they are."""
    num_bytes: int
    """Codes, scales and zero points, or plain numbers."""


def find_codable(program: Program, skip_layers: Iterable[str] = ()) -> tuple[list[CodableLayer], int]:
    """Return the layers with weight matrices that may be coded, and how many weights an earlier step has coded.

    Raises RecipeRefused where `skip_layers` has unknown names, StepFailed where nothing is left.
    """
    found = find_weights(program, skip_layers, embeddings=True)
    refuse_nothing(found, skip_layers)
    layers: dict[str, CodableLayer] = {}
    for weight in found.chosen:
        name = weight.layers[0]
        before = layers.get(name, CodableLayer(name, (), ()))
        names = tuple(dict.fromkeys((*before.names, *weight.layers)))
        layers[name] = CodableLayer(name, names, (*before.parameters, weight.name))
    return list(layers.values()), len(found.coded_before)


class Rounder:
    """Makes the choices of every layer."""

    def __init__(self, program: Program, *, group_size: int, method: Method = "rtn", symmetric: bool = False) -> None:
        self._program, self._group_size, self._method, self._symmetric = program, group_size, method, symmetric
        self._parameters = dict(program.module.named_parameters(remove_duplicate=False))

    @property
    def key(self) -> str:
        """Names how weights are rounded."""
        return f"{self._method} {self._group_size} {self._symmetric}"

    def make_choices(
        self,
        layers: Sequence[CodableLayer],
        precisions: Sequence[Precision],
        batches: Sequence[tuple[Tensor, ...]],
    ) -> list[list[Choice]]:
        """Return, by layer, one choice per precision. `batches` are inputs of the unchanged program, for GPTQ."""
        choices: dict[str, list[Choice]] = {}
        with on_device(self._program):
            for chunk in self._split(layers):
                grams: dict[str, Gram] = {}
                if self._method == "gptq":
                    grams = collect(self._program, [each.name for each in chunk if self._sees(each)], batches, Gram)
                for layer in chunk:
                    gram = grams[layer.name].matrix if layer.name in grams else None
                    choices[layer.name] = [self.make_choice(layer, precision, gram) for precision in precisions]
        return [choices[layer.name] for layer in layers]

    def make_choice(self, layer: CodableLayer, precision: Precision, gram: Tensor | None = None) -> Choice:
        """Return one layer's weights in a precision.

        8-bit codes are symmetric with one scale per row: groups would add an eighth to them and gain little. Fewer
        bits have groups, and zero points unless symmetric. Without `gram`, GPTQ rounds to nearest.
        """
        weights = {name: self._parameters[name].detach() for name in layer.parameters}
        if precision == "fp32":
            return Choice(precision, {}, sum(4 * weight.numel() for weight in weights.values()))
        encodings = {name: bring_to_cpu(self._round(name, weight, precision, gram)) for name, weight in weights.items()}
        return Choice(precision, encodings, sum(count_bytes(each) for each in encodings.values()))

    def _round(self, name: str, weight: Tensor, precision: Precision, gram: Tensor | None) -> Encoding:
        if precision == "fp16":
            return round_to_float(weight, "fp16")
        if precision == "int8":
            return round_to_groups(weight, 8, whole_rows(weight), symmetric=True)
        bits = BITS[precision]
        if gram is not None:
            mask = self._program.masks.get(name)
            return round_by_gptq(
                weight, gram, bits, self._group_size, symmetric=self._symmetric, damping=DAMPING, mask=mask
            )[0]
        if self._method == "hqq":
            return round_by_hqq(weight, bits, self._group_size, symmetric=self._symmetric)
        return round_to_groups(weight, bits, self._group_size, symmetric=self._symmetric)

    def _sees(self, layer: CodableLayer) -> bool:
        return can_collect(self._layer(layer))

    def _layer(self, layer: CodableLayer) -> nn.Module:
        return self._program.module.get_submodule(layer.name)

    def _split(self, layers: Sequence[CodableLayer]) -> Iterator[list[CodableLayer]]:
        chunk: list[CodableLayer] = []
        size = 0
        for layer in layers:
            needed = 0
            if self._method == "gptq" and self._sees(layer):
                groups, features = row_shape(self._layer(layer))
                needed = 4 * groups * features**2
            if chunk and size + needed > MAX_STATISTICS_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(layer)
            size += needed
        if chunk:
            yield chunk


def whole_rows(weight: Tensor) -> int:
    """Return the group size that gives each row one scale: a power of two, as integer operators want it."""
    return max(16, 1 << (weight[0].numel() - 1).bit_length())


def count_bytes(encoding: Encoding) -> int:
    """Return the bytes of codes, scales and zero points, each in as many bits as it has, without entropy coding."""
    if isinstance(encoding, Grouped):
        zero_points = 0 if encoding.zero_points is None else encoding.zero_points.numel()
        return (
            _whole_bytes(encoding.codes.numel() * encoding.bits)
            + 4 * encoding.scales.numel()
            + _whole_bytes(zero_points * encoding.bits)
        )
    if isinstance(encoding, Floating):
        scales = 0 if encoding.scales is None else encoding.scales.numel()
        return encoding.values.numel() * encoding.values.element_size() + 4 * scales
    if isinstance(encoding, Codebook):
        index_bits = max(1, (encoding.centroids.shape[1] - 1).bit_length())
        return _whole_bytes(encoding.indices.numel() * index_bits) + 4 * encoding.centroids.numel()
    return _whole_bytes(encoding.codes.numel() * encoding.bits)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)

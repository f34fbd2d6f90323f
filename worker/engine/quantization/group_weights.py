"""Putting a program's weights into groups of few bits by the chosen method, layer by layer, and what it cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx, nn

from app.recipes.quantization import QuantizeInt4
from worker.engine.heap import release_freed_memory
from worker.engine.measure.activations import Gram, can_collect
from worker.engine.measure.walk import Walk
from worker.engine.packing.encodings import Grouped
from worker.engine.programs.program import Program
from worker.engine.quantization.awq import divide_source, find_source, round_by_clipping, round_by_scaling
from worker.engine.quantization.gptq import output_error, round_by_gptq
from worker.engine.quantization.hqq import round_by_hqq
from worker.engine.quantization.precisions import count_bytes
from worker.engine.quantization.rounding import round_to_groups
from worker.engine.quantization.weights import Weight

Report = Callable[[float, str], None]


@dataclass
class Result:
    """What became of the weights."""

    coded: dict[str, Grouped] = field(default_factory=dict)
    """Parameter name -> its encoding."""
    effects: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Parameter name -> what was measured ("layer_output_error", "weight_error") and the relative squared error."""
    too_small: list[str] = field(default_factory=list)
    """Names of parameters whose scales would take more than the codes save."""
    unseen: list[str] = field(default_factory=list)
    """Names of parameters rounded to nearest because the method cannot see what goes into their layer."""
    scaled: list[str] = field(default_factory=list)
    """AWQ: layers whose input is scaled."""
    clipped_only: list[str] = field(default_factory=list)
    """AWQ: layers whose input cannot be scaled, or gains nothing by it."""
    rtn_error: float = 0.0
    """Sum over layers of the relative squared output error that rounding to nearest has on the calibration rows."""
    error: float = 0.0
    """The same of what was chosen."""


class Coder:
    """Codes weights one after the other."""

    def __init__(self, program: Program, step: QuantizeInt4) -> None:
        self._program, self._step = program, step
        self.result = Result()

    def code_plain(self, weight: Weight) -> None:
        """Round one weight without looking at data: by HQQ if that was asked for, else to nearest."""
        step, tensor = self._step, weight.parameter.detach().to(self._program.device)
        choose = round_by_hqq if step.method == "hqq" else round_to_groups
        encoding = choose(tensor, step.bits, step.group_size, symmetric=step.symmetric)
        error = encoding.decode() - tensor
        power = float(tensor.double().square().sum())
        self._put(weight, encoding, "weight_error", float(error.double().square().sum()) / power if power else 0.0)

    def code_with_data(self, weights: Sequence[Weight], batches: Sequence[tuple[Tensor, ...]], report: Report) -> None:
        """Round the weights of layers whose inputs can be seen, in the order of the graph, by GPTQ or AWQ.

        A weight whose layer the graph never calls by itself is rounded to nearest.
        """
        layers = dict(self._program.module.named_modules())
        by_layer = {name: weight for weight in weights for name in weight.layers if can_collect(layers[name])}
        by_tensor = {id(weight.parameter): weight for weight in weights}

        def visit(found: dict[str, Gram]) -> None:
            chosen = {name: by_tensor[id(layers[name].weight)] for name in found}
            if self._step.method == "gptq":
                for name, gram in found.items():
                    self._code_by_gptq(chosen[name], gram)
            else:
                for names in self._share_input(list(found)):
                    self._code_by_awq({name: chosen[name] for name in names}, found[names[0]], set(found))

        Walk(self._program, batches, list(by_layer), Gram).run(visit, report)
        for weight in weights:
            if weight.name not in self.result.coded and weight.name not in self.result.too_small:
                self.result.unseen.append(weight.name)
                self.code_plain(weight)

    def _code_by_gptq(self, weight: Weight, gram: Gram) -> None:
        step, tensor = self._step, weight.parameter.detach()
        encoding, errors = round_by_gptq(
            tensor, gram.matrix, step.bits, step.group_size,
            symmetric=step.symmetric, damping=step.damping, mask=self._program.masks.get(weight.name),
        )  # fmt: skip
        power = output_error(tensor.float().reshape(len(tensor), -1), gram.matrix)
        self._add_errors(errors["rtn"], errors["chosen"], power)
        self._put(weight, encoding, "layer_output_error", errors["chosen"] / power if power else 0.0)

    def _code_by_awq(self, weights: dict[str, Weight], gram: Gram, changing: set[str]) -> None:
        step = self._step
        tensors = [each.parameter.detach() for each in weights.values()]
        source = find_source(self._program, list(weights), changing)
        if source is None:
            done = [
                round_by_clipping(each, gram, step.bits, step.group_size, symmetric=step.symmetric) for each in tensors
            ]
        else:
            done, scales = round_by_scaling(tensors, gram, step.bits, step.group_size, symmetric=step.symmetric)
            if bool((scales != 1).any()):
                divide_source(self._program, source, scales)
                self.result.scaled += weights
        if source is None or bool((scales == 1).all()):
            self.result.clipped_only += weights
        for (name, weight), tensor, rounded in zip(weights.items(), tensors, done, strict=True):
            power = output_error(tensor.float().reshape(len(tensor), -1), gram.matrix)
            self._add_errors(rounded.rtn_error, rounded.error, power)
            # Too small to code, but divided for: the source was scaled for all its readers.
            keep = name in self.result.scaled
            error = rounded.error / power if power else 0.0
            self._put(weight, rounded.encoding, "layer_output_error", error, force=keep)

    def _share_input(self, names: list[str]) -> list[list[str]]:
        """Return the layers of a wave in lists that read the same value."""
        calls = {str(node.target): node for node in self._program.module.graph.nodes if node.op == "call_module"}
        layers = dict(self._program.module.named_modules())
        groups: dict[object, list[str]] = {}
        for name in names:
            source = calls[name].args[0]
            shared = isinstance(source, fx.Node) and isinstance(layers[name], nn.Linear)
            groups.setdefault(source if shared else name, []).append(name)
        return list(groups.values())

    def _add_errors(self, rtn: float, chosen: float, power: float) -> None:
        if power:
            self.result.rtn_error += rtn / power
            self.result.error += chosen / power

    def _put(self, weight: Weight, encoding: Grouped, metric: str, error: float, *, force: bool = False) -> None:
        if count_bytes(encoding) >= 4 * weight.parameter.numel() and not force:
            self.result.too_small.append(weight.name)
            return
        mask = self._program.masks.get(weight.name)
        with torch.no_grad():
            self._program.encode(weight.name, encoding)
        assert mask is None or not bool(weight.parameter.detach()[~mask].any()), f"{weight.name} lost its mask"
        self.result.coded[weight.name] = cast(Grouped, self._program.encodings[weight.name])
        release_freed_memory()
        self.result.effects[weight.name] = (metric, error)

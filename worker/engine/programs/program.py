"""A program in the engine's hands: a trainable module with real layers and the original names, or a file."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from app.recipes.facts import TensorFacts
from worker.engine.devices import CPU
from worker.engine.packing.encodings import Encoding, bring_to_cpu
from worker.engine.programs.example_inputs import make_inputs


@dataclass(frozen=True)
class Signature:
    """The call of a program: flat positional inputs and flat outputs, in order, with their original names.

    A size that may vary is a string; the batch axis is always axis 0 and, when it may vary, named "batch".
    """

    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    batch_size: int | None
    """The fixed batch size, or None where the batch may vary."""
    dynamic_ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Variable size -> smallest and largest allowed value (None: unbounded)."""
    example_sizes: dict[str, int] = field(default_factory=dict)
    """Variable size -> the value it had when the program was exported; what it is measured at, the batch aside."""


@dataclass
class Program:
    """A trainable module. `module(*inputs)` takes the signature's inputs and returns a tuple of its outputs."""

    module: fx.GraphModule
    signature: Signature
    exported_in: str
    """"train" or "eval"."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that share one tensor."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name of a parameter -> the name that it has in the model, and in its files for torch."""
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name in the model of a parameter that several are here, the rows of one after the other -> their names."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name -> bool mask, False where a pruned weight must stay zero. Training re-applies them."""
    encodings: dict[str, Encoding] = field(default_factory=dict)
    """Parameter name -> the few bits its values stand in. The parameter always equals `encoding.decode()`."""
    tokenizer: bytes | None = None
    """tokenizer.json of the Hugging Face folder that the program came from, written anew."""
    device: torch.device = CPU
    """Where heavy work on it is done (placement.on_device); between two such works it rests on the CPU."""
    notes: tuple[str, ...] = ()
    """What intake had to assume, because the uploaded file does not say it."""

    def copy(self) -> "Program":
        """Return an independent copy (parameters, buffers and masks are cloned)."""
        import copy

        return replace(
            self,
            module=copy.deepcopy(self.module),
            masks={name: mask.clone() for name, mask in self.masks.items()},
            encodings=dict(self.encodings),
        )

    def example_inputs(self, batch_size: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs of the signature: normal floats, valid indices, alternating ones and zeros for masks."""
        return make_inputs(self, batch_size, seed)

    def encode(self, name: str, encoding: Encoding) -> None:
        """Let a parameter stand in few bits: its values become exactly those that the encoding can hold.

        The encoding is kept on the CPU, wherever it was made.
        """
        encoding = bring_to_cpu(encoding)
        parameter = dict(self.module.named_parameters(remove_duplicate=False))[name]
        values = encoding.decode()
        assert values.shape == parameter.shape, f"{name}: {tuple(values.shape)} is not {tuple(parameter.shape)}"
        with torch.no_grad():
            parameter.copy_(values)
        self.encodings[name] = encoding

    def apply_masks(self) -> None:
        """Set every masked weight to zero, in place."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].mul_(mask)


@dataclass(frozen=True)
class FileProgram:
    """A final program that exists as a file only, .onnx or .pt2, with the input and output names of its source."""

    path: Path
    signature: Signature
    parameters: int
    """Numbers stored in the file as weights, scales and zero points included."""
    nonzero_parameters: int

"""A teacher's answers, remembered row by row, so that it runs once over the data and not once an epoch."""

import hashlib

import torch
from torch import Tensor

from worker.engine.training.quality import Module

LIMIT_BYTES = 256 * 1024 * 1024


class Remembered:
    """A model whose outputs for rows that it has seen come from memory, as far as that reaches.

    It must not change, nor let one row's output depend on the others of its batch; a model in eval mode does neither.
    What does not fit into `limit_bytes`, or comes as outputs that are not one per row, is computed anew each time.
    """

    def __init__(self, module: Module, limit_bytes: int = LIMIT_BYTES) -> None:
        self._module = module
        self._room = limit_bytes
        self._known: dict[bytes, tuple[Tensor, ...]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for a batch on the host."""
        return self.recall(inputs, inputs)

    def recall(self, host_inputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the outputs for a batch where it is. Rows are known by what they are on the host, which need not wait
        for the device then."""
        names = _name_rows(host_inputs)
        if all(name in self._known for name in names):
            rows = [self._bring(name, inputs[0].device) for name in names]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        outputs = self._module(*inputs)
        if all(output.ndim > 0 and len(output) == len(names) for output in outputs):
            self._remember(names, outputs)
        return outputs

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is known. A row's outputs can differ in their last bits with the batch that it came in."""
        if not self._known:
            return {}
        columns = zip(*self._known.values(), strict=True)
        names = torch.frombuffer(bytearray(b"".join(self._known)), dtype=torch.uint8).reshape(len(self._known), -1)
        return {"names": names} | {str(index): torch.stack(column) for index, column in enumerate(columns)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Know what another one knew."""
        columns = [state[str(index)].clone() for index in range(len(state) - 1)]
        for place, name in enumerate(state.get("names", ())):
            self._known[bytes(name.numpy())] = tuple(column[place] for column in columns)
            self._room -= sum(column[place].nbytes for column in columns)

    def _bring(self, name: bytes, device: torch.device) -> tuple[Tensor, ...]:
        """Return a row's outputs on the device, where they stay: a restored one has them on the host."""
        known = self._known[name]
        if known[0].device != device:
            known = self._known[name] = tuple(each.to(device) for each in known)
        return known

    def _remember(self, names: list[bytes], outputs: tuple[Tensor, ...]) -> None:
        size = sum(output[0].nbytes for output in outputs)
        for index, name in enumerate(names):
            if name not in self._known and self._room >= size:
                self._room -= size
                self._known[name] = tuple(output[index].clone() for output in outputs)


def _name_rows(inputs: tuple[Tensor, ...]) -> list[bytes]:
    digests = [hashlib.blake2b(digest_size=16) for _ in range(len(inputs[0]))]
    for tensor in inputs:
        for digest, row in zip(digests, tensor.contiguous().numpy(), strict=True):
            digest.update(row.tobytes())
    return [digest.digest() for digest in digests]

"""The modules of an imported program: layers and containers at the original names, tied tensors shared."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram


class ModuleTree:
    """Stored tensors by name, and the layers made so far by path."""

    def __init__(self, exported: ExportedProgram) -> None:
        persistent = dict(exported.state_dict)
        constants = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
        self._nonpersistent = set(constants) - set(persistent)
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[str, nn.Module] = {}
        groups: dict[Any, list[str]] = defaultdict(list)
        shared: dict[Any, Tensor] = {}
        for name, tensor in {**constants, **persistent}.items():
            # Names of one tensor become one object, so that training and saving keep them equal.
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) if tensor.numel() else name
            self.tensors[name] = shared.setdefault(key, tensor)
            if isinstance(tensor, nn.Parameter):
                groups[key].append(name)
        self.tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)
        self.renamed: dict[str, str] = {}
        """Name of a tensor here -> its name in the model."""
        self.joined: dict[str, tuple[str, ...]] = {}
        """Name of a tensor in the model -> the names of its pieces here."""

    def transpose(self, name: str) -> None:
        """Store a matrix as its transpose from here on. It must have this one name only."""
        tensor = self.tensors[name]
        turned = tensor.detach().t().contiguous()
        self.tensors[name] = (
            nn.Parameter(turned, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else turned
        )

    def rename(self, path: str, names: dict[str, str]) -> bool:
        """Let parameters be those of a layer at `path` (new name -> name); False where it is taken or they are tied.

        It is taken too where what would hold the layer has a weight of its own: that is a layer, which holds none.
        """
        if not self._has_room([path], names.values()):
            return False
        for new, name in names.items():
            self.tensors[new] = self.tensors.pop(name)
            self.renamed[new] = name
        return True

    def cut(self, paths: list[str], names: dict[str, list[str]], rows: list[int]) -> bool:
        """Let pieces of parameters be those of layers at `paths` (name -> new names); False as for `rename`.

        `rows`: length of each piece on axis 0.
        """
        if not self._has_room(paths, names):
            return False
        for name, pieces in names.items():
            whole = self.tensors.pop(name)
            for piece, values in zip(pieces, whole.detach().split(rows), strict=True):
                self.tensors[piece] = nn.Parameter(values.clone(), requires_grad=whole.requires_grad)
            self.joined[name] = tuple(pieces)
        return True

    def _has_room(self, paths: list[str], names: Iterable[str]) -> bool:
        shared = {name for group in self.tied for name in group}
        for path in paths:
            owner, _, last = path.rpartition(".")
            if not last or f"{owner}.weight".lstrip(".") in self.tensors:
                return False
            if any(name == path or name.startswith(f"{path}.") for name in self.tensors):
                return False
        return all(isinstance(self.tensors[name], nn.Parameter) and name not in shared for name in names)

    def place(self, module: nn.Module, held: dict[str, str], caller: str) -> str | None:
        """Put a layer where the model had it and return its path; None where the tensors' names fit no layer.

        `held`: attribute of the layer -> name of its tensor. `caller`: path of the module that made the call.
        """
        if held:
            prefixes = {name.rpartition(".")[0] for name in held.values()}
            candidates = [caller, *sorted(prefixes)] if len(prefixes) == 1 else [caller]
            for path in dict.fromkeys(candidates):
                if path and self._holds(path, held) and self._fits(path, module):
                    return self._put(path, module, {name: f"{path}.{name}" for name in held})
            return None
        inside = any(name.startswith(f"{caller}.") for name in self.tensors)
        path = caller if caller and not inside else ".".join(filter(None, (caller, type(module).__name__.lower())))
        base, count = path, 2
        while (
            not self._fits(path, module)
            or path in self.tensors
            or any(name.startswith(f"{path}.") for name in self.tensors)
        ):
            path, count = f"{base}_{count}", count + 1
        return self._put(path, module, {})

    def _holds(self, path: str, held: dict[str, str]) -> bool:
        return all(self.tensors.get(f"{path}.{attr}") is self.tensors[name] for attr, name in held.items())

    def _fits(self, path: str, module: nn.Module) -> bool:
        present = self.layers.get(path)
        if present is not None:
            return type(present) is type(module) and repr(present) == repr(module)
        # A layer has no layers inside and lies in none.
        return not any(path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in self.layers)

    def _put(self, path: str, module: nn.Module, held: dict[str, str]) -> str:
        if path in self.layers:
            return path
        for attribute, name in held.items():
            _set_tensor(module, attribute, self.tensors[name], persistent=True)
        counter = f"{path}.num_batches_tracked"
        if "num_batches_tracked" in module._buffers and module._buffers["num_batches_tracked"] is not None:
            import torch

            stored = self.tensors.get(counter)
            module.register_buffer(
                "num_batches_tracked", torch.zeros((), dtype=torch.long) if stored is None else stored
            )
        self.layers[path] = module
        return path

    def build(self, graph: fx.Graph) -> fx.GraphModule:
        """Return the module that runs `graph` with these layers and tensors."""
        root = nn.Module()
        for path, layer in self.layers.items():
            parent, _, name = path.rpartition(".")
            _container(root, parent).add_module(name, layer)
        for path, tensor in self.tensors.items():
            parent, _, name = path.rpartition(".")
            owner = _container(root, parent)
            if owner._parameters.get(name) is None and owner._buffers.get(name) is None:
                _set_tensor(owner, name, tensor, persistent=path not in self._nonpersistent)
        module = fx.GraphModule({}, fx.Graph(), class_name="Program")
        for name, child in root.named_children():
            module.add_module(name, child)
        for name, parameter in root._parameters.items():
            module.register_parameter(name, parameter)
        for name, buffer in root._buffers.items():
            module.register_buffer(name, buffer, persistent=name not in root._non_persistent_buffers_set)
        module.graph = graph
        return module


def _container(root: nn.Module, path: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _set_tensor(module: nn.Module, name: str, tensor: Tensor, *, persistent: bool) -> None:
    if isinstance(tensor, nn.Parameter):
        # setattr, not register_parameter: recurrent layers keep a second list of their weights.
        setattr(module, name, tensor)
    elif isinstance(module._buffers.get(name), Tensor):
        setattr(module, name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=persistent)

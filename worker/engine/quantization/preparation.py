"""Changes of a float module, before it is quantized, that keep its function and make its ranges kinder.

fold_batch_norms: a batch norm becomes part of the layer before it. smooth: SmoothQuant (Xiao et al. 2023). equalize:
cross-layer equalization (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019).
All edit the fx module in place and leave names of layers as they were.
"""

import itertools
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOMOGENEOUS_LAYERS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool2d)
HOMOGENEOUS_CALLS = {"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "max_pool2d", "avg_pool2d"}
"""f(c x) = c f(x) for c > 0, channel by channel."""
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
SMALLEST = 1e-5
NUM_EQUALIZATION_ROUNDS = 20
MAX_SCALE = 1e3
"""Of one channel; beyond it, channels are dead and their ranges say nothing."""


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Fold every batch norm (in eval mode) that alone reads a convolution or linear layer. Returns how many."""
    layers = dict(module.named_modules())
    calls = _count_calls(module)
    owners = _count_owners(module)
    folded = 0
    for node in list(module.graph.nodes):
        norm = _called(node, layers)
        if not isinstance(norm, BATCH_NORMS) or calls[str(node.target)] > 1:
            continue
        source = node.args[0]
        layer = _called(source, layers)
        if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or not _is_own(layer, calls, owners, source):
            continue
        if len(source.users) != 1 or norm.running_mean is None or (isinstance(layer, nn.Linear) and _rank(node) != 2):
            continue
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        arguments = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        with torch.no_grad():
            weight, bias = fuse(layer.weight, layer.bias, *arguments)  # type: ignore[arg-type]
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        folded += 1
    if folded:
        module.delete_all_unused_submodules()
        module.recompile()
    return folded


def measure_largest_inputs(module: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return, per linear layer, the largest magnitude of each input feature over the batches: (features,)."""
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().reshape(-1, layer.in_features).amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return layer.register_forward_pre_hook(look)

    handles = [watch(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    try:
        with torch.no_grad():
            for inputs in batches:
                module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def smooth(
    module: fx.GraphModule, largest: dict[str, Tensor], alpha: float, skip: Collection[str] = ()
) -> tuple[int, int]:
    """Divide each input feature of linear layers by s = activations ** alpha / weights ** (1 - alpha), weights times s.

    Layers that read the same tensor share s. The division becomes part of a layer norm before them where nobody else
    reads it, else it is a multiplication in the graph. Returns the numbers of layers of either kind.
    """
    layers = dict(module.named_modules())
    calls, owners = _count_calls(module), _count_owners(module)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        layer = _called(node, layers)
        name = str(node.target)
        if not isinstance(layer, nn.Linear) or name in skip or name not in largest:
            continue
        if _is_own(layer, calls, owners, node):
            readers.setdefault(node.args[0], []).append(node)
    folded = multiplied = 0
    for index, (source, nodes) in enumerate(readers.items()):
        linears = [layers[str(node.target)] for node in nodes]
        weights = torch.stack([each.weight.detach().abs().amax(0) for each in linears]).amax(0).clamp(min=SMALLEST)
        activations = torch.stack([largest[str(node.target)] for node in nodes]).amax(0).clamp(min=SMALLEST)
        scale = (activations**alpha / weights ** (1 - alpha)).clamp(min=SMALLEST)
        # The common factor is free: with it 1, a feature that is like the others is not touched.
        scale = scale / scale.log().mean().exp()
        norm = _called(source, layers)
        with torch.no_grad():
            for each in linears:
                each.weight.mul_(scale)
            if _takes_scale(norm, source, calls, owners) and set(source.users) == set(nodes):
                norm.weight.div_(scale)  # type: ignore[union-attr, operator]
                if norm.bias is not None:  # type: ignore[union-attr]
                    norm.bias.div_(scale)  # type: ignore[union-attr, operator]
                folded += len(nodes)
                continue
        name = f"smoothing_{index}"
        module.register_buffer(name, 1 / scale)
        with module.graph.inserting_before(nodes[0]):
            factor = module.graph.get_attr(name)
            product = module.graph.call_function(torch.ops.aten.mul.Tensor, (source, factor))
        for node in nodes:
            node.replace_input_with(source, product)
        multiplied += len(nodes)
    module.recompile()
    return folded, multiplied


def equalize(module: fx.GraphModule, skip: Collection[str] = ()) -> int:
    """Give each channel between two consecutive layers the same weight range on both sides. Returns the pairs.

    Chains are layer - (ReLU, pooling, dropout) - layer, of linear layers or convolutions (plain or depthwise), without
    another reader in between. Batch norms must have been folded.
    """
    pairs = _find_pairs(module, skip)
    for _ in range(NUM_EQUALIZATION_ROUNDS):
        moved = 0.0
        for first, second in pairs:
            one = first.weight.detach().flatten(1).abs().amax(1)
            depthwise = isinstance(second, CONVOLUTIONS) and second.groups > 1
            other = second.weight.detach().transpose(0, 0 if depthwise else 1).flatten(1).abs().amax(1)
            alive = (one > 0) & (other > 0)
            scale = torch.where(alive, (one / other.clamp(min=1e-30)).sqrt(), torch.ones_like(one))
            scale = scale.clamp(1 / MAX_SCALE, MAX_SCALE)
            moved = max(moved, float((scale - 1).abs().max()))
            with torch.no_grad():
                first.weight.div_(scale.reshape(-1, *[1] * (first.weight.ndim - 1)))
                if first.bias is not None:
                    first.bias.div_(scale)
                shape = [1] * second.weight.ndim
                shape[0 if depthwise else 1] = -1
                second.weight.mul_(scale.reshape(shape))
        if moved < 1e-3:
            break
    return len(pairs)


def correct_biases(
    module: fx.GraphModule,
    rounded: dict[str, Tensor],
    batches: Iterable[tuple[Tensor, ...]],
) -> int:
    """Take the mean output error that rounding the weights causes, per channel, out of the biases. Returns the layers.

    `rounded` holds layer name -> the weight as it will be. The error is measured on the float module's own activations.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        difference = rounded[name] - layer.weight.detach()  # type: ignore[operator]

        def look(_: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                error = nn.functional.linear(inputs[0], difference).reshape(-1, layer.out_features)
            else:
                error = layer._conv_forward(inputs[0], difference, None)  # type: ignore[operator]
                error = error.transpose(0, 1).flatten(1).T
            sums[name] = sums.get(name, torch.zeros(error.shape[1])) + error.sum(0)
            counts[name] = counts.get(name, 0) + len(error)

        return layer.register_forward_hook(look)

    layers = dict(module.named_modules())
    handles = [watch(name, layers[name]) for name in rounded]
    try:
        with torch.no_grad():
            for inputs in batches:
                module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        layer = layers[name]
        mean = total / counts[name]
        layer.bias = nn.Parameter(-mean if layer.bias is None else layer.bias.detach() - mean)
    return len(sums)


def _find_pairs(module: fx.GraphModule, skip: Collection[str]) -> list[tuple[Layer, Layer]]:
    layers = dict(module.named_modules())
    calls, owners = _count_calls(module), _count_owners(module)
    pairs = []
    for node in module.graph.nodes:
        first = _called(node, layers)
        if not isinstance(first, (*CONVOLUTIONS, nn.Linear)) or str(node.target) in skip:
            continue
        if not _is_own(first, calls, owners, node):
            continue
        after = node
        while len(after.users) == 1:
            after = next(iter(after.users))
            if not _is_homogeneous(after, layers):
                break
        second = _called(after, layers)
        if after is node or not isinstance(second, (*CONVOLUTIONS, nn.Linear)) or str(after.target) in skip:
            continue
        if not _is_own(second, calls, owners, after):
            continue
        groups = second.groups if isinstance(second, CONVOLUTIONS) else 1
        channels = second.in_channels if isinstance(second, CONVOLUTIONS) else second.in_features
        if (
            groups not in (1, channels)
            or channels != first.weight.shape[0]
            or (groups > 1 and second.weight.shape[0] != groups)
        ):
            continue
        pairs.append((first, second))
    return pairs


def _is_homogeneous(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if isinstance(_called(node, layers), HOMOGENEOUS_LAYERS):
        return True
    # aten.relu.default
    return node.op == "call_function" and not HOMOGENEOUS_CALLS.isdisjoint(str(node.target).split(".")[-2:-1])


def _takes_scale(norm: nn.Module | None, source: fx.Node, calls: dict[str, int], owners: dict[int, int]) -> bool:
    return (
        isinstance(norm, nn.LayerNorm)
        and norm.weight is not None
        and len(norm.normalized_shape) == 1
        and _is_own(norm, calls, owners, source)
    )


def _called(node: object, layers: dict[str, nn.Module]) -> nn.Module | None:
    return layers[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None


def _count_calls(module: fx.GraphModule) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts


def _count_owners(module: fx.GraphModule) -> dict[int, int]:
    """Return how many names each parameter has, and how often the graph reads it directly."""
    counts: dict[int, int] = {}
    names = dict(module.named_parameters(remove_duplicate=False))
    read = [
        names[str(node.target)] for node in module.graph.nodes if node.op == "get_attr" and str(node.target) in names
    ]
    for parameter in itertools.chain(names.values(), read):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _is_own(layer: nn.Module, calls: dict[str, int], owners: dict[int, int], node: fx.Node) -> bool:
    """Return whether changing this layer's parameters changes this one call and nothing else."""
    return calls[str(node.target)] == 1 and all(owners.get(id(p), 1) == 1 for p in layer.parameters())


def _rank(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else None
